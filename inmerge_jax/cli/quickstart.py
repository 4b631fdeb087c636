"""Trains the three arms on the embedded phantom in about a minute, and shows what merging did.

It is `inmerge train` with the options below, and takes no options of its own.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

OUTPUT = Path("runs/quickstart")
# Sized for two CPU cores. At the paper's threshold of 0.3, so small a network after so short a
# training merges 1x1 shortcuts alone; at 0.15 every deep layer takes part, and at 0.1 so many merge
# that they undo the training. The second stage's rate is above the last of the backbone's (1e-5),
# at which nothing could answer the merging. Threshold and difficulty were set on trial runs whose
# test scores were seen: this shows the tool at work and is no evidence for or against merging.
OPTIONS = (
    "--data phantom --phantom.train 1152 --phantom.val 320 --phantom.test 1000 "
    "--phantom.difficulty 0.7 --model resnet18 --width 0.125 "
    "--epochs 4 --merging-epochs 3 --merging-learning-rate 3e-4 --batch-size 32 "
    "--threshold 0.15 --seeds 0 1"
).split()


def continuation(output: Path, options: Sequence[str]) -> str | None:
    """The option with which `options` run again in `output`: none, --resume or --overwrite.

    An earlier quickstart that was cut short goes on if it had the same configuration; any other is
    replaced.
    """
    from inmerge_jax.training.config import config_dict, parse_config, resolve_recipe
    from inmerge_jax.training.parallel import choose_devices
    from inmerge_jax.training.workdir import diff_configs

    stored = output / "config.json"
    if not stored.exists():
        return None
    if (output / "results.json").exists():
        return "--overwrite"
    config = parse_config(options)
    devices = len(choose_devices(config.devices))
    new = config_dict(config, resolve_recipe(config.recipe), devices)
    old = json.loads(stored.read_bytes())
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
    """The command; it takes no options."""
    argparse.ArgumentParser("inmerge quickstart", description=__doc__).parse_args(arguments)
    return run()


if __name__ == "__main__":
    sys.exit(main())
