import io
import re

from rich.console import Console

from inmerge_jax import progress
from inmerge_jax.progress import Progress


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def lines(console):
    """What a terminal would have shown, frame after frame."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", console.file.getvalue()).replace("\r", "\n")
    return [line.strip() for line in text.split("\n") if line.strip()]


def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_counts_from_the_first_update(monkeypatch):
    now, console = clock(monkeypatch), terminal()
    with Progress(100, console) as line:
        line.describe("seed 0 backbone 1/2", "compiling")
        assert lines(console)[-1].endswith("compiling") and "ETA" not in lines(console)[-1]
        now[0] += 60  # Compilation.
        line.advance(10)
        line.update("loss 1.0")
        assert lines(console)[-1].endswith("loss 1.0  ETA -")
        now[0] += 2
        line.advance(20)
        line.update("loss 0.5")
        assert lines(console)[-1].endswith("loss 0.5  10 img/s  ETA 0:07")
        line.describe("seed 0 backbone 2/2")
        assert lines(console)[-1].startswith("seed 0 backbone 2/2")
        assert lines(console)[-1].endswith("loss 0.5  10 img/s  ETA 0:07") and line.rate == 0


def test_without_a_terminal_there_is_a_line_a_minute_and_one_per_milestone(monkeypatch):
    now, text = clock(monkeypatch), io.StringIO()
    with Progress(4000, Console(file=text, width=40), description="epoch 1/2", done=10) as line:
        for _ in range(10):
            line.advance(140)
            line.update("loss 1.0")
            now[0] += 14
        line.milestone("loss 0.9", "val loss 0.8")
        line.describe("epoch 2/2")
        line.milestone("loss 0.7", "val loss 0.6")
        line.finish()
    assert text.getvalue() == (
        "epoch 1/2  loss 1.0  10 img/s  ETA 5:15\n"
        "epoch 1/2  loss 0.9  9 img/s  ETA 4:48  val loss 0.8\n"
        "epoch 2/2  loss 0.7  ETA 4:48  val loss 0.6\n"
        "epoch 2/2  1,410 of 4,000\n"
    )
