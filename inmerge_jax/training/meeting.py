"""How the processes of a run find each other, before JAX does: its own search ends in aborts.

Process 0 listens at the coordinator's address and every process, process 0 too, connects to it and
says who it is. Once all are there, or cannot be, process 0 lets the port go and answers them all.
"""

import contextlib
import json
import os
import select
import socket
import time
from collections import Counter

from inmerge_jax.errors import InputError

MEETING_SECONDS = 300.0
"""How long a process waits for the others."""

_NAME_SECONDS = 10.0
_HELLO_SECONDS = 5.0
_RETRY_SECONDS = 0.2
_LINE = 2**16

_Guest = tuple[int, int, socket.socket]


def meet(
    coordinator: str, num_processes: int, process_id: int, seconds: float = MEETING_SECONDS
) -> None:
    """Returns once all processes of a run are there, as many as each of them was told.

    Args:
      coordinator: HOST:PORT, of process 0; the port is free again afterwards.
      num_processes: how many processes there are.
      process_id: which of them this one is.
      seconds: how long to wait for the others.

    Raises:
      InputError: in every process that is there: one is missing, two have the same number, or they
        disagree on how many they are. In this one: process 0 cannot be reached.
    """
    if process_id == 0:
        _receive(coordinator, num_processes, seconds)
        return
    with _introduce(coordinator, num_processes, process_id, seconds) as connection:
        # Process 0 may have come last, and then waits as long itself.
        connection.settimeout(seconds + _HELLO_SECONDS)
        _obey(connection, coordinator, process_id)


def _receive(coordinator: str, num_processes: int, seconds: float) -> None:
    """Process 0's part of the meeting."""
    deadline = time.monotonic() + seconds
    guests: list[_Guest] = []
    problem = ""
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(_listen(coordinator, num_processes))
        patience = min(seconds, _NAME_SECONDS)
        own = opened.enter_context(_introduce(coordinator, num_processes, 0, patience))
        own.settimeout(_HELLO_SECONDS)
        while not problem and len(guests) < num_processes:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([listener, own], [], [], left)
            if own in ready:  # So it is another process 0, on another machine, that listens there.
                _obey(own, coordinator, 0)
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
        raise InputError(problem)


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
        raise InputError(
            f"--coordinator {coordinator}: process 0 cannot use port {port} of its machine "
            f"({os.strerror(error.errno)}); choose another one, the same for every process, or end "
            "the process that has it: is it another one with --process-id 0?"
        ) from error


def _introduce(
    coordinator: str, num_processes: int, process_id: int, seconds: float
) -> socket.socket:
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
            raise InputError(
                f"--coordinator {coordinator}: process {process_id} of {num_processes} did not "
                f"find process 0 there in {patience:g} s ({reason}); start it, with --process-id "
                f"0, {where}, and open the port to the others"
            )
        time.sleep(_RETRY_SECONDS)


def _obey(connection: socket.socket, coordinator: str, process_id: int) -> None:
    """Returns where process 0 answers that the run begins."""
    try:
        problem = json.loads(connection.makefile("rb").readline(_LINE))["problem"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"--coordinator {coordinator}: process {process_id} got no answer there from process 0 "
            f"({error}): it ended, or its run has begun without this process, or the port is "
            "another program's; start all processes again, each with another --process-id, or "
            "choose another port"
        ) from error
    if problem:
        raise InputError(problem)


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


def _disagreement(num_processes: int, guests: list[_Guest]) -> str:
    """What is wrong with those who are there; "" for nothing."""
    for number, count, _ in guests:
        if count != num_processes:
            return (
                f"process {number} was started with --num-processes {count}, process 0 with "
                f"{num_processes}; give every process the same"
            )
    for number, count in Counter(number for number, _, _ in guests).items():
        if count > 1:
            return (
                f"two processes were started with --process-id {number}; choose 0 to "
                f"{num_processes - 1}, another one in each of the {num_processes} processes"
            )
    return ""


def _missing(coordinator: str, num_processes: int, guests: list[_Guest], seconds: float) -> str:
    """Who of those that were to come did not."""
    there = {number for number, _, _ in guests}
    numbers = ", ".join(str(n) for n in range(num_processes) if n not in there)
    return (
        f"--coordinator {coordinator}: of {num_processes} processes these did not come in "
        f"{seconds:g} s: {numbers}; start each with its --process-id, and see whether its machine "
        "reaches this address and port"
    )


def _address(coordinator: str) -> tuple[str, int]:
    """Host and port; an IPv6 address has brackets around it."""
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)
