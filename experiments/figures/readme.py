"""The figure of README.md: kernel similarities of one layer before and after merging.

`python -m experiments.figures.readme` trains a small network on the embedded phantom, about 20
seconds on two CPU cores, and writes docs/figures/similarity.png. Another processor rounds
differently and gives another picture of the same kind.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from inmerge_jax import MergeRule, deep_kernels, find_kernels, with_merging
from inmerge_jax.data import Split, make_phantom

OUTPUT = Path(__file__).parents[2] / "docs" / "figures" / "similarity.png"
LAYER = "Conv_3"
EQUATION = (
    r"$K_i \leftarrow \alpha\, K_i + (1 - \alpha)\, K_j$   if   "
    r"$\cos(K_i, K_j) > \tau$,   with probability $p$"
)


class Net(nn.Module):
    """Four convolutions."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (n, h, w, c) to logits (n, classes)."""
        for channels, stride in ((16, 1), (32, 2), (32, 2), (64, 2)):
            x = nn.relu(nn.Conv(channels, (3, 3), stride)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


def train(
    net: Net,
    params: optax.Params,
    tx: optax.GradientTransformation,
    data: Split,
    epochs: int,
    batch: int = 32,
) -> optax.Params:
    """The parameters after some epochs of training."""

    def loss(params: optax.Params, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = net.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(
        params: optax.Params, opt_state: optax.OptState, x: jax.Array, y: jax.Array
    ) -> tuple[optax.Params, optax.OptState]:
        updates, opt_state = tx.update(jax.grad(loss)(params, x, y), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(data))
        for rows in order.reshape(-1, batch):
            x = jnp.asarray(data.images[rows], jnp.float32) / 255
            params, opt_state = step(params, opt_state, x, jnp.asarray(data.labels[rows]))
    return params


def cosines(params: optax.Params) -> np.ndarray:
    """The cosine similarities of the layer's kernels, float32 (kernels, kernels)."""
    weight = np.asarray(params[LAYER]["kernel"])
    columns = weight.reshape(-1, weight.shape[-1])
    columns = columns / np.linalg.norm(columns, axis=0)
    return columns.T @ columns


def draw(before: np.ndarray, after: np.ndarray) -> Figure:
    """Both matrices with one order of kernels, in which similar ones are neighbours."""
    order = leaves_list(linkage(after, "average"))
    figure = Figure(figsize=(7.2, 3.9), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, matrix, title in zip(axes, (before, after), ("before", "after"), strict=True):
        image = ax.imshow(matrix[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_title(f"{title} the merging stage", fontsize=10)
        ax.set_xlabel("kernel")
        ax.set_xticks([0, len(matrix) - 1], ["1", str(len(matrix))])
        ax.set_yticks([])
    axes[0].set_ylabel("kernel")
    figure.colorbar(image, ax=axes, shrink=0.75, label="cosine similarity")
    figure.suptitle(EQUATION, fontsize=12)
    return figure


def main(images: int = 1024, epochs: int = 12, merging_epochs: int = 4) -> Figure:
    """Trains both stages and draws the last convolution's kernels."""
    data = make_phantom(size=28, train=images, val=1, test=1, difficulty=0.5)
    net = Net(data.num_classes)
    x = jnp.zeros((1, 28, 28, data.channels))
    params = net.init(jax.random.key(0), x)["params"]
    backbone = train(net, params, optax.adam(3e-3), data.train, epochs)
    kernels = find_kernels(lambda params, x: net.apply({"params": params}, x), params, x)
    tx = with_merging(optax.adam(1e-3), deep_kernels(kernels, skip=2), MergeRule(), key=1)
    merged = train(net, backbone, tx, data.train, merging_epochs)
    return draw(cosines(backbone), cosines(merged))


if __name__ == "__main__":
    with matplotlib.rc_context({"font.size": 9}):
        OUTPUT.parent.mkdir(parents=True, exist_ok=True)
        main().savefig(OUTPUT, metadata={"Software": None})
