"""Merging in a Flax Linen loop: a backbone, then a second stage that merges.

Run it with `python -m examples.linen`; it trains on the embedded phantom for a minute on CPU.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from inmerge_jax import MergeRule, deep_kernels, find_kernels, merge_report, with_merging
from inmerge_jax.data import make_phantom

STEPS, BATCH = 10, 32


class Net(nn.Module):
    """Four convolutions with batch normalisation."""

    classes: int

    @nn.compact
    def __call__(self, x, train):
        """Maps images (n, h, w, c) to logits (n, classes)."""
        for channels in (16, 16, 32, 32):
            x = nn.Conv(channels, (3, 3), (2, 2) if channels == 32 else (1, 1))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


def main() -> None:
    """Trains both stages and prints what merged."""
    data = make_phantom(size=16, train=256, val=1, test=1)
    net = Net(data.num_classes)
    images = data.train.images[:BATCH].astype("float32") / 255
    variables = net.init(jax.random.key(0), images, train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def forward(params, batch_stats, x):
        return net.apply({"params": params, "batch_stats": batch_stats}, x, train=False)

    deep = deep_kernels(find_kernels(forward, params, batch_stats, images), skip=2)
    rule = MergeRule(threshold=0.0, partner="nearest")
    backbone = optax.adam(1e-3)
    stages = {"backbone": backbone, "merging": with_merging(optax.adam(1e-4), deep, rule, key=1)}

    def loss_of(params, batch_stats, x, y):
        logits, updated = net.apply(
            {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, updated["batch_stats"]

    for stage, tx in stages.items():
        opt_state = tx.init(params)

        @jax.jit
        def step(params, batch_stats, opt_state, x, y, tx=tx):
            grad = jax.value_and_grad(loss_of, has_aux=True)
            (loss, batch_stats), grads = grad(params, batch_stats, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), batch_stats, opt_state, loss

        for number in range(STEPS):
            rows = jax.random.randint(jax.random.key(number), (BATCH,), 0, len(data.train))
            x = jnp.asarray(data.train.images[rows], jnp.float32) / 255
            y = jnp.asarray(data.train.labels[rows])
            params, batch_stats, opt_state, loss = step(params, batch_stats, opt_state, x, y)
        print(f"{stage}: loss {loss:.3f}")
    print(merge_report(opt_state, deep))


if __name__ == "__main__":
    main()
