"""Merging under `jax.jit` with sharded parameters (FSDP): a backbone, then a stage that merges.

Every device holds a part of each weight and of each batch. Run it with `python -m examples.fsdp`;
for several devices on a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import jax
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from inmerge_jax import MergeRule, deep_kernels, find_kernels, merge_report, with_merging
from inmerge_jax.data import make_phantom

STEPS, DEVICE_BATCH = 10, 8


class Net(nn.Module):
    """Four convolutions with batch normalisation over the batch of all devices."""

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
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    by_example = NamedSharding(mesh, PartitionSpec("data"))

    def sharding_of(weight):
        """Divides the first axis that divides evenly; a weight without one is replicated."""
        axes = [axis for axis, size in enumerate(weight.shape) if size % devices == 0]
        spec = ("data" if axis in axes[:1] else None for axis in range(weight.ndim))
        return NamedSharding(mesh, PartitionSpec(*spec))

    data = make_phantom(size=16, train=256, val=1, test=1)
    images = data.train.images.astype("float32") / 255
    net = Net(data.num_classes)
    variables = net.init(jax.random.key(0), images[:1], train=False)
    shardings = jax.tree.map(sharding_of, variables["params"])
    params = jax.device_put(variables["params"], shardings)
    batch_stats = jax.device_put(variables["batch_stats"], replicated)

    def apply(params, batch_stats, x, train):
        # The gather of FSDP; its transpose scatters the gradients.
        params = jax.tree.map(lambda weight: jax.reshard(weight, replicated), params)
        variables = {"params": params, "batch_stats": batch_stats}
        return net.apply(variables, x, train, mutable=["batch_stats"])

    x = jax.device_put(images[: DEVICE_BATCH * devices], by_example)
    deep = deep_kernels(find_kernels(apply, params, batch_stats, x, train=True), skip=2)
    rule = MergeRule(threshold=0.0, partner="nearest")
    stages = {
        "backbone": optax.adam(1e-3),
        "merging": with_merging(optax.adam(1e-4), deep, rule, key=1),
    }

    def loss_of(params, batch_stats, x, y):
        logits, updated = apply(params, batch_stats, x, train=True)
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
            key = jax.random.key(number)
            rows = jax.random.randint(key, (DEVICE_BATCH * devices,), 0, len(data.train))
            x, y = jax.device_put((images[rows], data.train.labels[rows]), by_example)
            params, batch_stats, opt_state, loss = step(params, batch_stats, opt_state, x, y)
        print(f"{stage}: loss {loss:.3f}")
    assert jax.tree.map(lambda weight: weight.sharding, params) == shardings
    print(merge_report(opt_state, deep))


if __name__ == "__main__":
    main()
