"""What docs/guide.md states; its samples are run as they stand.

With eight simulated devices, `python -m tests.core.test_guide` prints the table of collectives in
docs/performance.md.
"""

import collections
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import mechanize, sam, schedule_free, schedule_free_eval_params
from optax.transforms import freeze, selective_transform

import inmerge_jax
from inmerge_jax import (
    Kernel,
    MergeRule,
    deep_kernels,
    find_kernels,
    kernel_similarity,
    merge_report,
    recompute_batch_stats,
    tie,
    trace_kernels,
)
from tests.long import LONG

PAGE = Path(__file__).parents[2] / "docs" / "guide.md"
COLLECTIVES = (
    (PAGE.parent / "performance.md")
    .read_text()
    .partition("\n## Collectives of a sharded merge\n")[2]
    .partition("\n## ")[0]
)
KEY = jax.random.key(5)
RULE = MergeRule(probability=1.0, threshold=-1.0, alpha=0.5)
SGD = optax.sgd(0.1)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Outside jit, the reference form is the quickest to compile; other tests hold the others to it.
merge_kernels, with_merging, in_model_merging = (
    functools.partial(function, implementation="reference")
    for function in (
        inmerge_jax.merge_kernels,
        inmerge_jax.with_merging,
        inmerge_jax.in_model_merging,
    )
)


@pytest.fixture(autouse=True)
def jax_as_users_have_it(strict):
    """Optax's wrappers, Flax's layers and the samples rely on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def forward(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


X = normal(1, 4, 8)


def initial():
    return {"first": normal(2, 8, 8), "second": normal(3, 8, 8)}


GRADS = {"first": normal(4, 8, 8), "second": normal(5, 8, 8)}
KERNELS = find_kernels(forward, initial(), X, ops=("dense",))
W = Kernel((jax.tree_util.DictKey("w"),), (8, 8), 1, op="dense")


def merging(tx=SGD, kernels=KERNELS):
    return with_merging(tx, kernels, RULE, KEY)


def merge_alone(kernels=KERNELS):
    return in_model_merging(kernels, RULE, KEY)


def merged(params, number=0, kernels=KERNELS, rule=RULE):
    """The explicit merge that the transformation makes after update `number`."""
    key = jax.random.fold_in(KEY, number)
    return merge_kernels(params, key, kernels, rule)[0]


def updated(tx, params=None, steps=1, grads=GRADS, compiled=False):
    """The parameters and the state after `steps` updates of the same gradients."""
    params = initial() if params is None else params
    state = tx.init(params)
    update = compile_quickly(tx.update) if compiled else tx.update
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def compile_quickly(function):
    """Of conditionals, whose branches would be compiled at every call outside jit."""
    return jax.jit(function, compiler_options=QUICK)


def counts(state):
    """How many merges the state has seen."""
    (state,) = (s for s in jax.tree.leaves(state, is_leaf=is_merging) if is_merging(s))
    return int(state.count)


def is_merging(node):
    return type(node).__name__ == "InModelMergingState"


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


def differ(a, b):
    return bool(jnp.abs(a - b).max() > 1e-2)


def sample(first_line, **names):
    """Runs the sample of the page that begins with this line; returns all names."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(first_line))
    names |= {"jax": jax, "jnp": jnp, "optax": optax}
    names |= {"find_kernels": find_kernels, "deep_kernels": deep_kernels}
    names |= {"with_merging": with_merging, "merge_kernels": merge_kernels}
    names |= {"recompute_batch_stats": recompute_batch_stats}
    exec(block, names)
    return names


# ---- Place in the chain


def test_with_merging_merges_what_the_update_gives():
    params, _ = updated(merging())
    assert_close(params, merged(updated(SGD)[0]))
    jax.tree.map(np.testing.assert_array_equal, params, updated(optax.chain(SGD, merge_alone()))[0])


def test_a_merge_before_the_optimizer_is_taken_for_a_gradient():
    """No error is raised, and the parameters move away from the merged ones."""
    params, _ = updated(optax.chain(merge_alone(), SGD))
    taken = merged(optax.apply_updates(initial(), GRADS))
    assert_close(params, jax.tree.map(lambda p, t: p - 0.1 * (t - p), initial(), taken))
    assert differ(params["first"], updated(merging())[0]["first"])


def test_scaling_after_the_merge_halves_it():
    params, _ = updated(optax.chain(merging(), optax.scale(0.5)))
    right, _ = updated(merging())
    assert_close(params, jax.tree.map(lambda p, r: (p + r) / 2, initial(), right))


