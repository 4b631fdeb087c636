"""Trains a backbone, then fine-tunes it with and without in-model merging: `inmerge train`."""

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from inmerge_jax.cli.checks import RUN_MODULES, prepare_process, require_modules, require_writable
from inmerge_jax.cli.errors import (
    DONE,
    FAILED,
    PEER_LOST,
    is_unwritable,
    report,
    report_unwritable,
    with_options,
)
from inmerge_jax.errors import UsageError

if TYPE_CHECKING:
    from inmerge_jax.training.config import TrainConfig

_PHANTOM = ("train", "val", "test", "findings", "multi_label", "difficulty", "seed")
_AUGMENT = ("crop", "rotate", "brightness", "contrast")
OPTIONS = {
    **{name: f"--phantom.{name.replace('_', '-')}" for name in _PHANTOM},
    **{name: f"--augment.{name}" for name in _AUGMENT},
    "min_match": "--init-min-match",
    "download": "--no-download",
}
"""Options of arguments whose option is not their name with dashes."""
_UNSHARED = (
    "not all processes see this folder, so compiled programs are not kept; give "
    "`compilation_cache_dir` a folder that they share, such as gs://BUCKET/cache"
)


def only_report_missing(folder: Path, resume: bool) -> bool:
    """Whether a run to resume has its results but not its report."""
    from inmerge_jax.cli.report import TABLE

    return resume and (folder / "results.json").exists() and not (folder / TABLE).exists()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status, see `errors`.

    An interrupted run (SIGTERM: 143, Ctrl-C: 130) continues with `--resume`.
    """
    prepare_process()
    try:
        require_modules("inmerge_jax.cli.options")
        from inmerge_jax.cli.options import parse_config

        config = parse_config(arguments)
        require_modules(*RUN_MODULES)
    except UsageError as error:
        return report(error, OPTIONS)

    from inmerge_jax.training.multihost import exit_process

    return exit_process(_run(config))


def _run(config: "TrainConfig") -> int:
    from inmerge_jax.cli.report import write_and_print
    from inmerge_jax.locking import require_free
    from inmerge_jax.training.environment import enable_compilation_cache
    from inmerge_jax.training.experiment import run_experiment
    from inmerge_jax.training.multihost import (
        SyncedPreemption,
        connect,
        is_primary,
        is_shared,
        run_on_primary,
        run_synced,
    )
    from inmerge_jax.training.preemption import PreemptionHandler, TrainingInterrupted
    from inmerge_jax.training.run_spec import make_run_spec
    from inmerge_jax.training.train import NonFiniteLossError
    from inmerge_jax.training.workdir import CONFIG, check_output, check_state

    preemption = PreemptionHandler()
    try:
        connect(config.coordinator, config.num_processes, config.process_id)
        cache = config.compilation_cache_dir
        if is_shared(cache):
            enable_compilation_cache(cache)
        elif cache is not None and is_primary():
            print(with_options(f"{cache}: {_UNSHARED}", OPTIONS))
        run_on_primary(require_writable, config.output)
        run_on_primary(check_output, config.output)
        if not run_on_primary(only_report_missing, config.output, config.resume):
            run_on_primary(require_free, config.output)
            run_on_primary(
                check_state, config.output, resume=config.resume, overwrite=config.overwrite
            )
            spec = run_synced(make_run_spec, config)
            if spec.init_report is not None and is_primary():
                print(with_options(f"{config.model.init_from}: {spec.init_report}", OPTIONS))
            with preemption:
                run_experiment(spec, SyncedPreemption(preemption))
        run_on_primary(write_and_print, config.output)
    except UsageError as error:
        return report(error, OPTIONS)
    except OSError as error:
        if not is_unwritable(error):
            return _unexpected(error)
        return report_unwritable(error, config.output, begun=True)
    except NonFiniteLossError as error:
        print(f"error: {with_options(str(error), OPTIONS)}", file=sys.stderr)
        return FAILED
    except TrainingInterrupted as interrupted:
        print(f"{interrupted}; the same command {_resuming(config)}", file=sys.stderr)
        return 128 + preemption.signal
    except KeyboardInterrupt:
        begun = (config.output / CONFIG).exists()
        how = _resuming(config) if begun else "starts again; nothing was written"
        print(f"stopped at once; the same command {how}", file=sys.stderr)
        return 130
    except Exception as error:
        return _unexpected(error)
    return DONE


def _resuming(config: "TrainConfig") -> str:
    instead = " in place of --overwrite" if config.overwrite else ""
    return f"with --resume{instead} continues"


def _unexpected(error: Exception) -> int:
    """Raises the error; in a run of several processes, prints it and returns the exit status."""
    import jax

    from inmerge_jax.training.multihost import is_peer_failure

    # In this order: counting the processes starts the devices, which may be what has failed.
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        raise error
    # Not raised: at exit, the interpreter would wait for processes that wait for this one.
    traceback.print_exc()
    if not is_peer_failure(error):
        return FAILED
    print(
        f"error: process {jax.process_index()} lost another process of the run "
        f"({str(error).splitlines()[0]}); start all processes again with --resume to continue",
        file=sys.stderr,
    )
    return PEER_LOST


if __name__ == "__main__":
    sys.exit(main())
