"""Merging in a Keras 3 loop on JAX: a backbone, then a second stage that merges.

Run it with `python -m examples.keras`; it trains on the embedded phantom for a minute on CPU.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import optax

from inmerge_jax import MergeRule, deep_kernels, find_kernels, merge_report, with_merging
from inmerge_jax.data import make_phantom

STEPS, BATCH = 10, 32


def make_model(shape, classes):
    """Four convolutions with batch normalisation, for images (n, h, w, c)."""
    inputs = x = keras.Input(shape)
    for number, channels in enumerate((16, 16, 32, 32)):
        strides = 2 if channels == 32 else 1
        x = keras.layers.Conv2D(channels, 3, strides, padding="same", name=f"conv{number}")(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(name=f"norm{number}")(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(classes, name="head")(x))


def main() -> None:
    """Trains both stages and prints what merged."""
    data = make_phantom(size=16, train=256, val=1, test=1)
    images = data.train.images[:BATCH].astype("float32") / 255
    keras.utils.set_random_seed(0)
    model = make_model(images.shape[1:], data.num_classes)

    # A dictionary, so that the kernels have the variables' names; Keras itself takes lists.
    params = {variable.path: variable.value for variable in model.trainable_variables}
    rest = [variable.value for variable in model.non_trainable_variables]

    def forward(params, rest, x, training):
        trainable = [params[variable.path] for variable in model.trainable_variables]
        return model.stateless_call(trainable, rest, x, training=training)

    deep = deep_kernels(find_kernels(forward, params, rest, images, training=False), skip=2)
    rule = MergeRule(threshold=0.0, partner="nearest")
    stages = {
        "backbone": optax.adam(1e-3),
        "merging": with_merging(optax.adam(1e-4), deep, rule, key=1),
    }

    def loss_of(params, rest, x, y):
        logits, rest = forward(params, rest, x, training=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), rest

    for stage, tx in stages.items():
        opt_state = tx.init(params)

        @jax.jit
        def step(params, rest, opt_state, x, y, tx=tx):
            grad = jax.value_and_grad(loss_of, has_aux=True)
            (loss, rest), grads = grad(params, rest, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), rest, opt_state, loss

        for number in range(STEPS):
            rows = jax.random.randint(jax.random.key(number), (BATCH,), 0, len(data.train))
            x = jnp.asarray(data.train.images[rows], jnp.float32) / 255
            y = jnp.asarray(data.train.labels[rows])
            params, rest, opt_state, loss = step(params, rest, opt_state, x, y)
        print(f"{stage}: loss {loss:.3f}")
    print(merge_report(opt_state, deep))

    # Back into the model, for model.evaluate and model.save.
    for variable in model.trainable_variables:
        variable.assign(params[variable.path])
    for variable, value in zip(model.non_trainable_variables, rest, strict=True):
        variable.assign(value)


if __name__ == "__main__":
    main()
