"""Several processes of one run, on this machine, against one process with as many devices."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.reliability import jobs
from inmerge_jax.cli.errors import PEER_LOST
from inmerge_jax.cli.train import main
from inmerge_jax.errors import UsageError
from inmerge_jax.training import multihost
from inmerge_jax.training.checkpointing import MANIFEST
from tests.training import host_worker
from tests.training.test_resume import REPOSITORY

OPTIONS = (
    "--size 16 --phantom.train 96 --phantom.val 27 --phantom.test 21 --model vgg11_bn "
    "--width 0.1 --skip 5 --batch-size 16 --epochs 2 --merging-epochs 1 --arms inmerge "
    "--recipe released --learning-rate 0.01 --threshold 0 --seeds 7"
).split()


def environment(devices):
    # Cheap to compile; the same for all that are compared.
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments, devices, cwd=REPOSITORY, **variables):
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**environment(devices), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def elsewhere(output):
    """Where process 1 works, like a host that shares no storage with process 0."""
    folder = output.parent / "host1"
    folder.mkdir(exist_ok=True)
    return folder


def start_all(output, *options, count=2):
    """The processes of a run of `inmerge train` with `count` devices in all."""
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    command = [
        "experiments.train",
        "--output",
        output.name,
        "--compilation-cache-dir",
        cache,
        *OPTIONS,
        *options,
    ]
    if count == 1:
        return [start(command, 2, output.parent)]
    command += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(count)]
    places = (output.parent, elsewhere(output))
    return [start([*command, "--process-id", str(i)], 1, places[i]) for i in range(count)]


def finish(processes, timeout=500):
    """Statuses and outputs; whatever still runs at the end is killed."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
        return [process.returncode for process in processes], said
    finally:
        for process in processes:
            process.kill()


