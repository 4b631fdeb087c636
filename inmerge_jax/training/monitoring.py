"""What a stage writes for people to watch: scalars for TensorBoard, a profile of some updates."""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from inmerge_jax.buckets import in_bucket
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_errors
from inmerge_jax.training.metrics import METRICS

_WARM_UP = 2
"""Dispatches of an epoch before a trace; the first may compile."""
_VAL_METRICS = tuple(f"val_{name}" for name in METRICS)


def check_monitoring(
    output: Path, *, tensorboard: bool, profile: int | None, updates: int, steps_per_execution: int
) -> None:
    """Checks the options before anything is trained.

    Args:
      output: folder of the run.
      tensorboard: whether scalars are written.
      profile: number of updates to trace.
      updates: number of updates per epoch.
      steps_per_execution: updates per dispatch.

    Raises:
      UsageError: a package is missing, the folder is a bucket, or an epoch has too few updates.
    """
    wanted = {"tensorboard": tensorboard, "profile": profile is not None}
    for name in (name for name, given in wanted.items() if given):
        if in_bucket(output):
            raise UsageError(f"`{name}` writes local files; `output` is {output}: leave it out")
    if tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UsageError("`tensorboard` needs a package: pip install tensorboardX")
    most = (updates // steps_per_execution - _WARM_UP) * steps_per_execution
    if profile is not None and not 1 <= profile <= most:
        remedy = f"choose 1 to {most}" if most > 0 else "leave it out"
        raise UsageError(
            f"`profile` {profile}: an epoch has {updates} updates, of which the first "
            f"{_WARM_UP * steps_per_execution} are not traced; {remedy}"
        )


class StageMonitor:
    """The files of one stage; without options it writes nothing. A context for its stage."""

    def __init__(
        self,
        folder: Path = Path(),
        *,
        tensorboard: bool = False,
        profile: int = 0,
        steps_per_execution: int = 1,
    ) -> None:
        """Opens no file yet.

        Args:
          folder: the stage's folder.
          tensorboard: write scalars to its folder "tensorboard".
          profile: number of updates to trace, into its folder "profile".
          steps_per_execution: updates per dispatch.
        """
        self._board = folder / "tensorboard" if tensorboard else None
        self._profile = folder / "profile"
        self._steps_per_execution = steps_per_execution
        self._waiting = -(-profile // steps_per_execution)
        self._dispatches, self._start, self._tracing = 0, -1, False
        self._names: Sequence[str] = ()
        self._events: Any = None

    def __enter__(self) -> Self:
        """Returns the monitor."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends a trace and closes the file."""
        if self._tracing:
            jax.profiler.stop_trace()
        if self._events is not None:
            self._events.close()

    def stage_started(
        self,
        names: Sequence[str],
        history: Sequence[Mapping[str, Any]],
        layers: Sequence[Mapping[str, Any]],
    ) -> None:
        """Writes everything up to here into a new file, and deletes those of earlier starts.

        Args:
          names: names of the layers that merge.
          history: the lines of metrics.jsonl.
          layers: similarity of every layer before the stage, see `LayerSimilarity.to_dict`.
        """
        if self._board is None:
            return
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._names = names
        with write_errors(self._board):
            self._board.mkdir(parents=True, exist_ok=True)
            for old in self._board.glob("events.out.tfevents.*"):
                old.unlink()
            self._events = EventsWriter(str(self._board / "events"))
            # A TensorBoard that is open drops what it has read of the deleted files.
            restart = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=0, session_log=restart))
        ago = sum(line["seconds"] for line in history)
        self._write(0, _similarities(layers), ago)
        for line in history:
            ago -= line["seconds"]
            self.epoch_finished(line, ago)

    def epoch_started(self, updates: int) -> None:
        """Notes that the loop will run this many updates of the epoch."""
        enough = _WARM_UP + self._waiting <= updates // self._steps_per_execution
        self._dispatches, self._start = 0, _WARM_UP if self._waiting and enough else -1

    def dispatched(self, result: Any) -> None:
        """Starts or ends the trace after this dispatch, whose result it then waits for."""
        self._dispatches += 1
        if self._dispatches == self._start:
            jax.block_until_ready(result)
            jax.profiler.start_trace(self._profile)
            self._tracing = True
        elif self._tracing and self._dispatches == self._start + self._waiting:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._tracing, self._waiting = False, 0

    def epoch_finished(self, line: Mapping[str, Any], ago: float = 0.0) -> None:
        """Writes the scalars of a line of metrics.jsonl, whose epoch ended `ago` seconds ago."""
        scalars = {
            "loss/train": line["train_loss"],
            "loss/val": line["val_loss"],
            **{f"metrics/{name}": line[name] for name in _VAL_METRICS if name in line},
            "learning_rate": line["learning_rate"],
            "images_per_second": line["images_per_second"],
        }
        for place, name in enumerate(self._names):
            for kind in ("selected", "merged", "val_selected", "val_merged"):
                if kind in line:
                    scalars[f"{kind}/{name}"] = line[kind][place]
            if line["merged"][place]:
                scalars[f"merged_similarity/{name}"] = line["similarity"][place]
        self._write(line["step"], scalars, ago)

    def stage_finished(self, step: int, layers: Sequence[Mapping[str, Any]]) -> None:
        """Writes the similarity of every layer in the best checkpoint, of update `step`."""
        self._write(step, _similarities(layers))

    def _write(self, step: int, scalars: Mapping[str, float | None], ago: float = 0.0) -> None:
        if self._events is None:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
            if value is not None
        ]
        event = Event(wall_time=time.time() - ago, step=step, summary=Summary(value=values))
        with write_errors(self._board):
            self._events.write_event(event)
            self._events.flush()


def _similarities(layers: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    kinds = {"mean": "similarity_mean", "nearest": "similarity_nearest"}
    return {
        f"{tag}/{layer['name']}": layer[kind] for layer in layers for kind, tag in kinds.items()
    }