# ---- Optax wrappers; chain, named_chain, MultiSteps, apply_if_finite and conditionally_transform
# around with_merging, and inject_hyperparams, are in test_transform.py.


@LONG
def test_with_merging_around_multi_steps_merges_at_each_of_the_steps():
    accumulating = optax.MultiSteps(SGD, 3).gradient_transformation()
    params, state = updated(merging(accumulating), steps=2, compiled=True)
    assert_close(params, merged(merged(initial(), 0), 1))  # no update yet, but two merges
    assert counts(state) == 2
    _, state = updated(
        optax.MultiSteps(merging(), 3).gradient_transformation(), steps=3, compiled=True
    )
    assert counts(state) == 1


def test_a_refused_update_merges_inside_with_merging_alone():
    nan = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    params, _ = updated(optax.apply_if_finite(merging(), 3), grads=nan, compiled=True)
    jax.tree.map(np.testing.assert_array_equal, params, initial())
    params, _ = updated(merging(optax.apply_if_finite(SGD, 3)), grads=nan)
    assert_close(params, merged(initial()))


def test_inject_hyperparams_with_static_args():
    static = ("tx", "kernels", "rule", "key")
    tx = optax.inject_hyperparams(with_merging, static_args=static)(SGD, KERNELS, RULE, KEY)
    assert_close(updated(tx)[0], updated(merging())[0])


def test_inject_hyperparams_around_a_function_of_numbers():
    def merging_of(learning_rate, alpha):
        return with_merging(optax.sgd(learning_rate), KERNELS, MergeRule(1.0, -1.0, alpha), KEY)

    tx = optax.inject_hyperparams(merging_of)(learning_rate=0.1, alpha=0.5)
    assert_close(updated(tx)[0], updated(merging())[0])


def test_conditionally_transform_merges_at_some_updates():
    every_third = optax.conditionally_transform(merge_alone(), lambda step: step % 3 == 2)
    tx = optax.chain(SGD, every_third)
    params, state = updated(tx, steps=3, compiled=True)
    assert_close(params, merged(updated(SGD, steps=3)[0]))
    assert counts(state) == 1


def test_conditionally_transform_around_the_optimizer_leaves_raw_gradients():
    tx = optax.conditionally_transform(merging(), lambda step: step > 0)
    params, _ = updated(tx, compiled=True)
    assert_close(params, optax.apply_updates(initial(), GRADS))


def test_conditionally_mask_changes_nothing_at_the_other_steps():
    tx = optax.conditionally_mask(merging(), lambda step: step > 0)
    params, state = updated(tx, compiled=True)
    jax.tree.map(np.testing.assert_array_equal, params, initial())
    assert counts(state) == 0


def lookahead(steps, **options):
    tx = optax.lookahead(merging(), sync_period=2, slow_step_size=0.5, **options)
    return updated(tx, optax.LookaheadParams.init_synced(initial()), steps)


def test_lookahead_merges_the_fast_weights():
    """The slow ones, and after a synchronisation both, are halfway to the merged."""
    params, _ = lookahead(steps=1)
    assert_close(params.fast, updated(merging())[0])
    assert_close(params.slow, initial())
    params, _ = lookahead(steps=2)
    fast, _ = updated(merging(), steps=2)
    assert_close(params.slow, jax.tree.map(lambda p, f: (p + f) / 2, initial(), fast))
    assert_close(params.fast, params.slow)


def test_lookahead_that_resets_its_state_repeats_the_draws():
    _, state = lookahead(steps=3)
    _, reset = lookahead(steps=3, reset_state=True)
    assert counts(state) == 3 and counts(reset) == 1


def test_sam_merges_after_the_ascent_alone():
    ascent = optax.sgd(0.05)
    params, state = updated(sam(merging(), ascent, sync_period=2), steps=2)
    expected, _ = updated(sam(SGD, ascent, sync_period=2), steps=2)
    assert_close(params, merged(expected))
    assert counts(state) == 1
    params, state = updated(merging(sam(SGD, ascent, sync_period=2)))
    assert_close(params, merged(updated(sam(SGD, ascent, sync_period=2))[0]))


def test_mechanize_inside_with_merging():
    params, _ = updated(merging(mechanize(SGD)), compiled=True)
    assert_close(params, merged(updated(mechanize(SGD), compiled=True)[0]))


