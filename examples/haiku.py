"""Merging in a Haiku loop: a backbone, then a second stage that merges.

Run it with `python -m examples.haiku`; it trains on the embedded phantom for a minute on CPU.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from inmerge_jax import MergeRule, deep_kernels, find_kernels, merge_report, with_merging
from inmerge_jax.data import make_phantom

STEPS, BATCH = 10, 32


def make_net(classes):
    """Four convolutions with batch normalisation, for images (n, h, w, c)."""

    def net(x, train):
        for channels in (16, 16, 32, 32):
            x = hk.Conv2D(channels, 3, stride=2 if channels == 32 else 1)(x)
            norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
            x = jax.nn.relu(norm(x, is_training=train))
        return hk.Linear(classes)(x.mean((1, 2)))

    return hk.without_apply_rng(hk.transform_with_state(net))


def main() -> None:
    """Trains both stages and prints what merged."""
    data = make_phantom(size=16, train=256, val=1, test=1)
    net = make_net(data.num_classes)
    images = data.train.images[:BATCH].astype("float32") / 255
    params, state = net.init(jax.random.key(0), images, train=True)

    deep = deep_kernels(find_kernels(net.apply, params, state, images, train=False), skip=2)
    rule = MergeRule(threshold=0.0, partner="nearest")
    stages = {
        "backbone": optax.adam(1e-3),
        "merging": with_merging(optax.adam(1e-4), deep, rule, key=1),
    }

    def loss_of(params, state, x, y):
        logits, state = net.apply(params, state, x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state

    for stage, tx in stages.items():
        opt_state = tx.init(params)

        @jax.jit
        def step(params, state, opt_state, x, y, tx=tx):
            grad = jax.value_and_grad(loss_of, has_aux=True)
            (loss, state), grads = grad(params, state, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), state, opt_state, loss

        for number in range(STEPS):
            rows = jax.random.randint(jax.random.key(number), (BATCH,), 0, len(data.train))
            x = jnp.asarray(data.train.images[rows], jnp.float32) / 255
            y = jnp.asarray(data.train.labels[rows])
            params, state, opt_state, loss = step(params, state, opt_state, x, y)
        print(f"{stage}: loss {loss:.3f}")
    print(merge_report(opt_state, deep))


if __name__ == "__main__":
    main()
