"""One run of the command: its time, its folder, and the cases that it measures one by one."""

import contextlib
import json
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.accelerator.source import source_digest
from inmerge_jax.errors import UsageError
from inmerge_jax.files import read_json_object, write_json
from inmerge_jax.training.environment import environment, numerics_fingerprint

PARTS = {"correctness": 0.25, "merge": 0.4, "step": 0.8, "trials": 1.0}
"""The parts in their order, each with the share of the time by which it ends."""


_MACHINE = ("tiny", "device", "platform", "devices", "driver", "commit", "source", "environment")


@dataclass
class Session:
    """Measures cases until the time is used, and stores each result when it is there.

    Attributes:
      folder: of the results: one JSON file for each part.
      seconds: that all parts have together.
      tiny: whether to use tiny sizes, which check that everything runs.
      started: when the time began, see `time.monotonic`.
      found: what is stored of each part; see `read_part`.
      around: of `describe_machine`.
      current: part and name of the case that was begun last.
    """

    folder: Path
    seconds: float
    tiny: bool = False
    started: float = field(default_factory=time.monotonic)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    around: dict[str, Any] = field(default_factory=dict)
    current: tuple[str, str] | None = None

    def left(self, part: str) -> float:
        """Seconds until this part ends; time that earlier parts left unused is added to it."""
        return self.started + self.seconds * PARTS[part] - time.monotonic()

    def enters(self, part: str, run: bool = True) -> None:
        """Reads what the folder holds of a part; what failed or had no time is tried again.

        Failures are kept until then.

        Args:
          part: of `PARTS`.
          run: whether the part is to be run, so that its file is written.
        """
        kept = read_part(self.folder, part) or {"cases": {}}
        failed = kept.get("failed", {})
        self.found[part] = {**self.around, "cases": kept["cases"], "failed": failed, "skipped": {}}
        if run:
            self.store(part)

    def attempt(
        self, part: str, name: str, seconds: float, measure: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Measures a case, unless it is stored or the time left is less than it needs.

        A case that raises an exception is stored with its traceback, and the next one follows: time
        on an accelerator is too rare for one fault to end all.

        Args:
          part: of `PARTS`.
          name: of the case.
          seconds: that it needs, estimated.
          measure: does it, and returns its result, JSON-ready.
        """
        found = self.found[part]
        left = self.left(part)
        if name in found["cases"]:
            return
        if seconds > left:
            found["skipped"][name] = f"needs about {seconds:.0f} s; {max(left, 0):.0f} s were left"
        else:
            say(f"{part}: {name} ({left:.0f} s left)")
            self.current = part, name
            found["failed"].pop(name, None)
            before = time.monotonic()
            with failures(found["failed"], name):
                result = measure()
                took = time.monotonic() - before
                found["cases"][name] = {**result, "seconds": took, "commit": self.around["commit"]}
        self.store(part)

    def cut_off(self, parts: Sequence[str]) -> None:
        """Stores which case the end of the time cut off, and which parts were not begun.

        Args:
          parts: that were to be run, in their order.
        """
        begun = -1
        if self.current is not None:
            part, name = self.current
            begun = parts.index(part)
            skipped = self.found[part]["skipped"]
            if name not in self.found[part]["cases"]:
                skipped[name] = "cut off when the time was over"
            skipped["further cases"] = "not begun"
            self.store(part)
        for part in parts[begun + 1 :]:
            self.found[part]["skipped"]["all cases"] = "not begun"
            self.store(part)

    def store(self, part: str) -> None:
        """Writes what there is of a part."""
        write_json(self.folder / f"{part}.json", self.found[part])


@contextlib.contextmanager
def failures(failed: dict[str, str], name: str) -> Iterator[None]:
    """Writes the traceback of an exception into `failed`, so that what was measured is kept."""
    try:
        yield
    except Exception:
        failed[name] = traceback.format_exc()
        say(failed[name])


def say(text: str) -> None:
    """Prints a line at once, so that a run that is cut off has said what it was doing."""
    print(text, flush=True)


def describe_machine(tiny: bool) -> dict[str, Any]:
    """Device, driver, commit, digest of the source and the environment, JSON-ready."""
    device, around = jax.local_devices()[0], environment()
    return {
        "tiny": tiny,
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.local_device_count(),
        "driver": driver(),
        "commit": around["git"]["commit"],
        "source": source_digest(),
        "environment": around,
    }


def driver() -> str | None:
    """Version of NVIDIA's driver, or of the runtime that JAX names; None on CPU."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    if device.platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=True)
            return done.stdout.splitlines()[0].strip()
        except (OSError, subprocess.CalledProcessError, IndexError):
            pass  # No NVIDIA tools: what JAX says is all there is.
    return device.client.platform_version.splitlines()[0]


def read_part(folder: Path, part: str) -> dict[str, Any] | None:
    """What a folder holds of a part; None where it holds nothing.

    Keys: those of `describe_machine`; "cases", by name what came out; "failed", by name the
    traceback; "skipped", by name the reason.

    Raises:
      UsageError: the file is damaged.
    """
    path = folder / f"{part}.json"
    if not path.exists():
        return None
    found = read_json_object(path, "remove it, or choose another folder")
    missing = {*_MACHINE, "cases", "failed", "skipped"} - set(found)
    if missing:
        raise UsageError(f"{path} has no {', '.join(sorted(missing))}: it is not of this command")
    return found


def check_folder(folder: Path, around: Mapping[str, Any]) -> None:
    """Checks that results can be added to a folder.

    Raises:
      UsageError: it can't be written, or holds results of other source code, packages or devices.
    """
    for part in PARTS:
        kept = read_part(folder, part)
        if not kept:
            continue
        for name in ("source", "device", "devices", "driver", "tiny"):
            if kept[name] != around[name]:
                other = kept.get("commit") or "unknown"
                raise UsageError(
                    f"--output {folder}: {part}.json has {name} {kept[name]} (commit {other}), but "
                    f"this is {around[name]} (commit {around['commit'] or 'unknown'}): choose "
                    "another folder"
                )
        before, now = (_conditions(one["environment"]) for one in (kept, around))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise UsageError(
                    f"--output {folder}: {part}.json has {name} {before.get(name)}, but this is "
                    f"{now.get(name)}: choose another folder"
                )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--output {folder}: cannot be written ({error.strerror})") from error


def _conditions(env: dict[str, Any]) -> dict[str, Any]:
    """Packages and variables that times depend on; the source has its digest."""
    found = {**numerics_fingerprint(env), "torch": env["packages"].get("torch")}
    return {name: value for name, value in found.items() if name != "commit"}


def to_json(value: Any) -> Any:
    """`value` as JSON will return it."""
    return json.loads(json.dumps(value))