def test_mechanize_around_with_merging_scales_the_merge():
    params, _ = updated(mechanize(merging()), compiled=True)
    assert_close(params, initial(), 1e-3)  # its scale begins near zero


def test_flatten_inside_with_merging():
    assert_close(updated(merging(optax.flatten(SGD)))[0], updated(merging())[0])
    with pytest.raises(ValueError, match="'first' is not in params"):
        optax.flatten(merging()).init(initial())


def test_a_line_search_keeps_the_value_of_before_the_merge():
    params = {"first": jax.random.normal(KEY, (3, 4)) + 1}
    kernels = [Kernel.named(params, "first", 1, op="dense")]

    def square(p):
        return jnp.sum((p["first"] - jnp.arange(4.0)) ** 2)

    tx = with_merging(optax.lbfgs(), kernels, RULE, KEY)
    state = tx.init(params)
    value_and_grad = optax.value_and_grad_from_state(square)
    value, grads = value_and_grad(params, state=state)
    updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=square)
    moved = optax.apply_updates(params, updates)
    assert abs(value_and_grad(moved, state=state)[0] - square(moved)) > 0.01
    assert jax.value_and_grad(square)(moved)[0] == square(moved)


def test_the_count_of_an_optimizer_is_found_by_its_state():
    params = {"first": jnp.ones((3, 4))}
    kernels = [Kernel.named(params, "first", 1, op="dense")]
    state = with_merging(optax.adam(1e-3), kernels, RULE, KEY).init(params)
    with pytest.raises(KeyError, match="multiple values"):
        optax.tree.get(state, "count")
    (words,) = re.findall(
        r"`(optax\.tree\.get\(state.*\))`\.", (PAGE.parent / "faq.md").read_text()
    )
    assert eval(words) == 0


# ---- Frozen layers


LABELS = {"first": "freeze", "second": "train"}
FROZEN = {"first": True, "second": False}
TRAINED = {"first": False, "second": True}


def partition(tx):
    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, LABELS)


def zero(mask):
    return optax.masked(optax.set_to_zero(), mask)


def assert_trains_and_merges_second_alone(params):
    np.testing.assert_array_equal(params["first"], initial()["first"])
    assert_close(params["second"], updated(merging())[0]["second"])


def as_modules(tree):
    """Nested, as Flax has them."""
    return {"params": {"stem": {"kernel": tree["first"]}, "block": {"kernel": tree["second"]}}}


def test_the_sample_of_frozen_layers_with_nested_parameters():
    def nested_forward(params, x):
        modules = params["params"]
        return forward(
            {"first": modules["stem"]["kernel"], "second": modules["block"]["kernel"]}, x
        )

    params, grads = as_modules(initial()), as_modules(GRADS)
    kernels = find_kernels(nested_forward, params, X, ops=("dense",))
    names = sample("def label", params=params, kernels=kernels, rule=RULE, key=KEY, tx=SGD)
    trainable = names["trainable"]
    assert [kernel.name for kernel in trainable] == ["params/block/kernel"]
    after = updated(names["tx"], params, grads=grads)[0]["params"]
    np.testing.assert_array_equal(after["stem"]["kernel"], initial()["first"])
    plain = updated(SGD, params, grads=grads)[0]
    assert_close(after["block"], merged(plain, kernels=trainable)["params"]["block"])


AROUND = {
    "partition": lambda: merging(partition(SGD)),
    "masked": lambda: merging(optax.masked(SGD, TRAINED)),
    "selective_transform": lambda: merging(selective_transform(SGD, freeze_mask=FROZEN)),
    "freeze": lambda: merging(optax.chain(SGD, freeze(FROZEN))),
}


@pytest.mark.parametrize("wrapper", AROUND)
def test_with_merging_around_a_wrapper_merges_frozen_weights(wrapper):
    grads = GRADS | {"first": jnp.zeros((8, 8))}
    params, _ = updated(AROUND[wrapper](), grads=grads)
    assert_close(params["first"], merged(initial())["first"])
    assert differ(params["first"], initial()["first"])


def test_a_weight_without_gradient_is_merged():
    def loss(params):
        stopped = params | {"first": jax.lax.stop_gradient(params["first"])}
        return jnp.sum(forward(stopped, X))

    params, _ = updated(merging(), grads=jax.grad(loss)(initial()))
    assert_close(params["first"], merged(initial())["first"])


@pytest.mark.parametrize("mask", [freeze, zero])
def test_a_freeze_after_the_merge_holds_but_its_merges_are_counted(mask):
    params, state = updated(optax.chain(merging(), mask(FROZEN)))
    assert_trains_and_merges_second_alone(params)
    assert [row.merged for row in merge_report(state, KERNELS)] == [8, 8]


