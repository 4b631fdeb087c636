"""Seconds per call of work that a device does while the host continues."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Contender(NamedTuple):
    """Something to time.

    Attributes:
      run: queues one call of the work.
      wait: returns when all that was queued is done.
    """

    run: Callable[[], Any]
    wait: Callable[[], Any]


def seconds_per_call(
    contenders: Mapping[str, Contender],
    *,
    rounds: int,
    seconds: float,
    calls: int = 200,
    limit: float = float("inf"),
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one number per round.

    In a round each contender queues several calls and waits for the last. The contenders take
    turns, in alternating order, so that a drift of the machine affects all of them.

    Args:
      contenders: by name; each is called twice beforehand, untimed.
      rounds: numbers for each contender.
      seconds: that one contender's calls in a round are to take, roughly.
      calls: the most that are queued in a round.
      limit: seconds for all rounds; there are fewer where they would take longer, but two.
    """
    queued, found, total = {}, {name: [] for name in contenders}, 0.0
    for name, (run, wait) in contenders.items():
        run()
        wait()
        before = time.perf_counter()
        run()
        wait()
        once = time.perf_counter() - before
        queued[name] = max(1, min(calls, round(seconds / max(once, 1e-6))))
        total += queued[name] * once
    order = list(contenders)
    for _ in range(rounds if rounds * total <= limit else max(2, int(limit / total))):
        for name in order:
            run, wait = contenders[name]
            before = time.perf_counter()
            for _ in range(queued[name]):
                run()
            wait()
            found[name].append((time.perf_counter() - before) / queued[name])
        order.reverse()
    return found


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of times."""
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios of two contenders' times in the same round."""
    return summary([a / b for a, b in zip(above, below, strict=True)])


def copy_bandwidth(tiny: bool) -> float:
    """Bytes per second that the device reads and writes when it copies a large array."""
    platform = jax.local_devices()[0].platform
    size = 2**20 if tiny else 2**26 if platform == "cpu" else 2**28
    array = jnp.zeros(size, jnp.float32)
    # Not a plain copy, which a compiler may leave out. In place, since fresh memory is slow on CPU.
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    latest, moved = [array], 2 * array.nbytes

    def run() -> None:
        latest[0] = copy(latest[0])

    times = seconds_per_call(
        {"copy": Contender(run, lambda: latest[0].block_until_ready())}, rounds=5, seconds=0.1
    )["copy"]
    return moved / statistics.median(times)


def matmul_rate(dtype: Any, tiny: bool) -> float:
    """Floating-point operations per second of a large matrix product at JAX's default precision."""
    platform = jax.local_devices()[0].platform
    size = 256 if tiny else 1024 if platform == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    latest = [a]

    def run() -> None:
        latest[0] = product(a, a)

    times = seconds_per_call(
        {"product": Contender(run, lambda: latest[0].block_until_ready())}, rounds=5, seconds=0.1
    )["product"]
    return 2 * size**3 / statistics.median(times)
