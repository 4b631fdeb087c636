"""The samples of docs/guide.md before "Place in the chain" run, in order.

The later ones, and the page's statements, are tested in tests/core/test_guide.py.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import inmerge_jax

PAGE = Path(__file__).parents[2] / "docs" / "guide.md"


def forward(params, x):
    for weight in params.values():
        x = jax.lax.conv_general_dilated(
            x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return x


def network():
    """Twelve 3x3 convolutions, and a 1x1 convolution between the last two of them."""
    shapes = {f"conv{i:02}": (3, 3, 4, 4) for i in range(13)} | {"conv11": (1, 1, 4, 4)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, sorted(shapes.items()), strict=True)
    }


def test_the_samples_run_in_order(capsys):
    text = PAGE.read_text().partition("## Place in the chain")[0]
    layers, similarity, report, schedule = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {name: getattr(inmerge_jax, name) for name in inmerge_jax.__all__}
    params = network()
    names |= {"optax": optax, "forward": forward, "params": params}
    names |= {"images": jnp.zeros((1, 4, 4, 4)), "tx": optax.sgd(0.0)}

    exec(layers, names)
    assert [kernel.name for kernel in names["kernels"]] == list(params)
    assert [kernel.name for kernel in names["deep"]] == ["conv10", "conv12"]

    exec(similarity, names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "conv10",
        "conv12",
    ]

    exec(schedule, names)
    state = names["tx"].init(params)
    _, state = jax.jit(names["tx"].update)(params, state, params)
    assert state[-1].stats.selected.tolist() == [0, 0], "the schedule begins at probability 0"
    later = state[-1]._replace(count=jnp.int32(1000))
    _, state = jax.jit(names["tx"].update)(params, (*state[:-1], later), params)
    assert sum(state[-1].stats.selected.tolist()) > 0

    names["opt_state"] = state
    with pytest.warns(UserWarning, match="nothing has merged in 1001 updates"):
        exec(report, names)
    assert "conv12" in capsys.readouterr().out
