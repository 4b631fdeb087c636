"""Trains a backbone, then goes on with and without in-model merging: `--help` tells the rest."""

import errno
import sys
from pathlib import Path

from inmerge_jax.errors import InputError
from inmerge_jax.files import write_text

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_TABLE = "table.md"


def only_unreported(folder: Path) -> bool:
    """Whether the run in `folder` was stopped between its results and the last of its report."""
    return (folder / "results.json").exists() and not (folder / _TABLE).exists()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the status.

    That is 0; 1 where training diverged; 2 on bad input, a full disk too; 143 where SIGTERM stopped
    it (preemption) and 130 where Ctrl-C did, after either of which `--resume` goes on with the
    update that was the last.
    """
    from inmerge_jax.training.config import parse_config

    config = parse_config(arguments)

    import jax

    if config.cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    from rich import print as rich_print

    from inmerge_jax.reporting.html import write_report
    from inmerge_jax.reporting.runs import read_run
    from inmerge_jax.reporting.tables import make_report, to_markdown, to_rich
    from inmerge_jax.training.arms import plan_run, train_arms
    from inmerge_jax.training.loop import NonFiniteLossError
    from inmerge_jax.training.runfolder import cannot_write
    from inmerge_jax.training.stopping import Stopped, StopSignals

    stop = StopSignals()
    try:
        if not (config.resume and only_unreported(config.output)):
            plan = plan_run(config)
            with stop:
                train_arms(plan, stop)
        page = write_report(config.output)
        report = make_report(read_run(config.output))
        write_text(config.output / _TABLE, to_markdown(report))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        print(f"error: {cannot_write(error.filename or config.output, error)}", file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"{stopped}; the same command with --resume goes on", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("stopped at once; the same command with --resume goes on", file=sys.stderr)
        return 130
    rich_print(to_rich(report))
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
