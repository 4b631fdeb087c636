import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inmerge_jax import (
    MergeRule,
    deep_kernels,
    find_kernels,
    in_model_merging,
    merge_kernels,
    merge_report,
    quantile,
    trace_kernels,
    with_merging,
)
from tests.core import networks
from tests.long import LONG, long_unless

STEPS = 5
RULE = MergeRule(probability=0.6, threshold=-0.2, alpha=0.7)
KEY = jax.random.key(11)
IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


@pytest.fixture(autouse=True)
def optax_promotes(strict):
    """Adam and MultiSteps themselves rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def forward(params, x):
    x = x.astype(params["bias"].dtype)
    for name in ("conv_1", "conv_2"):
        x = jax.lax.conv_general_dilated(
            x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.tanh(x)
    return jnp.mean(x, (1, 2)) + params["bias"][None]


def initial(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "bias": jnp.zeros(8, dtype),
        "conv_1": jax.random.normal(keys[0], (3, 3, 3, 8), dtype),
        "conv_2": jax.random.normal(keys[1], (3, 3, 8, 8), dtype),
    }


def loss(params, x):
    return jnp.mean(forward(params, x) ** 2).astype(jnp.float32)


KERNELS = find_kernels(forward, initial(), IMAGES)


def train(tx, params, steps=STEPS):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, IMAGES), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def train_merging_first(tx, params, rule_at=lambda n: RULE, steps=STEPS):
    """Merges before each forward pass; the pass after update n draws as the n-th merge does."""

    def merge(params, n):
        return merge_kernels(params, jax.random.fold_in(KEY, n), KERNELS, rule_at(n))[0]

    @jax.jit
    def step(params, state, n):
        params = jax.lax.cond(n > 0, lambda: merge(params, n - 1), lambda: params)
        updates, state = tx.update(jax.grad(loss)(params, IMAGES), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for n in range(steps):
        params, state = step(params, state, n)
    return jax.jit(merge)(params, steps - 1)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(1e-2),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
    "weight decay": lambda: optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1)),
}


@pytest.mark.parametrize("optimizer", long_unless(lambda name: name == "sgd", OPTIMIZERS))
def test_equals_merging_before_every_forward_pass(optimizer):
    tx = OPTIMIZERS[optimizer]()
    chained = optax.chain(OPTIMIZERS[optimizer](), in_model_merging(KERNELS, RULE, KEY))
    params, state = train(chained, initial())
    assert_close(params, train_merging_first(tx, initial()), rtol=2e-5, atol=2e-6)
    plain, _ = train(tx, initial())
    assert np.abs(params["conv_2"] - plain["conv_2"]).max() > 0.01  # it did something
    assert int(state[-1].count) == STEPS


def test_the_momentum_is_not_merged():
    """One step from the same state: the optimizer's own state is as without merging."""
    sgd = optax.sgd(0.1, momentum=0.9)
    _, state = train(optax.chain(sgd, in_model_merging(KERNELS, RULE, KEY)), initial(), steps=1)
    _, plain = train(sgd, initial(), steps=1)
    jax.tree.map(np.testing.assert_array_equal, state[0], plain)


def test_updates_of_unmerged_kernels_pass_bit_for_bit():
    tx = in_model_merging(KERNELS, MergeRule(0.3, -1.0, 0.5), KEY)
    params = initial()
    updates = jax.tree.map(lambda p: 0.01 * p, params)
    out, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_array_equal(out["bias"], updates["bias"])
    same = (out["conv_2"] == updates["conv_2"]).all((0, 1, 2))
    moved = optax.apply_updates(params, updates)
    merged, _ = merge_kernels(moved, jax.random.fold_in(KEY, 0), KERNELS, MergeRule(0.3, -1.0, 0.5))
    kept = (merged["conv_2"] == moved["conv_2"]).all((0, 1, 2))
    np.testing.assert_array_equal(same, kept)
    assert 0 < kept.sum() < 8


def test_multi_steps_merges_once_per_accumulated_update():
    inner = optax.chain(optax.sgd(0.1), in_model_merging(KERNELS, RULE, KEY))
    accumulated = optax.MultiSteps(inner, every_k_schedule=3).gradient_transformation()
    params, state = train(accumulated, initial(), steps=7)
    expected, _ = train(inner, initial(), steps=2)  # the same gradient three times is its mean
    assert_close(params, expected, rtol=2e-5, atol=2e-6)
    assert int(state.inner_opt_state[-1].count) == 2