INSIDE = {
    "partition": lambda tx: partition(tx),
    "masked": lambda tx: optax.chain(optax.masked(tx, TRAINED), zero(FROZEN)),
    "selective_transform": lambda tx: selective_transform(tx, freeze_mask=FROZEN),
}


@pytest.mark.parametrize("wrapper", INSIDE)
def test_inside_a_wrapper_a_frozen_weight_is_refused_at_init(wrapper):
    with pytest.raises(ValueError, match=r"'first' is not in params.*optax\.masked or optax\.part"):
        INSIDE[wrapper](merging()).init(initial())
    trainable = deep_kernels(KERNELS, skip=0, where=lambda kernel: TRAINED[kernel.name])
    params, _ = updated(INSIDE[wrapper](merging(kernels=trainable)))
    assert_trains_and_merges_second_alone(params)


def test_parameters_without_the_frozen_ones_are_refused_at_init():
    with pytest.raises(ValueError, match="'first' is not in params"):
        merging().init({"second": initial()["second"]})


# ---- Weights that are computed


def traced(forward, params, x=X, ops=("conv", "dense")):
    return trace_kernels(forward, params, x, ops=ops)


def names_of(trace):
    return [kernel.name for kernel in trace.kernels]


def similarity(weight):
    """Mean similarity of the columns."""
    kernel = Kernel((jax.tree_util.DictKey("w"),), weight.shape, weight.ndim - 1)
    return kernel_similarity({"w": weight}, [kernel])[0].mean


def test_the_mean_of_a_standardised_weight_counts_in_the_similarity():
    def standardised(w):
        return jax.nn.standardize(w, axis=0)

    params = {"w": normal(2, 8, 8) + 10}
    assert names_of(traced(lambda p, x: x @ standardised(p["w"]), params)) == ["w"]
    assert similarity(params["w"]) > 0.9
    assert abs(similarity(standardised(params["w"]))) < 0.2


def weight_norm(params):
    return params["g"] * params["v"] / jnp.linalg.norm(params["v"], axis=0)


def test_weight_norm_mixes_the_direction_and_keeps_the_scale():
    params = {"v": normal(2, 8, 8), "g": jnp.arange(1.0, 9.0)}
    kernels = traced(lambda p, x: x @ weight_norm(p), params).kernels
    assert [kernel.name for kernel in kernels] == ["v"]
    np.testing.assert_allclose(similarity(params["v"]), similarity(weight_norm(params)), rtol=1e-5)
    after = merged(params, kernels=kernels)
    np.testing.assert_array_equal(after["g"], params["g"])
    assert differ(weight_norm(after), weight_norm(params))
    assert_close(jnp.linalg.norm(weight_norm(after), axis=0), params["g"])


def test_a_tied_scale_of_weight_norm_is_mixed_along():
    params = {"v": normal(2, 8, 8), "g": jnp.arange(1.0, 9.0)}
    (v,) = traced(lambda p, x: x @ weight_norm(p), params).kernels
    g = Kernel((jax.tree_util.DictKey("g"),), (8,), 0)
    tied = tie([v, g], "unit", compared=lambda kernel: kernel.name == "v")
    after = merged(params, kernels=tied)
    both = jnp.concatenate([params["v"], params["g"][None]])
    partners = [
        next(j for j in range(8) if jnp.allclose(column, (both[:, i] + both[:, j]) / 2, atol=1e-5))
        for i, column in enumerate(jnp.concatenate([after["v"], after["g"][None]]).T)
    ]
    assert all(i != j for i, j in enumerate(partners))


class Normalised(nn.Module):
    """A convolution and a Dense layer inside WeightNorm or SpectralNorm."""

    spectral: bool

    @nn.compact
    def __call__(self, x):
        for layer in (nn.Conv(8, (3, 3)), nn.Dense(8)):
            if self.spectral:
                x = nn.SpectralNorm(layer)(x, update_stats=False)
            else:
                x = nn.WeightNorm(layer)(x)
        return x


def normalised(spectral):
    net, x = Normalised(spectral), jnp.ones((1, 4, 4, 8))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: normal(2, *leaf.shape), shapes)
    params = variables.pop("params")
    return lambda params, x: net.apply({"params": params, **variables}, x), params, variables, x


