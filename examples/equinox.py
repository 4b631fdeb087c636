"""Merging in an Equinox loop: a backbone, then a second stage that merges.

Run it with `python -m examples.equinox`; it trains on the embedded phantom for a minute on CPU.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from inmerge_jax import MergeRule, deep_kernels, find_kernels, merge_report, with_merging
from inmerge_jax.data import make_phantom

STEPS, BATCH = 10, 32


class Net(eqx.Module):
    """Four convolutions with batch normalisation."""

    convs: list[eqx.nn.Conv2d]
    norms: list[eqx.nn.BatchNorm]
    head: eqx.nn.Linear

    def __init__(self, inputs, classes, key):
        *keys, head_key = jax.random.split(key, 5)
        self.convs, self.norms = [], []
        for channels, conv_key in zip((16, 16, 32, 32), keys, strict=True):
            strides = 2 if channels == 32 else 1
            conv = eqx.nn.Conv2d(inputs, channels, 3, strides, padding="SAME", key=conv_key)
            self.convs.append(conv)
            self.norms.append(eqx.nn.BatchNorm(channels, axis_name="batch", mode="batch"))
            inputs = channels
        self.head = eqx.nn.Linear(inputs, classes, key=head_key)

    def __call__(self, x, state):
        """Maps one image (c, h, w) to logits (classes,), and the batch statistics to new ones."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x, state = norm(conv(x), state)
            x = jax.nn.relu(x)
        return self.head(x.mean((1, 2))), state


def apply(model, state, x):
    """Maps images (n, c, h, w) to logits (n, classes), and the batch statistics to new ones."""
    return jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)


def main() -> None:
    """Trains both stages and prints what merged."""
    data = make_phantom(size=16, train=256, val=1, test=1)
    train_images = jnp.asarray(data.train.images.transpose(0, 3, 1, 2), jnp.float32) / 255
    train_labels = jnp.asarray(data.train.labels)
    make = eqx.nn.make_with_state(Net)
    model, state = make(data.channels, data.num_classes, jax.random.key(0))

    params, static = eqx.partition(model, eqx.is_inexact_array)

    def forward(params, state, x):
        return apply(eqx.combine(params, static), state, x)

    deep = deep_kernels(find_kernels(forward, params, state, train_images[:BATCH]), skip=2)
    rule = MergeRule(threshold=0.0, partner="nearest")
    stages = {
        "backbone": optax.adam(1e-3),
        "merging": with_merging(optax.adam(1e-4), deep, rule, key=1),
    }

    def loss_of(model, state, x, y):
        logits, state = apply(model, state, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

    for stage, tx in stages.items():
        opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

        @eqx.filter_jit
        def step(model, state, opt_state, x, y, tx=tx):
            grad = eqx.filter_value_and_grad(loss_of, has_aux=True)
            (loss, state), grads = grad(model, state, x, y)
            params = eqx.filter(model, eqx.is_inexact_array)
            updates, opt_state = tx.update(grads, opt_state, params)
            return eqx.apply_updates(model, updates), state, opt_state, loss

        for number in range(STEPS):
            rows = jax.random.randint(jax.random.key(number), (BATCH,), 0, len(data.train))
            x, y = train_images[rows], train_labels[rows]
            model, state, opt_state, loss = step(model, state, opt_state, x, y)
        print(f"{stage}: loss {loss:.3f}")
    print(merge_report(opt_state, deep))


if __name__ == "__main__":
    main()
