"""The command `inmerge`."""

import sys
from collections.abc import Sequence

from inmerge_jax.cli.checks import prepare_process, require_modules
from inmerge_jax.cli.errors import report
from inmerge_jax.errors import UsageError

COMMANDS = {
    "quickstart": "train on an embedded data set, in one to three minutes",
    "train": "train a backbone, then fine-tune it with and without merging",
    "report": "rewrite the HTML report of a run",
    "predict": "score images with a trained network, as a CSV",
    "export": "export a trained network's weights for PyTorch",
    "data": "build ChestX-ray14, prepare a TFDS data set, or measure the input",
}


def usage() -> str:
    """The commands, one per line, and the exit statuses."""
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: inmerge COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "inmerge COMMAND --help lists its options.",
            "",
            "exit status: 0 done, 1 failed, 2 bad input, 3 another process of the run was lost,",
            "130 or 143 interrupted by Ctrl-C or SIGTERM",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, see `errors`."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if name in ("", "-h", "--help"):
        print(usage())
        return 0 if name else 2
    if name == "--version":
        import inmerge_jax

        print(f"inmerge-jax {inmerge_jax.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    prepare_process()
    try:
        # Imported on demand: the help needs no JAX.
        require_modules(f"inmerge_jax.cli.{name}")
    except UsageError as error:
        return report(error)
    return sys.modules[f"inmerge_jax.cli.{name}"].main(rest[:-1])


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