def test_linen_weight_norm_mixes_kernels_and_keeps_scales():
    forward, params, _, x = normalised(spectral=False)
    kernels = traced(forward, params, x).kernels
    assert [kernel.name for kernel in kernels] == ["Conv_0/kernel", "Dense_0/kernel"]
    after = merged(params, kernels=kernels[1:])
    assert differ(after["Dense_0"]["kernel"], params["Dense_0"]["kernel"])
    for name in ("WeightNorm_0", "WeightNorm_1"):
        jax.tree.map(np.testing.assert_array_equal, after[name], params[name])


def test_spectral_norm_merges_the_effective_weight_for_the_same_sigma():
    weight, sigma = normal(2, 8, 8), 3.0
    np.testing.assert_allclose(similarity(weight), similarity(weight / sigma), rtol=1e-5)
    after, effective = (merged({"w": w}, kernels=[W])["w"] for w in (weight, weight / sigma))
    assert_close(after / sigma, effective)


def test_spectral_norm_of_a_convolution_is_listed_and_of_a_dense_layer_can_be_named():
    forward, params, variables, x = normalised(spectral=True)
    assert names_of(traced(forward, params, x, ops=("conv",))) == ["Conv_0/kernel"]
    assert "Conv_0/kernel/sigma" in variables["batch_stats"]["SpectralNorm_0"]
    path = (jax.tree_util.DictKey("Dense_0"), jax.tree_util.DictKey("kernel"))
    after = merged(params, kernels=[Kernel(path, (8, 8), 1, op="dense")])
    assert differ(after["Dense_0"]["kernel"], params["Dense_0"]["kernel"])


LORA = {"w": normal(2, 8, 8), "a": normal(3, 8, 2), "b": normal(4, 2, 8)}


def test_lora_added_to_a_weight_merges_the_weight_alone():
    kernels = traced(lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), LORA).kernels
    assert [kernel.name for kernel in kernels] == ["w"]
    after = merged(LORA, kernels=kernels)
    assert differ(after["w"], LORA["w"])
    np.testing.assert_array_equal(after["a"], LORA["a"])
    np.testing.assert_array_equal(after["b"], LORA["b"])


def test_lora_on_a_weight_that_is_no_parameter_is_skipped_with_the_reason():
    factors = {"a": LORA["a"], "b": LORA["b"]}
    trace = traced(lambda p, x: x @ (LORA["w"] + p["a"] @ p["b"]), factors)
    assert trace.kernels == ()
    assert "a" in {one.name for one in trace.passed_over}
    assert all("computed from it by 'dot_general'" in one.reason for one in trace.passed_over)


def test_lora_factors_applied_in_turn_are_listed_and_can_be_left_out():
    kernels = traced(lambda p, x: x @ p["w"] + (x @ p["a"]) @ p["b"], LORA).kernels
    assert [kernel.name for kernel in kernels] == ["w", "a", "b"]
    left = deep_kernels(kernels, skip=0, where=lambda kernel: kernel.name not in ("a", "b"))
    assert [kernel.name for kernel in left] == ["w"]


def effective_sample(params):
    def apply(weights, x):
        return x @ weights["w"]

    names = sample("def effective", apply=apply, rule=RULE)
    shapes = jax.eval_shape(names["effective"], params)
    names["kernels"] = find_kernels(apply, shapes, X, ops=("dense",))
    return names


def test_the_sample_merges_the_effective_weight_in_the_forward_pass():
    params = {"v": normal(2, 8, 8), "g": jnp.arange(1.0, 9.0)}
    names = effective_sample(params)
    kernels, key = names["kernels"], jax.random.key(0)
    assert [kernel.name for kernel in kernels] == ["w"]
    weights, stats = merge_kernels({"w": weight_norm(params)}, key, kernels, RULE)
    assert int(stats.merged[0]) == 8
    np.testing.assert_allclose(
        names["loss"](params, key, X), jnp.mean((X @ weights["w"]) ** 2), rtol=1e-5
    )


def test_gradients_pass_through_the_merge_of_the_sample():
    params = {"v": normal(2, 8, 8), "g": jnp.arange(1.0, 9.0)}
    loss = effective_sample(params)["loss"]
    grads = compile_quickly(jax.grad(loss))(params, KEY, X)
    direction = {"v": normal(6, 8, 8), "g": normal(7, 8)}

    def along(length):
        return loss(jax.tree.map(lambda p, d: p + length * d, params, direction), KEY, X)

    slope = sum(jnp.vdot(grads[name], direction[name]) for name in params)
    np.testing.assert_allclose(slope, (along(1e-2) - along(-1e-2)) / 2e-2, rtol=1e-2)


