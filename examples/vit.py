"""Merging the attention heads and MLP neurons of a Vision Transformer, an extension of the paper.

Run it with `python -m examples.vit`; it trains on the embedded phantom for a minute on CPU.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from inmerge_jax import (
    MergeRule,
    attention_heads,
    find_kernels,
    merge_report,
    quantile,
    with_merging,
)
from inmerge_jax.data import make_phantom

STEPS, BATCH, DEPTH, WIDTH = 10, 32, 2, 32


class Block(nn.Module):
    """Attention and an MLP, each with its residual connection."""

    @nn.compact
    def __call__(self, x):
        """Maps tokens (n, t, d) to tokens."""
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attn")(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH, name="down")(hidden)


class ViT(nn.Module):
    """Patches of 4 x 4 pixels, two blocks, the mean token."""

    classes: int

    @nn.compact
    def __call__(self, x):
        """Maps images (n, h, w, c) to logits (n, classes)."""
        x = nn.Conv(WIDTH, (4, 4), (4, 4), name="patches")(x)
        x = x.reshape(len(x), -1, WIDTH)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], WIDTH))
        for number in range(DEPTH):
            x = Block(name=f"block{number}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean(1))


def units(net, params, images):
    """The heads of every block, and the neurons of its MLP's first layer."""

    def forward(params, x):
        return net.apply({"params": params}, x)

    found = []
    for number in range(DEPTH):
        names = {
            part: f"block{number}/attn/{part}/kernel" for part in ("query", "key", "value", "out")
        }
        found += attention_heads(params, f"block{number} heads", **names)
    dense = find_kernels(forward, params, images, ops=("dense",))
    return [*found, *(kernel for kernel in dense if kernel.name.endswith("up/kernel"))]


def main() -> None:
    """Trains both stages and prints what merged."""
    data = make_phantom(size=16, train=256, val=1, test=1)
    net = ViT(data.num_classes)
    images = data.train.images[:BATCH].astype("float32") / 255
    params = net.init(jax.random.key(0), images)["params"]
    merged = units(net, params, images)
    rule = MergeRule(threshold=quantile(0.5), partner="nearest")
    stages = {
        "backbone": optax.adam(1e-3),
        "merging": with_merging(optax.adam(1e-4), merged, rule, 1),
    }

    def loss_of(params, x, y):
        logits = net.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    for stage, tx in stages.items():
        opt_state = tx.init(params)

        @jax.jit
        def step(params, opt_state, x, y, tx=tx):
            loss, grads = jax.value_and_grad(loss_of)(params, x, y)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        for number in range(STEPS):
            rows = jax.random.randint(jax.random.key(number), (BATCH,), 0, len(data.train))
            x = jnp.asarray(data.train.images[rows], jnp.float32) / 255
            y = jnp.asarray(data.train.labels[rows])
            params, opt_state, loss = step(params, opt_state, x, y)
        print(f"{stage}: loss {loss:.3f}")
    print(merge_report(opt_state, merged))


if __name__ == "__main__":
    main()
