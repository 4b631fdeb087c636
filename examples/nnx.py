"""Merging in a Flax NNX loop: a backbone, then a second stage that merges.

Run it with `python -m examples.nnx`; it trains on the embedded phantom for a minute on CPU.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from inmerge_jax import MergeRule, deep_kernels, find_kernels, merge_report, with_merging
from inmerge_jax.data import make_phantom

STEPS, BATCH = 10, 32


class Net(nnx.Module):
    """Four convolutions with batch normalisation."""

    def __init__(self, inputs, classes, rngs):
        convs, norms = [], []
        for channels in (16, 16, 32, 32):
            strides = 2 if channels == 32 else 1
            convs.append(nnx.Conv(inputs, channels, (3, 3), strides, rngs=rngs))
            norms.append(nnx.BatchNorm(channels, rngs=rngs))
            inputs = channels
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.head = nnx.Linear(inputs, classes, rngs=rngs)

    def __call__(self, x):
        """Maps images (n, h, w, c) to logits (n, classes)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def main() -> None:
    """Trains both stages and prints what merged."""
    data = make_phantom(size=16, train=256, val=1, test=1)
    model = Net(data.channels, data.num_classes, nnx.Rngs(0))
    images = data.train.images[:BATCH].astype("float32") / 255

    # Split inside a function of the parameters alone, in evaluation mode: batch statistics that are
    # closed over cannot be updated while they are traced.
    graph, params, rest = nnx.split(nnx.view(model, use_running_average=True), nnx.Param, ...)

    def forward(params, x):
        return nnx.merge(graph, params, rest)(x)

    deep = deep_kernels(find_kernels(forward, params, images), skip=2)
    rule = MergeRule(threshold=0.0, partner="nearest")
    stages = {
        "backbone": optax.adam(1e-3),
        "merging": with_merging(optax.adam(1e-4), deep, rule, 1),
    }

    def loss_of(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    def step(model, optimizer, x, y):
        loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
        optimizer.update(model, grads)
        return loss

    for stage, tx in stages.items():
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for number in range(STEPS):
            rows = jax.random.randint(jax.random.key(number), (BATCH,), 0, len(data.train))
            x = jnp.asarray(data.train.images[rows], jnp.float32) / 255
            loss = step(model, optimizer, x, jnp.asarray(data.train.labels[rows]))
        print(f"{stage}: loss {loss:.3f}")
    print(merge_report(optimizer.opt_state, deep))


if __name__ == "__main__":
    main()