def test_a_mix_is_kept_by_writing_it_back():
    """Of weight norm as the direction and its norm; of LoRA as the weight, with b at zero."""
    w = merged({"w": weight_norm({"v": normal(2, 8, 8), "g": jnp.arange(1.0, 9.0)})}, kernels=[W])
    assert_close(weight_norm({"v": w["w"], "g": jnp.linalg.norm(w["w"], axis=0)}), w["w"])
    w = merged({"w": LORA["w"] + LORA["a"] @ LORA["b"]}, kernels=[W])["w"]
    np.testing.assert_array_equal(w + LORA["a"] @ jnp.zeros_like(LORA["b"]), w)


# ---- Averages of the weights


def test_an_average_of_the_parameters_has_a_share_of_each_merge():
    average, decay = initial(), 0.9
    params, _ = updated(merging())
    average = optax.incremental_update(params, average, 1 - decay)
    assert_close(average, jax.tree.map(lambda p, m: 0.9 * p + 0.1 * m, initial(), params))
    assert differ(average["first"], merged(average)["first"])  # no merge of itself


def test_optax_ema_before_the_merge_averages_updates_alone():
    ema = optax.ema(0.9, debias=False)
    params, _ = updated(optax.chain(SGD, ema, merge_alone()))
    assert_close(params, merged(updated(optax.chain(SGD, ema))[0]))


def test_optax_ema_after_the_merge_averages_the_merge():
    params, _ = updated(optax.chain(merging(), optax.ema(0.9, debias=False)))
    right, _ = updated(merging())
    assert_close(params, jax.tree.map(lambda p, m: p + 0.1 * (m - p), initial(), right))


B1 = 0.9


def free(tx):
    return schedule_free(tx, learning_rate=0.1, b1=B1)


def evaluated(state, params):
    return schedule_free_eval_params(state, params)


def test_with_merging_around_schedule_free_merges_y_and_moves_x_by_more():
    y, state = updated(merging(free(SGD)))
    plain, plain_state = updated(free(SGD))
    assert_close(y, merged(plain))
    assert_close(state[0].z, plain_state.z)
    x, plain_x = evaluated(state[0], y), evaluated(plain_state, plain)
    change = jax.tree.map(lambda new, old: (new - old) / B1, y, plain)
    assert_close(jax.tree.map(jnp.subtract, x, plain_x), change)


def test_schedule_free_around_with_merging_merges_none_of_its_weights_exactly():
    """At the third update, since all three sequences begin alike; z has what merges y."""
    tx = free(merging())
    y, state = updated(tx, steps=2)
    updates, after = tx.update(GRADS, state, y)
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, y, GRADS)
    change = jax.tree.map(jnp.subtract, merged(moved, 2), y)
    assert_close(after.z, jax.tree.map(jnp.add, state.z, change))
    new = optax.apply_updates(y, updates)
    for sequence in (new, after.z, evaluated(after, new)):
        assert differ(sequence["first"], merged(moved, 2)["first"])


def test_an_average_can_be_merged_itself():
    average = jax.tree.map(lambda p, g: p + 0.1 * g, initial(), GRADS)
    after, stats = merge_kernels(average, KEY, KERNELS, RULE)
    assert stats.merged.tolist() == [8, 8]
    assert differ(after["first"], average["first"])


# ---- Batch statistics


class BatchNormed(nn.Module):
    """One Dense layer with batch normalisation."""

    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))


def test_the_sample_recomputes_the_batch_statistics_of_merged_weights():
    net = BatchNormed()
    params = {
        "BatchNorm_0": {"bias": jnp.zeros(8), "scale": jnp.ones(8)},
        "Dense_0": {"bias": jnp.zeros(8), "kernel": normal(2, 8, 8)},
    }
    stats = batch_statistics(params)  # of the unmerged weights, as at the end of a training
    path = (jax.tree_util.DictKey("Dense_0"), jax.tree_util.DictKey("kernel"))
    params = merged(params, kernels=[Kernel(path, (8, 8), 1, op="dense")])
    trained, _ = net.apply(
        {"params": params, "batch_stats": stats}, X, train=True, mutable=["batch_stats"]
    )

    def evaluation(stats):
        return net.apply({"params": params, "batch_stats": stats}, X, train=False)

    assert differ(evaluation(stats), trained)
    names = {"net": net, "params": params, "batch_stats": stats, "batches": [X, X]}
    renewed = sample("@jax.jit\ndef update(batch_stats, x):\n    variables", **names)["batch_stats"]
    assert_close(evaluation(renewed), trained, 1e-4)


