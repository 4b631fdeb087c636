"""One network, twelve convolutions, in four libraries; `build()` gives (forward, params, input).

A stem, ten 3x3 convolutions of which the fifth is depthwise, and a 1x1 to 6 channels. Twelve, so
that alphabetical order (conv_10 before conv_2) is not forward order.
"""

import jax
import jax.numpy as jnp

WIDTH, LAST, COUNT, DEPTHWISE = 4, 6, 12, 5


def layers():
    """(kernel size, output channels, groups) of each convolution."""
    for i in range(COUNT):
        if i == COUNT - 1:
            yield (1, 1), LAST, 1
        else:
            yield (3, 3), WIDTH, WIDTH if i == DEPTHWISE else 1


def linen():
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for size, channels, groups in layers():
                x = nn.relu(nn.Conv(channels, size, feature_group_count=groups)(x))
            return nn.Dense(3)(x.mean((1, 2)))

    x = jnp.ones((2, 8, 8, 3))
    net = Net()
    params = net.init(jax.random.key(0), x)["params"]
    return lambda params, x: net.apply({"params": params}, x), params, x


def nnx_model():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            inputs, convs = 3, []
            for size, channels, groups in layers():
                convs.append(
                    nnx.Conv(inputs, channels, size, feature_group_count=groups, rngs=rngs)
                )
                inputs = channels
            self.convs = nnx.List(convs)
            self.head = nnx.Linear(LAST, 3, rngs=rngs)

        def __call__(self, x):
            for conv in self.convs:
                x = nnx.relu(conv(x))
            return self.head(x.mean((1, 2)))

    return Net(nnx.Rngs(0))


def nnx():
    from flax import nnx

    graph, params, rest = nnx.split(nnx_model(), nnx.Param, ...)
    return lambda params, x: nnx.merge(graph, params, rest)(x), params, jnp.ones((2, 8, 8, 3))


def equinox():
    import equinox as eqx

    class Net(eqx.Module):
        convs: list
        head: eqx.nn.Linear

        def __init__(self, key):
            inputs, self.convs = 3, []
            for i, (size, channels, groups) in enumerate(layers()):
                self.convs.append(
                    eqx.nn.Conv2d(
                        inputs, channels, size, padding="SAME", groups=groups,
                        key=jax.random.fold_in(key, i),
                    )
                )  # fmt: skip
                inputs = channels
            self.head = eqx.nn.Linear(LAST, 3, key=key)

        def __call__(self, x):
            for conv in self.convs:
                x = jax.nn.relu(conv(x))
            return self.head(x.mean((1, 2)))

    params, static = eqx.partition(Net(jax.random.key(0)), eqx.is_array)

    def forward(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    return forward, params, jnp.ones((2, 3, 8, 8))


def haiku():
    import haiku as hk

    def net(x):
        for size, channels, groups in layers():
            x = jax.nn.relu(hk.Conv2D(channels, size, feature_group_count=groups)(x))
        return hk.Linear(3)(x.mean((1, 2)))

    x = jnp.ones((2, 8, 8, 3))
    transformed = hk.without_apply_rng(hk.transform(net))
    return transformed.apply, transformed.init(jax.random.key(0), x), x
