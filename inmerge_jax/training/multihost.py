"""Several processes of one run: rendezvous, agreement, and I/O by process 0.

All processes compute the same values. Process 0 alone reads and writes the run folder and sends
what it read to the others, so a run needs no shared storage.
"""

import contextlib
import json
import os
import pickle
import select
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from inmerge_jax.errors import UsageError
from inmerge_jax.training.preemption import PreemptionHandler
from inmerge_jax.training.workdir import diff_configs

P = ParamSpec("P")
T = TypeVar("T")

PEER_FAILURE = 3
"""Exit status of a process that lost another process of its run."""

RENDEZVOUS_SECONDS = 300.0
"""Longest time that a process waits for the others."""

_CHUNK = 2**24
_SHUTDOWN_SECONDS = 60
_EXIT_DELAY_SECONDS = 2.0
_SYNC_EVERY = 8


def check_process_options(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Checks the options of a run of several processes.

    Raises:
      UsageError: some of them are missing, or one is out of range.
    """
    given = {
        "`coordinator`": coordinator,
        "`num_processes`": num_processes,
        "`process_id`": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
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
    seconds: float = RENDEZVOUS_SECONDS,
) -> None:
    """Connects this process to the others of its run; call it before any other use of JAX.

    If the first three arguments are None, a process on a TPU pod connects to the others of its
    slice, as described by the environment. Any other process runs alone.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      seconds: longest time to wait for the others; on a TPU pod, JAX's own limit applies.

    Raises:
      UsageError: see `check_process_options` and `rendezvous`; or JAX cannot start.
    """
    check_process_options(coordinator, num_processes, process_id)
    # JAX would handle SIGTERM itself, and it would no longer end the process.
    jax.config.update("jax_enable_preemption_service", False)
    options = {"shutdown_timeout_seconds": _SHUTDOWN_SECONDS}
    if coordinator is None:
        # JAX adds "tpu" if it finds chips and libtpu on this machine.
        if "tpu" in (jax.config.jax_platforms or "").split(","):
            _connect_pod(options)
        return
    print(
        f"process {process_id} of {num_processes} connects to {coordinator} and waits up to "
        f"{seconds:g} s for the others",
        flush=True,
    )
    rendezvous(coordinator, num_processes, process_id, seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, **options)
        # Starts the devices here, so that handling a later error cannot fail on it.
        jax.process_count()
    except RuntimeError as error:
        raise UsageError(
            f"`coordinator` {coordinator}: process {process_id} of {num_processes} found the "
            f"others, but JAX could not start: {str(error).splitlines()[0]}; fix this, then start "
            "all of them again"
        ) from error


def _connect_pod(options: dict[str, Any]) -> None:
    """Connects to the other processes of a TPU pod, if this process is on one."""
    try:
        jax.distributed.initialize(**options)
        jax.process_count()
    except (ValueError, OSError) as error:
        print(f"no TPU pod found ({error}): this process runs alone", file=sys.stderr)
    except RuntimeError as error:
        raise UsageError(
            f"this process of a TPU pod did not find the others: {str(error).splitlines()[0]}; "
            "start the same command on every host of the pod, with no other process on its TPUs, "
            "or give each `coordinator`, `num_processes` and `process_id`"
        ) from error


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
    messages = _gather(b"" if own is None else (str(own) or repr(own)).encode())
    if own is not None:
        raise own
    for number, message in enumerate(messages):
        if message:
            raise UsageError(f"process {number} failed: {message.decode()}")
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


def gather_rows(values: np.ndarray) -> np.ndarray:
    """Gathers the rows of all processes, in the order of the processes within each batch.

    Args:
      values: (batches, rows, ...) of this process, of a dtype that needs no 64-bit mode.

    Returns:
      (batches, processes * rows, ...), the same in every process.
    """
    if jax.process_count() == 1:
        return values
    from jax.experimental.multihost_utils import process_allgather

    stacked = np.moveaxis(process_allgather(values), 0, 1)
    return stacked.reshape(len(values), -1, *values.shape[2:])


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
            from jax.experimental.multihost_utils import process_allgather

            numbers = process_allgather(np.array(self.stop.signal or 0, np.int32))
            if numbers.any():
                self._agreed = True
                if self.stop.signal is None:
                    self.stop.signal = signal.Signals(int(numbers.max()))
                    print(
                        f"process {numbers.argmax()} received {self.stop.signal.name}: process "
                        f"{jax.process_index()} saves a checkpoint after this update and stops",
                        file=sys.stderr,
                    )
        self._calls += 1
        return self._agreed


def is_peer_failure(error: Exception) -> bool:
    """Whether `error`, of any type, is how JAX reports a lost process."""
    return any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "coordination"))


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
    """Broadcasts the `data` of process 0."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    # The size is sent as two numbers, because JAX has no 64-bit integers by default.
    size = divmod(len(data), _CHUNK)
    chunks, rest = map(int, broadcast_one_to_all(np.array(size, np.uint32)))
    parts = []
    for number, length in enumerate([_CHUNK] * chunks + [rest]):
        # Lengths are rounded up to a power of 2, because JAX compiles once per length.
        part = np.zeros(2 ** max(10, (length - 1).bit_length()), np.uint8)
        if is_primary():
            start = number * _CHUNK
            part[:length] = np.frombuffer(data, np.uint8, length, start)
        parts.append(broadcast_one_to_all(part)[:length].tobytes())
    return b"".join(parts)


def _gather(data: bytes) -> list[bytes]:
    """Gathers the `data` of every process; for short data."""
    from jax.experimental.multihost_utils import process_allgather

    lengths = process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(max(1, lengths.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


_NAME_SECONDS = 10.0
_HELLO_SECONDS = 5.0
_RETRY_SECONDS = 0.2
_LINE = 2**16

_Peer = tuple[int, int, socket.socket]


def rendezvous(
    coordinator: str, num_processes: int, process_id: int, seconds: float = RENDEZVOUS_SECONDS
) -> None:
    """Waits until all processes of a run are connected to process 0.

    JAX's own rendezvous aborts the process on failure; this one raises. Process 0 listens at the
    coordinator's address; every process connects to it and reports its number. Once all are there,
    or cannot be, process 0 closes the port and answers them.

    Args:
      coordinator: HOST:PORT of process 0; the port is free again afterwards.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      seconds: longest time to wait for the others.

    Raises:
      UsageError: in every connected process, if one is missing, two have the same number, or they
        disagree on the number of processes; in this process, if it cannot reach process 0.
    """
    if process_id == 0:
        _coordinate(coordinator, num_processes, seconds)
        return
    with _join(coordinator, num_processes, process_id, seconds) as connection:
        # Process 0 may have started last, and then waits as long itself.
        connection.settimeout(seconds + _HELLO_SECONDS)
        _await_answer(connection, coordinator, process_id)


def _coordinate(coordinator: str, num_processes: int, seconds: float) -> None:
    """The rendezvous in process 0."""
    deadline = time.monotonic() + seconds
    guests: list[_Peer] = []
    problem = ""
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(_listen(coordinator, num_processes))
        patience = min(seconds, _NAME_SECONDS)
        own = opened.enter_context(_join(coordinator, num_processes, 0, patience))
        own.settimeout(_HELLO_SECONDS)
        while not problem and len(guests) < num_processes:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([listener, own], [], [], left)
            if own in ready:  # Another process 0, on another machine, listens there.
                _await_answer(own, coordinator, 0)
            if not ready:
                problem = _missing(coordinator, num_processes, guests, seconds)
                break
            connection = opened.enter_context(listener.accept()[0])
            if (who := _read_hello(connection)) is None:
                connection.close()
                continue
            guests.append((*who, connection))
            guests = [guest for guest in guests if not _has_left(guest[2])]
            problem = _disagreement(num_processes, guests)
        # Before the answer: afterwards the others look for JAX's service at this port.
        listener.close()
        for number, _, connection in guests:
            try:
                connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
            except OSError as error:
                problem = problem or f"process {number} ended before the run started ({error})"
    if problem:
        raise UsageError(problem)


def _listen(coordinator: str, num_processes: int) -> socket.socket:
    """A socket that listens at the coordinator's port on all addresses, like JAX's service."""
    _, port = _address(coordinator)
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if both else socket.AF_INET,
            backlog=num_processes,
            dualstack_ipv6=both,
        )
    except OSError as error:
        raise UsageError(
            f"`coordinator` {coordinator}: process 0 cannot use port {port} of its machine "
            f"({os.strerror(error.errno)}); choose another port for all processes, or end the "
            "process that uses it (perhaps another one with `process_id` 0)"
        ) from error


def _join(coordinator: str, num_processes: int, process_id: int, seconds: float) -> socket.socket:
    """Connects to process 0 and reports this process's number."""
    start = time.monotonic()
    while True:
        try:
            connection = socket.create_connection(_address(coordinator), _HELLO_SECONDS)
            # If nothing listens at a local port, a connection may connect to itself.
            if connection.getsockname() != connection.getpeername():
                hello = {"process_id": process_id, "num_processes": num_processes}
                connection.sendall(json.dumps(hello).encode() + b"\n")
                return connection
            connection.close()
            reason, patience = "Connection refused", seconds
        except (socket.gaierror, UnicodeError) as error:
            # A cluster's name server may learn the name of a new machine with a delay.
            reason, patience = f"unknown host: {error}", min(seconds, _NAME_SECONDS)
        except OSError as error:
            reason, patience = error.strerror or str(error), seconds
        if time.monotonic() - start >= patience:
            where = "on that machine" if process_id else "on this machine, or give its address"
            raise UsageError(
                f"`coordinator` {coordinator}: process {process_id} of {num_processes} did not "
                f"find process 0 there in {patience:g} s ({reason}); start it with `process_id` 0 "
                f"{where}, and open the port to the others"
            )
        time.sleep(_RETRY_SECONDS)


def _await_answer(connection: socket.socket, coordinator: str, process_id: int) -> None:
    """Waits for process 0's answer; raises the problem that it reports."""
    try:
        problem = json.loads(connection.makefile("rb").readline(_LINE))["problem"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"`coordinator` {coordinator}: process {process_id} got no answer from process 0 "
            f"({error}): it ended, its run started without this process, or another program uses "
            "the port; start all processes again, each with its own `process_id`, or choose "
            "another port"
        ) from error
    if problem:
        raise UsageError(problem)


def _read_hello(connection: socket.socket) -> tuple[int, int] | None:
    """The number of the connected process, and its number of processes.

    None for anything else that connects: port scanners, or a process that has ended.
    """
    connection.settimeout(_HELLO_SECONDS)
    try:
        hello = json.loads(connection.makefile("rb").readline(_LINE))
        return int(hello["process_id"]), int(hello["num_processes"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _has_left(connection: socket.socket) -> bool:
    """Whether a waiting process has ended; a live one sends nothing more."""
    return bool(select.select([connection], [], [], 0)[0])


def _disagreement(num_processes: int, guests: list[_Peer]) -> str:
    """Describes a conflict between the connected processes; "" if there is none."""
    for number, count, _ in guests:
        if count != num_processes:
            return (
                f"process {number} was started with `num_processes` {count}, process 0 with "
                f"{num_processes}; give every process the same number"
            )
    for number, count in Counter(number for number, _, _ in guests).items():
        if count > 1:
            return (
                f"two processes were started with `process_id` {number}; choose 0 to "
                f"{num_processes - 1}, a different one in each process"
            )
    return ""


def _missing(coordinator: str, num_processes: int, guests: list[_Peer], seconds: float) -> str:
    """Names the processes that did not connect."""
    there = {number for number, _, _ in guests}
    numbers = ", ".join(str(n) for n in range(num_processes) if n not in there)
    return (
        f"`coordinator` {coordinator}: of {num_processes} processes these did not connect in "
        f"{seconds:g} s: {numbers}; start each with its `process_id`, and check that its machine "
        "reaches this address and port"
    )


def _address(coordinator: str) -> tuple[str, int]:
    """Host and port; an IPv6 address is in brackets."""
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)