def test_the_sample_recomputes_the_batch_statistics_of_an_nnx_model():
    model = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    model.train()
    sample("graph, batch_stats, rest", nnx=nnx, model=model, batches=[X, X + 1])
    assert_close(model.mean[...], X.mean(0) + 0.5, 1e-4)
    assert_close(model.var[...], X.var(0), 1e-4)


def batch_statistics(params):
    y = X @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    return {"BatchNorm_0": {"mean": y.mean(0), "var": y.var(0)}}


# ---- Pruned weights


MASK = {"first": (normal(8, 8, 8) > 0) * 1.0, "second": jnp.ones((8, 8))}


def pruned():
    return jax.tree.map(jnp.multiply, initial(), MASK)


def test_hidden_entries_are_compared_and_mixed_and_the_mask_in_the_forward_pass_holds():
    def masked_forward(params, x):
        return jnp.tanh(x @ (params["first"] * MASK["first"])) @ params["second"]

    kernels = find_kernels(masked_forward, initial(), X, ops=("dense",))
    assert [kernel.name for kernel in kernels] == ["first", "second"]
    changed = initial()
    changed["first"] = jnp.where(MASK["first"] == 0, 9.0, changed["first"])
    assert_close(masked_forward(changed, X), masked_forward(initial(), X))
    assert abs(similarity(changed["first"]) - similarity(initial()["first"])) > 0.1
    after = merged(pruned(), kernels=kernels)
    assert (after["first"] * (1 - MASK["first"])).any()
    kept = {"first": after["first"] * MASK["first"], "second": after["second"]}
    assert_close(masked_forward(after, X), forward(kept, X))


def test_a_masked_weight_is_merged_as_an_effective_weight():
    weights = {"w": initial()["first"] * MASK["first"]}
    np.testing.assert_allclose(
        kernel_similarity(weights, [W])[0].mean, similarity(pruned()["first"]), rtol=1e-6
    )


def test_a_merge_fills_pruned_entries_with_the_partners():
    """Whether the mask was applied to the weights, or to the gradients too."""
    masked = jax.tree.map(jnp.multiply, GRADS, MASK)
    for grads in (GRADS, masked):
        params, _ = updated(merging(), pruned(), grads=grads)
        assert (jnp.where(MASK["first"] == 0, params["first"], 0) != 0).any()


def test_the_sample_keeps_pruned_entries_at_zero():
    tx = merging()
    names = sample("prune = ", mask=MASK, tx=SGD, kernels=KERNELS, rule=RULE, key=KEY)
    params, _ = updated(names["tx"], pruned(), steps=2)
    assert (params["first"][MASK["first"] == 0] == 0).all()
    once, _ = updated(names["tx"], pruned())
    assert_close(once, jax.tree.map(jnp.multiply, updated(tx, pruned())[0], MASK))


def test_units_at_zero_never_merge_at_a_threshold_of_zero():
    weight = normal(2, 8, 8) + 3
    weight = weight.at[:, 2].set(0)
    rule = MergeRule(1.0, 0.0, 0.5, partner="nearest")
    after, stats = merge_kernels({"w": weight}, KEY, [W], rule)
    assert int(stats.merged[0]) == 7
    np.testing.assert_array_equal(after["w"][:, 2], weight[:, 2])


# ---- bfloat16; how far the transformation's updates are from it is in test_transform.py


def test_the_sample_for_bfloat16_has_one_rounding():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), initial())
    key = jax.random.fold_in(KEY, 3)
    exact, _ = merge_kernels(
        jax.tree.map(lambda p: p.astype(jnp.float32), params), key, KERNELS, RULE
    )
    rounded, _ = merge_kernels(params, key, KERNELS, RULE)
    jax.tree.map(
        np.testing.assert_array_equal,
        rounded,
        jax.tree.map(lambda p: p.astype(jnp.bfloat16), exact),
    )
    still = optax.sgd(0.0)
    names = {"key": KEY, "kernels": KERNELS, "rule": RULE, "tx": still}
    names |= {"loss": lambda params, x: jnp.sum(forward(params, x)).astype(jnp.float32)}
    step = sample("def step", **names)["step"]
    found, _ = step(params, still.init(params), 3, X)
    jax.tree.map(np.testing.assert_array_equal, found, rounded)