def test_two_processes_agree_and_compute_what_one_does(tmp_path):
    port = str(free_port())
    outputs = [tmp_path / f"{process}.npz" for process in range(2)]
    worker = ["tests.training.host_worker", port]
    statuses, said = finish(
        [start([*worker, str(number), str(file)], 2) for number, file in enumerate(outputs)]
    )
    assert statuses == [0, 0], said
    expected = host_worker.train(tuple(jax.local_devices()[:4]))
    assert expected["merged"].sum() > 0 and expected["merged_in_validation"].sum() > 0
    first, second = (dict(np.load(file)) for file in outputs)
    assert set(first) == set(second) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        np.testing.assert_allclose(first[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    """What a run of one process with two devices leaves behind."""
    folder = tmp_path_factory.mktemp("hosts") / "one"
    (status,), said = finish(start_all(folder, count=1))
    assert status == 0, said
    return jobs.run_evidence(folder)


def interrupt(folder, number, kind):
    """Starts a run of two processes and sends one of them a signal after the first epoch."""
    processes = start_all(folder)
    try:
        # The manifest is written last: without it a checkpoint counts as absent.
        checkpoint = folder / "seed7" / "backbone" / "checkpoints" / "1" / MANIFEST
        deadline = time.monotonic() + 200
        while not checkpoint.exists():
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        processes[number].send_signal(kind)
    statuses, said = finish(processes)
    assert not (folder / "results.json").exists()
    assert list(elsewhere(folder).iterdir()) == []
    return statuses, said


def assert_resumes(folder, evidence):
    statuses, said = finish(start_all(folder, "--resume"))
    assert statuses == [0, 0], said
    assert "resumes from epoch" in said[0] and "report: " in said[0]
    # Process 1 says nothing but that it is there.
    lines = [line for line in said[1].splitlines() if not line.startswith("[Gloo]")]
    assert len(lines) == 1 and "process 1 of 2 connects to" in lines[0]
    assert jobs.run_evidence(folder) == evidence
    assert list(elsewhere(folder).iterdir()) == []


PAGE = (REPOSITORY / "docs" / "scaling.md").read_text()
INSTALL = (REPOSITORY / "docs" / "index.md").read_text().partition("\n## Install\n")[2]
ACTIVATE = "    . .venv/bin/activate\n"


def test_the_page_links_the_environment_before_its_first_command():
    assert PAGE.index("](index.md#install)") < PAGE.index("    XLA_FLAGS")
    assert f"    make setup\n{ACTIVATE}" in INSTALL


def enter_environment(folder):
    """Puts the environment of these tests where `make` would put it, and takes it off the path."""
    here = Path(sys.executable).parent
    if (here / "activate").exists():
        (folder / ".venv").symlink_to(here.parent)
    else:
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").write_text(f'export PATH="{here}:$PATH"\n')
    paths = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(path for path in paths if Path(path) != here)


@pytest.mark.long
def test_the_rehearsal_of_the_page_runs_word_for_word(tmp_path):
    (block,) = re.findall(r"(?:^    .*\n)*^    .*--process-id 1.*\n(?:^    .*\n)*", PAGE, re.M)
    assert block.count("inmerge train") == 2 and block.count("127.0.0.1:9876") == 1
    block = block.replace(":9876", f":{free_port()}")
    ran = subprocess.run(
        ["bash", "-ec", f"{ACTIVATE}command -v python\n{block}"],
        cwd=tmp_path,
        env={**os.environ, "PATH": enter_environment(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert Path(ran.stdout.splitlines()[0]).parent.samefile(Path(sys.executable).parent)
    output = tmp_path / "runs" / "rehearsal"
    results = json.loads((output / "results.json").read_bytes())
    assert results["environment"]["devices"]["processes"] == 2
    assert results["environment"]["devices"]["count"] == 4
    assert {"config.json", "report.html", "table.md"} <= set(os.listdir(output))


@pytest.mark.long
def test_a_run_that_loses_process_1_resumes_to_the_bits_of_one_process(tmp_path, evidence):
    statuses, said = interrupt(tmp_path / "two", 1, signal.SIGKILL)
    assert statuses == [PEER_LOST, -signal.SIGKILL], said
    assert "process 0 lost another process" in said[0] and "--resume" in said[0]
    assert_resumes(tmp_path / "two", evidence)


@pytest.mark.long
def test_a_run_that_loses_process_0_resumes_to_the_bits_of_one_process(tmp_path, evidence):
    # Process 0 holds the meeting point: where it is gone, JAX itself may end the others first.
    statuses, said = interrupt(tmp_path / "two", 0, signal.SIGKILL)
    assert statuses[0] == -signal.SIGKILL and statuses[1] in (
        PEER_LOST,
        -signal.SIGABRT,
    ), said
    assert "process 1 lost another process" in said[1] or "coordination" in said[1], said
    assert_resumes(tmp_path / "two", evidence)


@pytest.mark.long
def test_a_signal_in_process_1_stops_all_processes_and_the_run_resumes(tmp_path, evidence):
    statuses, said = interrupt(tmp_path / "two", 1, signal.SIGTERM)
    assert statuses == [128 + signal.SIGTERM] * 2, said
    assert "SIGTERM: stopping after this update" in said[1], said
    assert "process 1 received SIGTERM: process 0" in said[0] and "--resume" in said[0], said
    assert_resumes(tmp_path / "two", evidence)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("no")])
def test_no_error_of_one_of_several_processes_keeps_it_waiting(
    error, monkeypatch, capsys, tmp_path
):
    def fail(*_):
        raise error

    monkeypatch.setattr(multihost, "connect", fail)
    arguments = ["--output", str(tmp_path / "run"), "--compilation-cache-dir", "None"]
    with pytest.raises(type(error)):
        main(arguments)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "exit_process", lambda status: status)
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and str(error) in told


@pytest.mark.long
def test_one_process_with_other_options_or_variables_stops_all(tmp_path):
    first, second = start_all(tmp_path / "run")
    second.kill()
    second.wait()
    # The variable alone would have each process draw other kernels, and average their gradients.
    other = {"JAX_THREEFRY_PARTITIONABLE": "0"}
    own = ["--alpha", "0.5", "--compilation-cache-dir", str(tmp_path / "own")]
    second = start([*second.args[2:], *own], 1, elsewhere(tmp_path / "run"), **other)
    statuses, said = finish([first, second])
    assert statuses == [2, 2], said
    assert "not all processes see this folder" in said[0] and "--compilation-cache-dir" in said[0]
    assert "configuration of process 1 differs from process 0" in said[0]
    assert "rule.alpha: 0.8 in process 0, 0.5 here" in said[1]
    assert 'environment.JAX_THREEFRY_PARTITIONABLE: absent in process 0, "0" here' in said[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("10.0.0.1:80", None, None), "`num_processes` and `process_id` missing"),
        ((None, 2, 0), "`coordinator` missing"),
        (("10.0.0.1", 2, 0), "`coordinator` 10.0.0.1: give the address"),
        (("host:99999", 2, 0), "`coordinator` host:99999"),
        (("host:80", 0, 0), "`num_processes` 0: choose 1 or more"),
        (("host:80", 2, 2), "`process_id` 2: choose 0 to 1"),
        (("host:80", 2, -1), "`process_id` -1: choose 0 to 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, words):
    with pytest.raises(UsageError, match=words):
        multihost.check_process_options(*given)


def test_the_command_line_refuses_them_too(tmp_path, capsys):
    assert main(["--coordinator", "127.0.0.1:80", "--output", str(tmp_path / "run")]) == 2
    assert "--num-processes and --process-id missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("platforms", "error", "called"),
    [
        (None, None, 0),
        ("cpu", None, 0),
        ("tpu,cpu", None, 1),
        ("tpu,cpu", ValueError("coordinator_address should be defined."), 1),
        ("tpu,cpu", ConnectionError("no metadata server"), 1),
    ],
)
def test_only_a_tpu_joins_others_by_itself(monkeypatch, capsys, platforms, error, called):
    calls = []

    def initialize(*args, **options):
        calls.append(args)
        if error is not None:
            raise error

    before = jax.config.jax_platforms
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    try:
        jax.config.update("jax_platforms", platforms)
        multihost.connect(None, None, None)
    finally:
        jax.config.update("jax_platforms", before)
    assert calls == [(None, None, None)] * called
    assert ("runs alone" in capsys.readouterr().err) == (error is not None)


@pytest.mark.parametrize("fails", ["initialize", "process_count"])
def test_a_tpu_pod_whose_processes_do_not_meet_is_bad_input(fails, monkeypatch):
    def fail():
        raise RuntimeError("Failed to recognize coordinator address t1v-0\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    owner = jax.distributed if fails == "initialize" else jax
    monkeypatch.setattr(owner, fails, lambda *_, **__: fail())
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
        main(["--output", str(tmp_path / "run"), "--compilation-cache-dir", "None"])


@pytest.mark.parametrize(
    ("process", "host", "words"),
    [
        (0, "127.0.0.1", "process 0 cannot use port .*(Address already in use|EADDRINUSE).* port"),
        (1, "nowhere.invalid", "process 1 did not find process 0 there in 0 s .*open the port"),
        (1, "127.0.0.2", "process 1 did not find process 0 there in 0 s .*refused.*open the port"),
    ],
)
def test_a_port_in_use_and_a_wrong_coordinator_are_named(
    process, host, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(multihost.connect, "__defaults__", (0,))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("connected"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        coordinator = f"{host}:{taken.getsockname()[1]}"
        command = f"--coordinator {coordinator} --num-processes 2 --process-id {process}".split()
        command += ["--output", str(tmp_path / "run"), "--compilation-cache-dir", "None"]
        assert main(command) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"process {process} of 2 connects to {coordinator}; if another one")
    assert re.search(f"^error: --coordinator {coordinator}: {words}", err)
    assert not (tmp_path / "run").exists()


CONNECT = """
import sys
from inmerge_jax.errors import UsageError
from inmerge_jax.training.multihost import connect, exit_process

coordinator, count, number, seconds = sys.argv[1], *map(int, sys.argv[2:])
try:
    connect(coordinator, count, number, seconds)
except UsageError as error:
    print(error)
    exit_process(2)
"""


def connecting(address, count, number, seconds):
    numbers = map(str, (count, number, seconds))
    return subprocess.Popen(
        [sys.executable, "-c", CONNECT, address, *numbers],
        env=environment(1),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.long
def test_another_number_of_processes_is_refused():
    address = f"127.0.0.1:{free_port()}"
    processes = [connecting(address, count, n, 100) for n, count in enumerate((2, 3))]
    try:
        said = processes[1].communicate(timeout=100)[0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[1].returncode == 2, said
    assert "`num_processes` 3: process 0 was started with 2; give every process the same" in said


@pytest.mark.long
def test_a_process_that_never_appears_ends_the_others():
    (status,), (said,) = finish([connecting(f"127.0.0.1:{free_port()}", 2, 0, 2)])
    assert status == -signal.SIGABRT and "DEADLINE_EXCEEDED" in said
    assert "if another one does not appear in 2 s, JAX aborts this one" in said


def test_alone_a_process_agrees_with_itself():
    assert (
        multihost.is_primary()
        and multihost.run_on_primary(lambda: 5) == multihost.run_synced(lambda: 5) == 5
    )
    multihost.require_same_config({})
    assert multihost.exit_process(2) == 2


def test_a_given_coordinator_leaves_all_devices_to_the_process(monkeypatch):
    """Under Slurm, JAX would choose one GPU for each process."""
    given = []

    def initialize(*args, **options):
        given.append(options["cluster_detection_method"])

    monkeypatch.setattr(multihost, "_check_coordinator", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    before = jax.config.jax_platforms, jax.config.jax_cpu_collectives_implementation
    try:
        multihost.connect("127.0.0.1:9876", 1, 0)
        jax.config.update("jax_platforms", "tpu,cpu")
        multihost.connect(None, None, None)
    finally:
        jax.config.update("jax_platforms", before[0])
        jax.config.update("jax_cpu_collectives_implementation", before[1])
    assert given == ["deactivate", None]


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("Gloo all-reduce failed: Connection closed by peer", True),
        ("UNAVAILABLE: the heartbeat of task 1 is missing", True),
        ("The coordination service has ended", True),
        ("NCCL operation failed: remote process exited or there was a network error", True),
        ("NCCL: socketProgress: Connection closed by remote peer", True),
        ("NCCL: Error while creating shared memory segment /dev/shm/nccl-1: No space left", False),
        ("RESOURCE_EXHAUSTED: Out of memory", False),
    ],
)
def test_an_error_of_this_machine_is_no_lost_process(text, lost):
    assert multihost.is_peer_failure(RuntimeError(text)) is lost