@LONG
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 2)])
def test_bfloat16_parameters(wrap):
    tx = wrap(optax.chain(optax.sgd(0.1), in_model_merging(KERNELS, RULE, KEY)))
    params, _ = train(tx, initial(jnp.bfloat16), steps=2)
    plain, _ = train(wrap(optax.sgd(0.1)), initial(jnp.bfloat16), steps=2)
    assert params["conv_2"].dtype == jnp.bfloat16
    assert (params["conv_2"] != plain["conv_2"]).any()


def test_hyperparameters_can_be_injected():
    """The rule's numbers live in the state and change between steps without a new trace."""

    def merging(probability, threshold, alpha):
        return in_model_merging(KERNELS, MergeRule(probability, threshold, alpha), KEY)

    tx = optax.inject_hyperparams(merging)(probability=1.0, threshold=-1.0, alpha=0.5)
    params = initial()
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    traces = []

    @jax.jit
    def update(state):
        traces.append(state)
        return tx.update(zeros, state, params)

    changed, state = update(state)
    assert (changed["conv_2"] != 0).any()
    state.hyperparams["probability"] = jnp.float32(0.0)
    unchanged, _ = update(state)
    jax.tree.map(np.testing.assert_array_equal, unchanged, zeros)
    assert len(traces) == 1


@pytest.mark.parametrize("key", [11, pytest.param(KEY, marks=LONG)])
def test_the_transformation_itself_can_be_injected(key):
    """A seed then becomes an array, a key stays one."""
    injected = optax.inject_hyperparams(in_model_merging)(KERNELS, RULE, key)
    found, _ = train(optax.chain(optax.sgd(0.1), injected), initial(), steps=2)
    expected, _ = train(with_merging(optax.sgd(0.1), KERNELS, RULE, key), initial(), steps=2)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@LONG
def test_a_schedule_of_rules():
    def rule_at(step):
        return MergeRule(jnp.where(step < 2, 0.0, 1.0), -1.0, 0.5)

    tx = optax.chain(optax.sgd(0.1), in_model_merging(KERNELS, rule_at, KEY))
    plain = optax.sgd(0.1)
    before, after = train(tx, initial(), steps=2)[0], train(tx, initial(), steps=3)[0]
    # Two programs, whose gradients may differ by rounding.
    assert_close(before, train(plain, initial(), steps=2)[0], rtol=1e-6, atol=1e-7)
    assert np.abs(after["conv_2"] - train(plain, initial(), steps=3)[0]["conv_2"]).max() > 0.01
    assert_close(after, train_merging_first(plain, initial(), rule_at, 3), rtol=2e-5, atol=2e-6)


def test_a_state_of_other_kernels_is_refused():
    params = initial()
    state = in_model_merging(KERNELS, RULE, KEY).init(params)
    fewer = in_model_merging(KERNELS[1:], RULE, KEY)
    with pytest.raises(ValueError, match=rf"state is of {len(KERNELS)} layers, and kernels has"):
        fewer.update(jax.tree.map(jnp.zeros_like, params), state, params)


def test_needs_the_parameters():
    tx = in_model_merging(KERNELS, RULE, KEY)
    params = initial()
    with pytest.raises(ValueError, match=r"call tx.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))


def test_state_is_replicated_under_pmap():
    tx = optax.chain(optax.sgd(0.1), in_model_merging(KERNELS, RULE, KEY))
    n = jax.local_device_count()

    def step(params, state, x):
        grads = jax.lax.pmean(jax.grad(loss)(params, x), "batch")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = initial(), tx.init(initial())
    params, state = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), (params, state))
    images = jax.random.normal(jax.random.key(5), (n, 2, 8, 8, 3))
    run = jax.pmap(step, axis_name="batch")
    for _ in range(3):
        params, state = run(params, state, images)
    for leaf in jax.tree.leaves(params):
        assert len({np.asarray(replica).tobytes() for replica in leaf}) == 1


