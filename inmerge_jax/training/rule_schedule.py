"""A merging rule that changes over the updates of a stage."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from inmerge_jax.merging import MergeRule


@dataclass(frozen=True)
class RuleSchedule:
    """The rule at each update: its numbers move from those of `start` to those of `end`.

    Attributes:
      start: the rule at update `first`.
      end: the rule at update `last` and later; of the same partner and kind of threshold.
      first: the first update that merges, counted from 0 in the stage.
      last: the update at which the numbers reach those of `end`.
      every: merge at `first` and every so many updates later.
      shape: of the way from start to end: a straight line, or half a cosine wave.
    """

    start: MergeRule
    end: MergeRule
    first: int
    last: int
    every: int = 1
    shape: Literal["linear", "cosine"] = "linear"

    def __call__(self, step: Any) -> MergeRule:
        """The rule at update `step`, int32 (); its probability is 0 where nothing merges."""
        since = step - self.first
        way = jnp.clip(since / jnp.float32(max(self.last - self.first, 1)), 0, 1)
        if self.shape == "cosine":
            way = (1 - jnp.cos(jnp.pi * way)) / 2

        def between(start: Any, end: Any) -> Any:
            return start if start == end else start + way * (end - start)

        rule = only_every(jax.tree.map(between, self.start, self.end), self.every, since)
        return dataclasses.replace(rule, probability=jnp.where(since < 0, 0, rule.probability))


def only_every(rule: MergeRule, every: Any, step: Any) -> MergeRule:
    """`rule` if `step` is a multiple of `every`, else with probability 0; both may be traced."""
    return dataclasses.replace(rule, probability=jnp.where(step % every == 0, rule.probability, 0))
