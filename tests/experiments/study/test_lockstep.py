"""Steps of several trainings as one call: who gets what, and who waits for whom."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study.lockstep import Lockstep
from inmerge_jax.training.parallel import DATA_AXIS, replicate

DEVICES = jax.local_devices()[:3]


def add(state, number):
    return {"sum": state["sum"] + number, "draw": jax.random.uniform(state["key"])}


def make(devices=DEVICES):
    calls = []

    def counted(name, body):
        step = jax.pmap(body, DATA_AXIS, devices=devices)

        def call(*arguments):
            calls.append(name)
            return step(*arguments)

        return call

    steps = {"add": counted("add", add), "double": counted("double", lambda x: 2 * x)}
    return Lockstep(devices, steps), calls


def each(lockstep, work):
    def run(number, seat):
        with seat, jax.default_device(seat.device):
            return work(number, seat)

    with ThreadPoolExecutor(len(lockstep.seats)) as pool:
        futures = [pool.submit(run, *pair) for pair in enumerate(lockstep.seats)]
    return [future.exception() or future.result() for future in futures]


def refuse(*_):
    raise AssertionError("called alone")


def test_each_gets_its_own_part_of_one_call():
    lockstep, calls = make()

    def work(number, seat):
        step = seat.step("add", refuse)
        state = replicate({"sum": np.float32(number)}, (seat.device,))
        state["key"] = jax.device_put(jax.random.key(number), seat.device)
        for _ in range(4):
            out = step(state, replicate(np.float32(10), (seat.device,)))
            state = {"sum": out["sum"], "key": state["key"]}
        assert out["sum"].shape == (1,) and out["sum"].devices() == {seat.device}
        return float(out["sum"][0]), float(out["draw"][0])

    expected = [(n + 40.0, float(jax.random.uniform(jax.random.key(n)))) for n in range(3)]
    assert each(lockstep, work) == expected
    assert calls == ["add"] * 4 and lockstep.joint == 4


def test_who_is_behind_catches_up_alone_and_who_is_left_goes_on_alone():
    lockstep, calls = make()

    def work(number, seat):
        x = replicate(np.float32(number), (seat.device,))
        double = seat.step("double", lambda x: -x)
        other = seat.step("add", lambda x: x + 100)
        x = double(x)
        # The step "add" comes first, so number 2 does it alone, while the others wait.
        x = other(x) if number == 2 else x
        x = double(x)
        if number == 1:
            return float(x[0])
        return float(double(x)[0])

    assert each(lockstep, work) == [0.0, 4.0, -208.0]
    assert calls == ["double", "double"]


def test_who_is_left_waits_for_nobody():
    lockstep, _ = make()
    held = threading.Event()

    def work(number, seat):
        x = replicate(np.float32(number), (seat.device,))
        double = seat.step("double", lambda x: -x)
        x = double(x)
        if number == 0:
            return float(x[0])
        if number == 1:
            assert held.wait(30), "number 2 waited for a call of number 1"
        for _ in range(5):
            x = double(x)
        held.set()
        return float(x[0])

    assert each(lockstep, work) == [0.0, -2.0, -4.0]


def test_all_stop_after_the_same_call():
    answers = iter([False] * 5 + [True] * 1000)
    steps = {"double": jax.pmap(lambda x: 2 * x, DATA_AXIS, devices=DEVICES)}
    lockstep = Lockstep(DEVICES, steps, lambda: next(answers))

    def work(number, seat):
        x, calls = replicate(np.float32(number), (seat.device,)), 0
        while not seat.should_stop():
            x, calls = seat.step("double", refuse)(x), calls + 1
        return calls

    assert each(lockstep, work) == [6, 6, 6]


def test_an_error_of_one_leaves_the_others_going_and_of_the_call_reaches_all():
    lockstep, calls = make()

    def work(number, seat):
        double = seat.step("double", lambda x: 2 * x)
        x = double(replicate(np.float32(1), (seat.device,)))
        if number == 0:
            raise ValueError("diverged")
        return float(double(x)[0])

    failed, *others = each(lockstep, work)
    assert isinstance(failed, ValueError) and others == [4.0, 4.0] and calls == ["double"]

    lockstep, _ = make()
    wrong = each(lockstep, lambda n, seat: seat.step("double", refuse)(jnp.ones((1, n + 1))))
    assert len({str(error) for error in wrong}) == 1
    assert all(isinstance(error, ValueError) for error in wrong)

    # An array that is on no device cannot be given out.
    lockstep = Lockstep(DEVICES, {"double": lambda x: np.ones(3)})
    wrong = each(lockstep, lambda n, seat: seat.step("double", refuse)(jnp.ones((1, 2))))
    assert all(isinstance(error, AttributeError) for error in wrong)


def test_the_program_does_not_depend_on_who_comes_last():
    traced = []

    def double(x):
        traced.append(x.shape)
        return 2 * x

    lockstep = Lockstep(DEVICES, {"double": jax.pmap(double, DATA_AXIS, devices=DEVICES)})

    def work(number, seat):
        x = replicate(np.float32(number), (seat.device,))
        for _ in range(30):
            x = seat.step("double", refuse)(x)
        return float(x[0])

    assert each(lockstep, work) == [0.0, 2.0**30, 2.0**31]
    assert traced == [()]
