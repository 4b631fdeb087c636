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
"""Exit status of a process whose run ended because another process was lost."""

RENDEZVOUS_SECONDS = 300.0
"""How long a process waits for the others."""

_CHUNK = 2**24
_SHUTDOWN_SECONDS = 60
_EXIT_DELAY_SECONDS = 2.0
_SYNC_EVERY = 8


def check_process_options(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Checks the options of a run of several processes.

    Raises:
      UsageError: some but not all of them are given, or one is out of range.
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
    """Makes this process one of a run's; call it before anything else is asked of JAX.

    With the first three None, a process on a TPU joins the others of its slice, as the environment
    names them, and any other process stays alone.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: how many processes there are.
      process_id: which of them this one is.
      seconds: how long to wait for the others; JAX says that for a TPU pod.

    Raises:
      UsageError: see `check_process_options` and `rendezvous`; or JAX cannot start.
    """
    check_process_options(coordinator, num_processes, process_id)
    # JAX would take SIGTERM for itself, and processes would not end by it.
    jax.config.update("jax_enable_preemption_service", False)
    options = {"shutdown_timeout_seconds": _SHUTDOWN_SECONDS}
    if coordinator is None:
        # JAX has put "tpu" there if it found chips and libtpu on this machine.
        if "tpu" in (jax.config.jax_platforms or "").split(","):
            _connect_pod(options)
        return
    print(
        f"process {process_id} of {num_processes} meets the others at {coordinator}, for whom it "
        f"waits up to {seconds:g} s",
        flush=True,
    )
    rendezvous(coordinator, num_processes, process_id, seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, **options)
        # Starts the devices, so that nobody who asks for the number later, of an error, fails.
        jax.process_count()
    except RuntimeError as error:
        raise UsageError(
            f"`coordinator` {coordinator}: process {process_id} of {num_processes} found the "
            f"others, but JAX could not start: {str(error).splitlines()[0]}; fix this, then start "
            "all of them again"
        ) from error


def _connect_pod(options: dict[str, Any]) -> None:
    """Joins the other processes of a TPU pod, if this is one's."""
    try:
        jax.distributed.initialize(**options)
        jax.process_count()
    except (ValueError, OSError) as error:
        print(f"no TPU pod found ({error}): this process trains alone", file=sys.stderr)
    except RuntimeError as error:
        raise UsageError(
            f"this process of a TPU pod did not find the others: {str(error).splitlines()[0]}; "
            "start the same command on every host of the pod, with no other process on its TPUs, "
            "or give each `coordinator`, `num_processes` and `process_id`"
        ) from error


def is_primary() -> bool:
    """Whether this is process 0, which writes the run's folder and talks to people."""
    return jax.process_index() == 0


def run_on_primary(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls `function` in process 0; every process gets its result, or its error.

    No process goes on before it has ended. The result has to be picklable.

    Raises:
      UsageError, OSError: in every process, where process 0 met one.
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
    """Calls `function` in every process; if it fails in one, it fails in all.

    Raises:
      UsageError: this process's, or what the first process that met one, or an OSError, said.
      OSError: this process's.
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
            raise UsageError(f"stopped, because process {number} did: {message.decode()}")
    return result


def require_same_config(config: dict[str, Any]) -> None:
    """Checks that every process has the configuration of process 0.

    Args:
      config: nested dicts of what JSON can hold.

    Raises:
      UsageError: in every process, with the differing fields.
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
    """The rows of all processes, for each batch those of process 0, then 1, and so on.

    Args:
      values: (batches, rows, ...) of this process, of a dtype that JAX has without 64-bit mode.

    Returns:
      (batches, processes * rows, ...), the same in every process.
    """
    if jax.process_count() == 1:
        return values
    from jax.experimental.multihost_utils import process_allgather

    stacked = np.moveaxis(process_allgather(values), 0, 1)
    return stacked.reshape(len(values), -1, *values.shape[2:])


class SyncedPreemption:
    """`stop`, answered alike in every process, once it is true in any of them.

    Every process has to call it equally often. They ask each other at every eighth call, which is
    once in eight dispatches of one or more updates: each question waits for those under way.

    Attributes:
      stop: of this process; its `signal` is set where it came to another one.
    """

    def __init__(self, stop: PreemptionHandler) -> None:
        self.stop = stop
        self._calls = 0
        self._agreed = False

    def __call__(self) -> bool:
        """Whether all are to stop."""
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
                        f"{self.stop.signal.name} came to process {numbers.argmax()}: process "
                        f"{jax.process_index()} stops too, after this update, which is kept",
                        file=sys.stderr,
                    )
        self._calls += 1
        return self._agreed


def is_peer_failure(error: Exception) -> bool:
    """Whether `error` is JAX's word for a process that does not answer, of whatever type it is."""
    return any(word in str(error) for word in ("Gloo", "NCCL", "UNAVAILABLE", "coordination"))


def exit_process(status: int) -> int:
    """The status to exit with; a failed process of several ends here, without waiting for others.

    JAX's own end waits for all processes, so those that wait for the failed one in a collective
    would never know. This one's end breaks their connection to it, and they end too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    # How many there are is not asked: that would start the devices, where it is they that failed.
    if status and jax.distributed.is_initialized():
        # Where all failed alike, each has the time to say so before process 0 takes the rest down.
        time.sleep(_EXIT_DELAY_SECONDS)
        os._exit(status)
    return status


def _broadcast(data: bytes) -> bytes:
    """The `data` of process 0, whatever that of the others is."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    # Sizes are sent as two numbers, since JAX has no 64-bit ones.
    size = divmod(len(data), _CHUNK)
    chunks, rest = map(int, broadcast_one_to_all(np.array(size, np.uint32)))
    parts = []
    for number, length in enumerate([_CHUNK] * chunks + [rest]):
        # Lengths are rounded up to a power of 2: JAX compiles anew for each that it meets.
        part = np.zeros(2 ** max(10, (length - 1).bit_length()), np.uint8)
        if is_primary():
            start = number * _CHUNK
            part[:length] = np.frombuffer(data, np.uint8, length, start)
        parts.append(broadcast_one_to_all(part)[:length].tobytes())
    return b"".join(parts)


def _gather(data: bytes) -> list[bytes]:
    """The `data` of every process, short enough to be gathered whole."""
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
    """Returns once all processes of a run are there, as many as each of them was told.

    Args:
      coordinator: HOST:PORT, of process 0; the port is free again afterwards.
      num_processes: how many processes there are.
      process_id: which of them this one is.
      seconds: how long to wait for the others.

    Raises:
      UsageError: in every process that is there: one is missing, two have the same number, or they
        disagree on how many they are. In this one: process 0 cannot be reached.
    """
    if process_id == 0:
        _coordinate(coordinator, num_processes, seconds)
        return
    with _join(coordinator, num_processes, process_id, seconds) as connection:
        # Process 0 may have come last, and then waits as long itself.
        connection.settimeout(seconds + _HELLO_SECONDS)
        _await_answer(connection, coordinator, process_id)


def _coordinate(coordinator: str, num_processes: int, seconds: float) -> None:
    """Process 0's part of the meeting."""
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
            if own in ready:  # So it is another process 0, on another machine, that listens there.
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
        # Before the answer, after which the others look for JAX's service at this port.
        listener.close()
        for number, _, connection in guests:
            try:
                connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")
            except OSError as error:
                problem = problem or f"process {number} ended before the run began ({error})"
    if problem:
        raise UsageError(problem)


def _listen(coordinator: str, num_processes: int) -> socket.socket:
    """A socket that listens at the coordinator's port, at all addresses, as JAX's service will."""
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
    """A connection to process 0, which has been told who this one is."""
    start = time.monotonic()
    while True:
        try:
            connection = socket.create_connection(_address(coordinator), _HELLO_SECONDS)
            # Where nothing listens at a port of this machine, a connection may meet itself.
            if connection.getsockname() != connection.getpeername():
                hello = {"process_id": process_id, "num_processes": num_processes}
                connection.sendall(json.dumps(hello).encode() + b"\n")
                return connection
            connection.close()
            reason, patience = "Connection refused", seconds
        except (socket.gaierror, UnicodeError) as error:
            # A cluster's name server may learn the name of a new machine a little later.
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
    """Returns where process 0 answers that the run begins."""
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
    """The number of the process that has connected, and how many it was told there are.

    None for anything else that connects to a port: scanners, or a process that has ended.
    """
    connection.settimeout(_HELLO_SECONDS)
    try:
        hello = json.loads(connection.makefile("rb").readline(_LINE))
        return int(hello["process_id"]), int(hello["num_processes"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _has_left(connection: socket.socket) -> bool:
    """Whether a process that waits for the answer has ended: until then it says nothing more."""
    return bool(select.select([connection], [], [], 0)[0])


def _disagreement(num_processes: int, guests: list[_Peer]) -> str:
    """What is wrong with those who are there; "" for nothing."""
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
    """Who of those that were to come did not."""
    there = {number for number, _, _ in guests}
    numbers = ", ".join(str(n) for n in range(num_processes) if n not in there)
    return (
        f"`coordinator` {coordinator}: of {num_processes} processes these did not connect in "
        f"{seconds:g} s: {numbers}; start each with its `process_id`, and check that its machine "
        "reaches this address and port"
    )


def _address(coordinator: str) -> tuple[str, int]:
    """Host and port; an IPv6 address has brackets around it."""
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)