def test_the_state_counts_every_merge_so_far():
    tx = optax.chain(optax.sgd(0.1), in_model_merging(KERNELS, RULE, KEY))

    @jax.jit
    def step(params, state, n):
        gradient = jax.grad(loss)(params, IMAGES)
        updates, state = tx.update(gradient, state, params)
        moved = jax.tree.map(lambda weight, g: weight - 0.1 * g, params, gradient)
        stats = merge_kernels(moved, jax.random.fold_in(KEY, n), KERNELS, RULE)[1]
        return optax.apply_updates(params, updates), state, stats

    params, state = initial(), tx.init(initial())
    stats = []
    for n in range(3):
        params, state, merged = step(params, state, n)
        stats.append(merged)
    total = state[-1].stats
    np.testing.assert_array_equal(total.kernels, [8, 8])
    for name in ("selected", "merged"):
        expected = sum(np.asarray(getattr(one, name)) for one in stats)
        np.testing.assert_array_equal(getattr(total, name), expected)
    assert total.merged.min() > 3
    mean = sum(np.asarray(one.similarity) * np.asarray(one.merged) for one in stats)
    np.testing.assert_allclose(total.similarity, mean / np.asarray(total.merged), rtol=1e-5)


def test_the_callers_key_outlives_a_donated_state():
    key = jax.random.key(4)
    tx = in_model_merging(KERNELS, RULE, key)
    update = jax.jit(tx.update, donate_argnums=1)
    params = initial()
    zeros = jax.tree.map(jnp.zeros_like, params)
    first = tx.init(params)
    jax.block_until_ready(update(zeros, first, params))
    assert first.key.is_deleted()
    assert jax.random.key_data(key).shape == (2,)
    update(zeros, tx.init(params), params)


@pytest.mark.parametrize("impl", long_unless(lambda impl: impl == "rbg", ["threefry2x32", "rbg"]))
def test_the_state_is_plain_arrays_that_a_checkpoint_keeps(tmp_path, impl):
    from flax import serialization

    from inmerge_jax.training.checkpointing import restore_checkpoint, save_checkpoint

    tx = in_model_merging(KERNELS, RULE, jax.random.key(0, impl=impl))
    params = initial()
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zeros, tx.init(params), params)
    expected, _ = tx.update(zeros, state, params)
    path = save_checkpoint(tmp_path, 1, state, {})
    restored = (
        restore_checkpoint(path, tx.init(params))[0],
        serialization.from_bytes(tx.init(params), serialization.to_bytes(state)),
    )
    for state in restored:
        found, _ = tx.update(zeros, state, params)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


# The programs in examples/, which the suite runs, have them in each library.
@LONG
@pytest.mark.parametrize("library", ["linen", "nnx", "equinox", "haiku"])
def test_the_two_lines_in_four_libraries(library):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own deprecations are not ours
        forward, params, x = getattr(networks, library)()
        deep = deep_kernels(find_kernels(forward, params, x), skip=10)
        rule = MergeRule(1.0, -1.0, 0.5)
        tx = optax.chain(optax.sgd(0.1), in_model_merging(deep, rule, KEY))
        grads = jax.grad(lambda params: jnp.sum(forward(params, x)))(params)
        updates, state = tx.update(grads, tx.init(params), params)
        found = optax.apply_updates(params, updates)
        plain, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(params), params)
        moved = optax.apply_updates(params, plain)
        expected, _ = merge_kernels(moved, jax.random.fold_in(KEY, 0), deep, rule)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state[-1].stats.merged, [networks.WIDTH, networks.LAST])


@LONG
def test_with_an_optimizer_of_nnx():
    from flax import nnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = networks.nnx_model()
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        x = jnp.ones((2, 8, 8, 3))
        kernels = find_kernels(lambda p, x: nnx.merge(graph, p, rest)(x), params, x)
        rule = MergeRule(1.0, -1.0, 0.5)
        deep = deep_kernels(kernels, skip=10)
        optimizer = nnx.Optimizer(model, in_model_merging(deep, rule, KEY), wrt=nnx.Param)
        before = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        merged, _ = merge_kernels(params, jax.random.fold_in(KEY, 0), deep, rule)
        expected = jax.device_get(nnx.to_pure_dict(merged))
        optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
        after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_close(after, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(before["convs"][10]["kernel"] - after["convs"][10]["kernel"]).max() > 0.01


# ---- optax conformance


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("tx", tx)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, {"bias": False, "conv_1": True, "conv_2": True}),
    "partition": lambda tx: optax.partition(
        {"train": tx, "freeze": optax.set_to_zero()},
        {"bias": "freeze", "conv_1": "train", "conv_2": "train"},
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "with_extra_args_support": optax.with_extra_args_support,
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step: step >= 0),
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, learning_rate=0.1),
}


