"""Trains a backbone, then goes on with and without in-model merging: `--help` tells the rest."""

import errno
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from inmerge_jax.errors import UsageError

if TYPE_CHECKING:
    from inmerge_jax.training.config import TrainConfig

_NO_RIGHTS = (errno.EACCES, errno.EPERM)
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, *_NO_RIGHTS)


def only_unreported(folder: Path, resume: bool) -> bool:
    """Whether to resume a run that was stopped between its results and the last of its report."""
    from inmerge_jax.cli.report import TABLE

    return resume and (folder / "results.json").exists() and not (folder / TABLE).exists()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the status.

    That is 0; 1 where training diverged, or one of several processes broke; 2 on bad input, a full
    disk too; 3 where another process of the run was lost; 143 where SIGTERM stopped it (preemption)
    and 130 where Ctrl-C did, after either of which `--resume` goes on with the update after the
    last.
    """
    from inmerge_jax.training.config import parse_config

    status = _run(parse_config(arguments))

    from inmerge_jax.training.multihost import exit_process

    return exit_process(status)


def _run(config: "TrainConfig") -> int:
    from inmerge_jax.training.environment import enable_compilation_cache

    if config.compilation_cache_dir is not None:
        enable_compilation_cache(config.compilation_cache_dir)

    from inmerge_jax.cli.report import write_and_print
    from inmerge_jax.training.experiment import make_run_spec, run_experiment
    from inmerge_jax.training.multihost import SyncedPreemption, connect, run_on_primary, run_synced
    from inmerge_jax.training.preemption import PreemptionHandler, TrainingInterrupted
    from inmerge_jax.training.train import NonFiniteLossError
    from inmerge_jax.training.workdir import write_error

    stop = PreemptionHandler()
    try:
        connect(config.coordinator, config.num_processes, config.process_id)
        if not run_on_primary(only_unreported, config.output, config.resume):
            plan = run_synced(make_run_spec, config)
            with stop:
                run_experiment(plan, SyncedPreemption(stop))
        run_on_primary(write_and_print, config.output)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            return _unforeseen(error)
        if error.errno in _NO_RIGHTS:  # Perhaps of a file that was to be read.
            print(f"error: {error}; give rights to it, then start again", file=sys.stderr)
        else:
            print(f"error: {write_error(error.filename or config.output, error)}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except TrainingInterrupted as stopped:
        print(f"{stopped}; the same command with --resume goes on", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("stopped at once; the same command with --resume goes on", file=sys.stderr)
        return 130
    except Exception as error:
        return _unforeseen(error)
    return 0


def _unforeseen(error: Exception) -> int:
    """Raises the error, or tells of it and gives the status where other processes wait."""
    import jax

    from inmerge_jax.training.multihost import PEER_FAILURE, is_peer_failure

    # In this order: to count the processes starts the devices, which may be what has failed.
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        raise error
    # Not raised: the interpreter's end would wait for processes that wait for this one.
    if not is_peer_failure(error):
        traceback.print_exc()
        return 1
    print(
        f"error: process {jax.process_index()} lost another process of the run "
        f"({str(error).splitlines()[0]}); the same commands with --resume, all of them, go on",
        file=sys.stderr,
    )
    return PEER_FAILURE


if __name__ == "__main__":
    sys.exit(main())
