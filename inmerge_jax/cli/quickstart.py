"""Trains the three arms on the embedded phantom in one to three minutes: `inmerge quickstart`.

It runs `inmerge train` with fixed options.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from inmerge_jax.cli.errors import report
from inmerge_jax.errors import UsageError

OUTPUT = Path("runs/quickstart")
# Sized for two CPU cores. At the paper's threshold of 0.3, such a small network merges only its 1x1
# shortcuts; at 0.15 every deep layer merges; at 0.1 merging undoes the training. The second stage's
# learning rate is above the backbone's last one (1e-5), which is too small to respond to merging.
# Threshold and difficulty were chosen on trial runs with known test scores: the result is a
# demonstration, not evidence for or against merging.
OPTIONS = (
    "--data phantom --phantom.train 1152 --phantom.val 320 --phantom.test 1000 "
    "--phantom.difficulty 0.7 --model resnet18 --width 0.125 "
    "--epochs 4 --merging-epochs 3 --merging-learning-rate 3e-4 --batch-size 32 "
    "--threshold 0.15 --seeds 0 1"
).split()


def continuation(output: Path, options: Sequence[str]) -> str | None:
    """The option for an existing run in `output`: None, --resume or --overwrite.

    An interrupted quickstart with the same configuration is resumed; any other run is replaced.

    Raises:
      UsageError: its config.json is damaged.
    """
    from inmerge_jax.cli.options import parse_config
    from inmerge_jax.files import read_json_object
    from inmerge_jax.training.parallel import choose_devices
    from inmerge_jax.training.resolve import config_dict, resolve_recipe
    from inmerge_jax.training.workdir import diff_configs

    stored = output / "config.json"
    if not stored.exists():
        return None
    if (output / "results.json").exists():
        return "--overwrite"
    config = parse_config(options)
    devices = len(choose_devices(config.devices))
    new = config_dict(config, resolve_recipe(config.recipe), devices)
    old = read_json_object(stored, f"delete {output}, and start again")
    return "--overwrite" if diff_configs(old, new) else "--resume"


def run(output: Path = OUTPUT, options: Sequence[str] = OPTIONS) -> int:
    """Runs the quickstart and returns `inmerge train`'s exit status."""
    from inmerge_jax.cli.train import main as train

    started = time.monotonic()
    again = continuation(output, options)
    arguments = [*options, "--output", str(output), *([again] if again else [])]
    print(f"inmerge train {shlex.join(arguments)}", flush=True)
    status = train(arguments)
    print(f"took {time.monotonic() - started:.0f} s")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, which has no options; returns the exit status."""
    argparse.ArgumentParser("inmerge quickstart", description=__doc__).parse_args(arguments)
    try:
        return run()
    except UsageError as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