QUICK = ("MultiSteps", "masked")


@pytest.mark.parametrize("wrapper", long_unless(QUICK, WRAPPERS))
def test_every_wrapper_merges_as_alone(wrapper):
    tx = WRAPPERS[wrapper](with_merging(optax.sgd(0.1), KERNELS, RULE, KEY))
    params, state = train(tx, initial(), steps=3)
    report = merge_report(state, KERNELS)
    assert sum(row.merged for row in report) > 0
    if wrapper != "schedule_free":
        expected, _ = train(with_merging(optax.sgd(0.1), KERNELS, RULE, KEY), initial(), steps=3)
        for name in ("conv_1", "conv_2"):
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-4, atol=1e-4)


def test_with_merging_is_the_chain_in_the_right_order():
    found, _ = train(with_merging(optax.adam(1e-2), KERNELS, RULE, KEY), initial())
    chained = optax.chain(optax.adam(1e-2), in_model_merging(KERNELS, RULE, KEY))
    expected, _ = train(chained, initial())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_extra_arguments_reach_the_optimizer_and_are_ignored_here():
    tx = with_merging(optax.sgd(0.1), KERNELS, RULE, KEY)
    params = initial()
    updates, _ = tx.update(params, tx.init(params), params, value=1.0, other="ignored")
    assert updates.keys() == params.keys()


def test_kernels_may_be_a_function_of_the_parameters():
    def chosen(params):
        return find_kernels(forward, params, IMAGES)

    found, _ = train(with_merging(optax.sgd(0.1), chosen, RULE, KEY), initial())
    expected, _ = train(with_merging(optax.sgd(0.1), KERNELS, RULE, KEY), initial())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_seed_is_a_key():
    found, _ = train(with_merging(optax.sgd(0.1), KERNELS, RULE, 11), initial())
    expected, _ = train(with_merging(optax.sgd(0.1), KERNELS, RULE, KEY), initial())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "field",
    long_unless(["threshold"], ["probability", "threshold", "quantile", "alpha"]),
)
def test_every_number_may_be_a_schedule(field):
    """At a value that merges nothing for two updates, and then at one that does."""
    nothing, something = {
        "probability": (0.0, 1.0),
        "threshold": (1.0, -1.0),
        "quantile": (1.0, 0.0),
        "alpha": (1.0, 0.5),
    }[field]
    schedule = optax.piecewise_constant_schedule(nothing, {})

    def late(count):
        return jnp.where(count < 2, schedule(count), something)

    fields = {"probability": 1.0, "threshold": -1.0, "alpha": 0.5}
    fields["threshold" if field == "quantile" else field] = (
        quantile(late) if field == "quantile" else late
    )
    tx = with_merging(optax.sgd(0.1), KERNELS, MergeRule(**fields), KEY)
    plain, _ = train(optax.sgd(0.1), initial(), steps=2)
    before, _ = train(tx, initial(), steps=2)
    assert_close(before, plain, rtol=1e-6, atol=1e-7)
    after, _ = train(tx, initial(), steps=3)
    plain, _ = train(optax.sgd(0.1), initial(), steps=3)
    assert np.abs(after["conv_2"] - plain["conv_2"]).max() > 1e-3


