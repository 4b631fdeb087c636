"""Several processes of one run: start, agreement, and I/O by process 0.

All processes compute the same values. Process 0 alone reads and writes the run folder and sends
what it read to the others, so a run needs no shared storage.
"""

import json
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

from inmerge_jax.buckets import in_bucket
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_errors
from inmerge_jax.training.preemption import PreemptionHandler
from inmerge_jax.training.workdir import diff_configs

P = ParamSpec("P")
T = TypeVar("T")

START_SECONDS = 300
"""Longest time that a process waits for process 0, and then for the others."""

_UNKNOWN_HOST_SECONDS = 10
_SHUTDOWN_SECONDS = 60
_EXIT_DELAY_SECONDS = 2.0
_SYNC_EVERY = 8
_CHUNK = 2**24
_MESSAGE = 4000


def check_process_options(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Checks the options of a run of several processes; all None for a process that runs alone.

    Raises:
      UsageError: some of them are missing, or one is out of range.
    """
    options = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [f"`{name}`" for name, value in options.items() if value is None]
    if len(missing) == len(options):
        return
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} missing: each process of a run needs `coordinator` "
            "(HOST:PORT), `num_processes` and `process_id`, except on a TPU pod"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UsageError(
            f"`coordinator` {coordinator}: give the address of process 0 and a free port of it, "
            "such as 10.0.0.1:9876"
        )
    if num_processes < 1:
        raise UsageError(f"`num_processes` {num_processes}: choose 1 or more")
    if not 0 <= process_id < num_processes:
        raise UsageError(
            f"`process_id` {process_id}: choose 0 to {num_processes - 1}, a different one in each "
            "process"
        )


def connect(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    seconds: int = START_SECONDS,
) -> None:
    """Connects this process to the others of its run; call it before any other use of JAX.

    Without arguments, a process on a TPU pod connects to the others of its slice, and any other
    process runs alone. JAX aborts the process if another one does not appear in time.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      seconds: longest time to wait for process 0, and then for the others.

    Raises:
      UsageError: see `check_process_options`; the port is in use on the machine of process 0;
        nobody listens there; process 0 has another number of processes; or JAX cannot start.
    """
    check_process_options(coordinator, num_processes, process_id)
    # JAX would handle SIGTERM itself, and it would no longer end the process.
    jax.config.update("jax_enable_preemption_service", False)
    if coordinator is not None:
        print(
            f"process {process_id} of {num_processes} connects to {coordinator}; if another one "
            f"does not appear in {seconds} s, JAX aborts this one (DEADLINE_EXCEEDED)",
            flush=True,
        )
        _check_coordinator(coordinator, process_id, seconds)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    else:
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
        if "tpu" not in (platforms or "").split(","):
            return  # JAX adds "tpu" if it finds chips and libtpu on this machine.
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            # Else JAX asks Slurm or Open MPI too, which may give a process one of its GPUs.
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=seconds,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
        # Starts the devices here, so that handling a later error cannot fail on it.
        count = jax.process_count()
    except (ValueError, OSError) as error:
        if coordinator is not None:
            raise
        print(f"no TPU pod found ({error}): this process runs alone", file=sys.stderr)
        return
    except RuntimeError as error:
        raise UsageError(
            f"JAX could not connect the processes of this run: {str(error).splitlines()[0]}; start "
            "the same command on every host of a TPU pod, with no other process on its TPUs, or "
            "give each process `coordinator`, `num_processes` and `process_id`"
        ) from error
    if num_processes not in (None, count):
        raise UsageError(
            f"`num_processes` {num_processes}: process 0 was started with {count}; give every "
            "process the same number"
        )


def _check_coordinator(coordinator: str, process_id: int, seconds: int) -> None:
    """Checks the port in process 0, where JAX would crash; elsewhere waits until it is open."""
    host, _, port = coordinator.rpartition(":")
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise UsageError(
                f"`coordinator` {coordinator}: process 0 cannot use port {port} of its machine "
                f"({error}); choose another port for all processes, or end the process that uses "
                "it (perhaps another one with `process_id` 0)"
            ) from error
        return
    start, patience = time.monotonic(), seconds
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, UnicodeError) as error:
            if isinstance(error, socket.gaierror | UnicodeError):
                # A cluster's name server may learn the name of a new machine with a delay.
                patience = min(seconds, _UNKNOWN_HOST_SECONDS)
            if time.monotonic() - start >= patience:
                raise UsageError(
                    f"`coordinator` {coordinator}: process {process_id} did not find process 0 "
                    f"there in {patience} s ({error}); start it with `process_id` 0 on that "
                    "machine, and open the port to the others"
                ) from error
        time.sleep(0.2)


def is_primary() -> bool:
    """Whether this is process 0, which writes the run folder and prints messages."""
    return jax.process_index() == 0


def run_on_primary(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `function` in process 0 and broadcasts its result, or its error, to all processes.

    All processes wait for it. The result must be picklable.

    Raises:
      UsageError, OSError: in every process, if raised in process 0.
    """
    if jax.process_count() == 1:
        return function(*args, **kwargs)
    answer: Any = None
    if is_primary():
        try:
            answer = function(*args, **kwargs), None
        except (UsageError, OSError) as error:
            answer = None, error
    result, error = pickle.loads(_broadcast(pickle.dumps(answer)))
    if error is not None:
        raise error
    return result


def run_synced(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `function` in every process; if it fails in one, all processes raise.

    Raises:
      UsageError, OSError: as raised in this process.
      UsageError: another process raised one of these; the message is that of the first one.
    """
    if jax.process_count() == 1:
        return function(*args, **kwargs)
    own = result = None
    try:
        result = function(*args, **kwargs)
    except (UsageError, OSError) as error:
        own = error
    message = b"" if own is None else (str(own) or repr(own)).encode()[:_MESSAGE]
    messages = process_allgather(np.frombuffer(message.ljust(_MESSAGE, b"\0"), np.uint8))
    if own is not None:
        raise own
    for number, row in enumerate(messages):
        if text := row.tobytes().rstrip(b"\0").decode(errors="replace"):
            raise UsageError(f"process {number} failed: {text}")
    return result


def require_same_config(config: dict[str, Any]) -> None:
    """Checks that every process has the configuration of process 0.

    Args:
      config: nested dicts of JSON values.

    Raises:
      UsageError: in every process, if the configurations differ; the message lists the fields.
    """
    first = json.loads(run_on_primary(json.dumps, config))

    def compare() -> None:
        if lines := "".join(
            f"\n  {name}: {there} in process 0, {here} here"
            for name, there, here in diff_configs(first, config)
        ):
            raise UsageError(
                f"configuration of process {jax.process_index()} differs from process 0:{lines}\n"
                "give every process the same options, except `process_id`"
            )

    run_synced(compare)


def is_shared(folder: Path | None) -> bool:
    """Whether all processes see the same `folder`, which process 0 creates where it is missing.

    Args:
      folder: local, on a network drive, or in a bucket; None for none, which no other is.

    Raises:
      UsageError: in every process, if process 0 cannot write to it.
    """
    if jax.process_count() == 1:
        return folder is not None
    bucket = folder is not None and in_bucket(folder)
    place = folder if folder is None or bucket else folder.expanduser()
    mark = run_on_primary(_leave_mark, place)
    if place is None or mark is None:
        seen = False
    else:
        seen = str(place) == mark if bucket else (place / mark).exists()
    every = bool(process_allgather(np.array(seen)).all())
    if is_primary() and place is not None and not bucket:
        (place / mark).unlink()
    return every


def _leave_mark(folder: Path | None) -> str | None:
    """The name of a new file in a folder; a bucket's folder is its own mark."""
    if folder is None or in_bucket(folder):
        return None if folder is None else str(folder)
    with write_errors(folder, begun=False):
        folder.mkdir(parents=True, exist_ok=True)
        number, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
        os.close(number)
    return Path(path).name


def gather_rows(values: np.ndarray) -> np.ndarray:
    """Gathers the rows of all processes, in the order of the processes within each batch.

    Args:
      values: (batches, rows, ...) of this process, of a dtype that needs no 64-bit mode.

    Returns:
      (batches, processes * rows, ...), the same in every process.
    """
    return np.concatenate(process_allgather(values), axis=1)


class SyncedPreemption:
    """A preemption signal that all processes see at the same update.

    All processes must call it equally often. They synchronize at every eighth call, that is once
    in eight dispatches, because each synchronization waits for the pending updates.

    Attributes:
      stop: the handler of this process; its `signal` is set if another process received one.
    """

    def __init__(self, stop: PreemptionHandler) -> None:
        self.stop = stop
        self._calls = 0
        self._agreed = False

    def __call__(self) -> bool:
        """Whether all processes are to stop."""
        if jax.process_count() == 1:
            return self.stop()
        if not self._agreed and self._calls % _SYNC_EVERY == 0:
            numbers = process_allgather(np.int32(self.stop.signal or 0))
            self._agreed = bool(numbers.any())
            if self._agreed and self.stop.signal is None:
                self.stop.signal = signal.Signals(int(numbers.max()))
                print(
                    f"process {numbers.argmax()} received {self.stop.signal.name}: process "
                    f"{jax.process_index()} saves a checkpoint after this update and stops",
                    file=sys.stderr,
                )
        self._calls += 1
        return self._agreed


def is_peer_failure(error: Exception) -> bool:
    """Whether `error`, of any type, is how JAX reports a lost process.

    NCCL reports errors of this machine too, such as a full /dev/shm.
    """
    text = str(error)
    if "NCCL" in text:
        return any(word in text for word in ("remote process", "network error", "onnection"))
    return any(word in text for word in ("Gloo", "UNAVAILABLE", "coordination"))


def exit_process(status: int) -> int:
    """Returns the exit status; ends a failed process of several at once.

    At a normal exit JAX waits for all processes, which may wait for the failed one in a collective.
    Ending the process breaks their connection to it, so that they end too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # The number of processes is not queried: that would start the devices, which may have failed.
    if status and jax.distributed.is_initialized():
        # If all failed alike, each can report it before the end of process 0 ends the others.
        time.sleep(_EXIT_DELAY_SECONDS)
        os._exit(status)
    return status


def _broadcast(data: bytes) -> bytes:
    """Broadcasts the `data` of process 0, in parts, because every device receives a copy."""
    size = int(broadcast_one_to_all(np.uint32(len(data))))
    # Lengths are powers of 2, because JAX compiles once per length.
    length = min(_CHUNK, 2 ** max(10, (size - 1).bit_length()))
    parts = []
    for start in range(0, size, length):
        own = data[start : start + length] if is_primary() else b""
        part = np.frombuffer(own.ljust(length, b"\0"), np.uint8)
        parts.append(broadcast_one_to_all(part).tobytes())
    return b"".join(parts)[:size]
