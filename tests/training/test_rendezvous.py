"""Processes that do not find each other, or disagree, say so instead of waiting or crashing."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from inmerge_jax.cli import train
from inmerge_jax.errors import UsageError
from inmerge_jax.training import multihost
from inmerge_jax.training import multihost as meeting
from inmerge_jax.training.multihost import rendezvous
from tests.training.test_multihost import free_port

SOON = 20.0


def all_meet(*calls, seconds=SOON):
    """What each process of (number, number of processes) says; "" where the run begins."""
    coordinator = f"127.0.0.1:{free_port()}"

    def one(call):
        number, count = call
        try:
            rendezvous(coordinator, count, number, seconds)
        except UsageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(calls)) as pool:
        said = list(pool.map(one, calls))
    # Whatever happened, process 0 has let the port go.
    socket.create_server(("127.0.0.1", int(coordinator.rpartition(":")[2]))).close()
    return said


def connect(port):
    """A connection to `port` of this machine, as soon as somebody listens there."""
    for _ in range(int(SOON / 0.02)):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.02)
    raise AssertionError(f"nobody listens at port {port}")


@pytest.mark.parametrize("numbers", [[0], [0, 1], [2, 1, 0, 3]])
def test_all_meet_in_any_order(numbers):
    assert all_meet(*((number, len(numbers)) for number in numbers)) == [""] * len(numbers)


def test_a_process_that_comes_before_process_0_waits_for_it():
    coordinator = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(rendezvous, coordinator, 2, 1, SOON)
        time.sleep(0.5)
        assert not early.done()
        rendezvous(coordinator, 2, 0, SOON)
        assert early.result(SOON) is None


def test_another_number_of_processes_stops_all():
    said = all_meet((0, 2), (1, 3))
    assert said[0] == said[1]
    assert "process 1 was started with `num_processes` 3, process 0 with 2" in said[0]


def test_a_number_that_two_processes_have_stops_all():
    said = all_meet((0, 3), (1, 3), (1, 3))
    assert said[0] == said[1] == said[2]
    assert "two processes were started with `process_id` 1; choose 0 to 2" in said[0]


def test_a_second_process_0_on_the_same_machine_finds_the_port_taken():
    said = all_meet((0, 2), (0, 2), seconds=1.0)
    (taken,) = (text for text in said if "cannot use port" in text)
    assert "(Address already in use)" in taken and "another one with `process_id` 0" in taken
    (alone,) = (text for text in said if text != taken)
    assert "these did not connect in 1 s: 1" in alone


def test_a_second_process_0_on_another_machine_stops_both(monkeypatch):
    port = free_port()
    listen = meeting._listen
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(rendezvous, f"127.0.0.1:{port}", 2, 0, SOON)
        connect(port).close()
        # The other machine's own port is free.
        monkeypatch.setattr(meeting, "_listen", lambda _, n: listen(f"127.0.0.1:{free_port()}", n))
        with pytest.raises(UsageError, match="two processes were started with `process_id` 0"):
            rendezvous(f"127.0.0.1:{port}", 2, 0, SOON)
        with pytest.raises(UsageError, match="two processes were started with `process_id` 0"):
            first.result(SOON)


def test_process_0_names_those_that_do_not_come():
    said = all_meet((0, 4), (2, 4), seconds=1.0)
    assert said[0] == said[1] and "these did not connect in 1 s: 1, 3; start each" in said[0]


def test_a_process_that_left_may_come_again():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(rendezvous, f"127.0.0.1:{port}", 3, 0, SOON)
        meeting._join(f"127.0.0.1:{port}", 3, 1, SOON).close()
        others = [
            threading.Thread(target=rendezvous, args=(f"127.0.0.1:{port}", 3, number, SOON))
            for number in (1, 2)
        ]
        for other in others:
            other.start()
        assert first.result(SOON) is None
        for other in others:
            other.join(SOON)


def test_strangers_at_the_port_are_passed_over():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(rendezvous, f"127.0.0.1:{port}", 2, 0, SOON)
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"process_id": "x"}\n'):
            with connect(port) as stranger:
                stranger.sendall(words)
        rendezvous(f"127.0.0.1:{port}", 2, 1, SOON)
        assert first.result(SOON) is None


@pytest.mark.parametrize("process", [0, 1])
def test_an_unknown_host_is_named(process):
    coordinator = f"nowhere.invalid:{free_port()}"
    with pytest.raises(UsageError, match=r"nowhere\.invalid:.* \(unknown host: "):
        rendezvous(coordinator, 2, process, 0.1)


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_0_that_is_not_there_is_named(process, monkeypatch):
    # Process 0 itself has to be on the machine of that address.
    elsewhere = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(meeting, "_listen", lambda *_: elsewhere)
    with pytest.raises(UsageError, match=r"did not find process 0 there in 0\.1 s \(.*refused\)"):
        rendezvous(f"127.0.0.1:{free_port()}", 2, process, 0.1)
    elsewhere.close()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_another_program_at_the_port_is_not_process_0(answer):
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def serve():
            with server.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(answer)

        pool.submit(serve)
        with pytest.raises(UsageError, match="process 1 got no answer from process 0"):
            rendezvous(f"127.0.0.1:{server.getsockname()[1]}", 2, 1, SOON)


@pytest.mark.parametrize(
    ("process", "host", "words"),
    [(0, "127.0.0.1", "cannot use port"), (1, "nowhere.invalid", "unknown host")],
)
def test_the_command_ends_with_the_message(process, host, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "_NAME_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        coordinator = f"{host}:{taken.getsockname()[1]}"
        command = f"--coordinator {coordinator} --num-processes 2 --process-id {process}".split()
        status = train.main(
            [*command, "--output", str(tmp_path / "run"), "--compilation-cache-dir", "None"]
        )
    out, err = capsys.readouterr()
    assert status == 2 and not jax.distributed.is_initialized()
    assert out.startswith(f"process {process} of 2 connects to {coordinator} and waits")
    assert f"error: --coordinator {coordinator}: process {process}" in err and words in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", ["initialize", "process_count"])
def test_a_tpu_pod_whose_processes_do_not_meet_is_bad_input(fails, monkeypatch):
    def fail():
        raise RuntimeError("Failed to recognize coordinator address t1v-0\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        *(jax.distributed if fails == "initialize" else jax, fails), lambda **_: fail()
    )
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", "tpu,cpu")
        with pytest.raises(UsageError, match="coordinator address t1v-0; start the same command"):
            multihost.connect(None, None, None)
    finally:
        jax.config.update("jax_platforms", before)


def test_an_error_of_a_process_alone_is_raised_without_counting_processes(monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("Unable to initialize backend 'tpu': UNAVAILABLE")

    monkeypatch.setattr(multihost, "connect", fail)
    monkeypatch.setattr(jax, "process_count", lambda: pytest.fail("started the devices"))
    with pytest.raises(RuntimeError, match="Unable to initialize"):
        train.main(["--output", str(tmp_path / "run"), "--compilation-cache-dir", "None"])