def test_bad_input_is_refused_before_the_first_update():
    with pytest.raises(ValueError, match="kernels is empty"):
        in_model_merging((), RULE, KEY)
    with pytest.raises(ValueError, match="probability is 2"):
        in_model_merging(KERNELS, MergeRule(2.0), KEY)
    tx = with_merging(optax.sgd(0.1), KERNELS, RULE, KEY)
    with pytest.raises(ValueError, match=r"'conv_1' is not in params.*optax\.masked"):
        optax.masked(tx, {"bias": True, "conv_1": False, "conv_2": True}).init(initial())
    with pytest.raises(ValueError, match="'conv_1' was found with shape"):
        tx.init(initial() | {"conv_1": jnp.ones((3, 3, 3, 4))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(implementation="gpu"), "implementation is 'gpu'; choose one of auto"),
        (dict(rule=0.3), "rule is 0.3; give a MergeRule"),
        (dict(rule=None), "rule is None; give a MergeRule"),
        (dict(rule=MergeRule), "rule is the class MergeRule; give a rule"),
        (dict(key=None), "key is None; give one PRNG key"),
        (dict(key=0.5), "key is 0.5; give one PRNG key"),
        (dict(key=RULE), "key is MergeRule"),
        (dict(key=jax.random.split(KEY)), r"key is of shape \(2,\) and dtype key<fry>"),
        (dict(key=jnp.zeros((3, 2), jnp.uint32)), r"key is of shape \(3, 2\) and dtype uint32"),
        (dict(kernels=KERNELS[0]), "kernels must be a sequence of Kernel, .* it is Kernel"),
        (dict(kernels=trace_kernels(forward, initial(), IMAGES)), r"trace_kernels\(...\).kernels"),
    ],
)
def test_arguments_of_another_kind_are_refused_at_once(change, message):
    with pytest.raises(ValueError, match=message):
        in_model_merging(**{"kernels": KERNELS, "rule": RULE, "key": KEY} | change)


def test_what_a_rule_function_returns_is_checked():
    tx = in_model_merging(KERNELS, lambda count: 0.3, KEY)
    with pytest.raises(ValueError, match=r"rule is 0\.3; give a MergeRule"):
        tx.update(initial(), tx.init(initial()), initial())


def test_a_schedule_of_thresholds_gives_numbers():
    tx = in_model_merging(KERNELS, MergeRule(threshold=quantile), KEY)
    with pytest.raises(ValueError, match=r"give quantile\(share\), where share may be a schedule"):
        tx.update(initial(), tx.init(initial()), initial())


def test_counts_stop_at_the_largest_number():
    tx = in_model_merging(KERNELS, MergeRule(1.0, -1.0), KEY)
    state = tx.init(initial())
    most = jnp.full(2, np.iinfo(np.int32).max - 3, jnp.int32)
    state = state._replace(stats=state.stats._replace(selected=most, merged=most))
    _, state = tx.update(initial(), state, initial())
    assert state.stats.selected.tolist() == state.stats.merged.tolist() == [2**31 - 1] * 2


def test_a_missing_gradient_is_named():
    tx = in_model_merging(KERNELS, RULE, KEY)
    with pytest.raises(ValueError, match="kernel 'conv_2' is None in updates; differentiate by it"):
        tx.update(initial() | {"conv_2": None}, tx.init(initial()), initial())


def test_specifications_of_the_state_can_be_derived():
    """`optax.tree_map_params` initializes the state for a placeholder of the parameters."""
    tx = with_merging(optax.adam(1e-2), KERNELS, RULE, KEY)
    state = tx.init(initial())
    doubled = optax.tree_map_params(tx, lambda leaf: leaf + 1, state)
    chosen = with_merging(optax.adam(1e-3), lambda params: KERNELS, RULE, KEY)
    jax.tree.map(
        np.testing.assert_array_equal,
        optax.tree_map_params(chosen, lambda leaf: leaf + 1, state),
        doubled,
    )
    np.testing.assert_array_equal(doubled[0][0].mu["conv_1"], 1)
    jax.tree.map(np.testing.assert_array_equal, doubled[1].stats, state[1].stats)