def test_casts_in_the_forward_pass_are_followed():
    def cast(params, x):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return forward(half, x.astype(jnp.bfloat16))

    assert find_kernels(cast, initial(), X, ops=("dense",)) == KERNELS


# ---- Save and restore


def test_the_sample_restores_parameters_and_draws(tmp_path):
    tx = merging(optax.sgd(0.1, momentum=0.9))
    params, state = updated(tx, steps=2)
    names = {"params": params, "opt_state": state, "tx": tx, "path": tmp_path / "checkpoint"}
    found = sample("from flax import serialization", **names)
    expected, restored = (
        optax.apply_updates(params, tx.update(GRADS, state, params)[0])
        for params, state in [(params, state), (found["params"], found["opt_state"])]
    )
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert counts(found["opt_state"]) == 2


# ---- Sharded parameters; the table is in docs/performance.md


SHAPE = (3, 3, 16, 32)
KINDS = ("all-gather", "all-reduce", "collective-permute", "all-to-all")
HEADER = ("sharded along", "axes", "partner", "implementation", *KINDS, "largest, bytes")
AXES = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
SPECS = {"inputs": (None, None, "x", None), "units": (None, None, None, "x"), "nothing": ()}
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}


def collectives(sharded, axes, partner, implementation):
    """A row of the page's table, counted in the compiled program."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AXES[axes],))
    one = NamedSharding(mesh, PartitionSpec(*SPECS[sharded]))
    every = NamedSharding(mesh, PartitionSpec())
    kernel = Kernel((jax.tree_util.DictKey("w"),), SHAPE, 3)
    rule = MergeRule(partner=partner)

    def merge(w, key):
        return merge_kernels({"w": w}, key, [kernel], rule, implementation=implementation)

    lowered = jax.jit(merge, out_shardings=({"w": one}, every)).lower(
        jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=one), jax.random.key(0)
    )
    text = lowered.compile(compiler_options=QUICK).as_text()
    found = re.findall(rf"= (\S.*?) ({'|'.join(KINDS)}|reduce-scatter)(?:-start)?\(", text)
    number = collections.Counter(kind for _, kind in found)
    assert set(number) <= set(KINDS)
    sizes = [
        sum(
            BYTES[dtype] * math.prod(map(int, filter(None, dims.split(","))))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        for shapes, _ in found
    ]
    counted = [str(number[kind]) for kind in KINDS]
    return [sharded, axes, partner, implementation, *counted, f"{max(sizes, default=0):,}"]


def table():
    """The rows of the page's table."""
    (text,) = re.findall(
        r"<!-- begin collectives -->\n(.*?)<!-- end collectives -->", COLLECTIVES, re.DOTALL
    )
    lines = [line.strip("| ").split(" | ") for line in text.strip().splitlines()]
    assert tuple(lines[0]) == HEADER
    return lines[2:]


CASES = [
    (sharded, axes, partner, implementation)
    for sharded in SPECS
    for partner in ("random", "nearest")
    for axes, implementation in [
        ("automatic", "auto"),
        ("automatic", "reference"),
        ("explicit", "auto"),
    ]
]


@pytest.mark.parametrize(
    # The tests of sharding say which of them gather; here the table is recounted.
    "case",
    [case if case[0] == "inputs" else pytest.param(case, marks=LONG) for case in CASES],
    ids="-".join,
)
def test_collectives_are_those_of_the_page(case):
    (version,) = re.findall(r"jax (\d+\.\d+\.\d+)\)", COLLECTIVES)
    if jax.__version__ != version:
        pytest.skip(f"counted with jax {version}")
    (row,) = (row for row in table() if all(map(applies, row, case)))
    assert row[4:] == collectives(*case)[4:]


def applies(cell, value):
    return cell in (value, "either")


@pytest.mark.parametrize("partner", ["random", "nearest"])
def test_the_reference_form_gathers_no_weight_that_is_sharded_along_inputs(partner):
    row = dict(zip(HEADER, collectives("inputs", "automatic", partner, "reference"), strict=True))
    assert row["all-gather"] == "0" and row["all-reduce"] != "0"
    similarities = 4 * SHAPE[-1] ** (2 if partner == "nearest" else 1)
    assert int(row["largest, bytes"].replace(",", "")) == similarities


if __name__ == "__main__":
    for line in (HEADER, ["---"] * 4 + ["---:"] * 5, *(collectives(*case) for case in CASES)):
        print("|", " | ".join(line), "|")