def test_float32_updates_merge_bfloat16_parameters_exactly():
    params = initial(jnp.bfloat16)
    rule = MergeRule(1.0, -1.0, 0.5)
    grads = jax.tree.map(lambda p: 0.05 * jnp.cos(p.astype(jnp.float32)), params)
    tx = in_model_merging(KERNELS, rule, KEY)
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(params, grads)
    expected, _ = merge_kernels(moved, jax.random.fold_in(KEY, 0), KERNELS, rule)
    found = optax.apply_updates(params, updates)
    for name in ("conv_1", "conv_2"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_other_leaves_may_be_none_or_integers():
    """As of Equinox: gradients None where the model has no floating array; integer buffers."""
    params = initial() | {"buffer": jnp.arange(3), "nothing": None}
    grads = {**initial(), "buffer": None, "nothing": None}
    tx = in_model_merging(KERNELS, MergeRule(1.0, -1.0, 0.5), KEY)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["buffer"] is None and updates["nothing"] is None
    expected, _ = tx.update(initial(), tx.init(initial()), initial())
    np.testing.assert_array_equal(updates["conv_2"], expected["conv_2"])


@LONG
def test_an_nnx_module_and_its_state_are_interchangeable():
    from flax import nnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = networks.nnx_model()
        state = nnx.state(model, nnx.Param)
        x = jnp.ones((2, 8, 8, 3))
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        kernels = find_kernels(lambda p, x: nnx.merge(graph, p, rest)(x), state, x)
        pure = nnx.to_pure_dict(state)
        merge = jax.jit(lambda tree: merge_kernels(tree, KEY, kernels[:2], MergeRule(1.0, -1.0)))
        for tree in (state, pure):
            merged, stats = merge(tree)
            assert stats.merged.sum() > 0
            assert jax.tree.structure(merged) == jax.tree.structure(tree)
        assert all(not kernel.name.endswith("value") for kernel in kernels)


def test_a_report_shows_what_merged_and_warns_where_nothing_did():
    _, state = train(with_merging(optax.sgd(0.1), KERNELS, RULE, KEY), initial())
    report = merge_report(state, KERNELS)
    assert [row.name for row in report] == ["conv_1", "conv_2"]
    assert sum(row.merged for row in report) > 0
    lines = str(report).splitlines()
    assert lines[0].split()[:4] == ["layer", "units", "selected", "merged"] and len(lines) == 3
    replicated = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    assert merge_report(replicated, KERNELS) == report

    never = MergeRule(1.0, threshold=1.0)
    _, state = train(with_merging(optax.sgd(0.1), KERNELS, never, KEY), initial())
    with pytest.warns(
        UserWarning, match="nothing has merged in 5 updates.* 80 units were selected"
    ):
        merge_report(state, KERNELS)
    _, state = train(with_merging(optax.sgd(0.1), KERNELS, MergeRule(0.0), KEY), initial())
    with pytest.warns(UserWarning, match="no unit was selected; choose a higher probability"):
        merge_report(state, KERNELS)
    depthwise = [dataclasses.replace(kernel, groups=8) for kernel in KERNELS]
    _, state = train(with_merging(optax.sgd(0.1), depthwise, RULE, KEY), initial())
    with pytest.warns(UserWarning, match="no layer has two units .* depthwise"):
        merge_report(state, depthwise)
    # Before the first update there is nothing to say.
    merge_report(with_merging(optax.sgd(0.1), KERNELS, never, KEY).init(initial()), KERNELS)
    with pytest.raises(ValueError, match="holds 0 states of in_model_merging"):
        merge_report(optax.sgd(0.1).init(initial()), KERNELS)
    with pytest.raises(
        ValueError, match=r"its layers have \[8, 8\] units, those of kernels have \[8\]"
    ):
        merge_report(state, KERNELS[:1])
    with pytest.raises(ValueError, match=r"kernels is a function; give .* kernels\(params\)"):
        merge_report(state, lambda params: KERNELS)


def test_how_far_bfloat16_updates_are_from_explicit_merging():
    """The share of a merged layer's entries that differ, by rounding; the docstring has 17 %."""
    params, rule = initial(jnp.bfloat16), MergeRule(1.0, -1.0, 0.7)
    updates = jax.tree.map(lambda p: (0.05 * jnp.cos(p)).astype(p.dtype), params)
    tx = in_model_merging(KERNELS, rule, KEY)
    changed, _ = tx.update(updates, tx.init(params), params)
    found = optax.apply_updates(params, changed)
    moved = optax.apply_updates(params, updates)
    expected, _ = merge_kernels(moved, jax.random.fold_in(KEY, 0), KERNELS, rule)
    found, expected = (np.asarray(x["conv_2"], np.float32) for x in (found, expected))
    share = (found != expected).mean()
    assert 0.1 < share < 0.175
    np.testing.assert_allclose(found, expected, rtol=2**-6, atol=2**-9)


def test_what_is_no_optimizer_is_named():
    with pytest.raises(ValueError, match=r"tx is <function adam.*give a transformation, such as"):
        with_merging(optax.adam, KERNELS, RULE, KEY)


@pytest.mark.parametrize("key", [2**70, np.zeros(3, np.uint32), np.zeros(4, np.uint32)])
def test_a_key_of_another_kind_is_named(key):
    with pytest.raises(ValueError, match="key is .*; give one PRNG key"):
        with_merging(optax.sgd(0.1), KERNELS, RULE, key)
