"""The command `inmerge`."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "quickstart": "train the three arms on an embedded data set, in about a minute",
    "train": "train a backbone, then continue with and without merging",
    "report": "write the HTML report of a run again",
    "export": "write a trained network's weights to a file for PyTorch",
    "data": "build ChestX-ray14 from NIH's files, or measure its input",
}


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:<12}{what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: inmerge COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "inmerge COMMAND --help has its options.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; 2 for an unknown one."""
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
    # Imported when asked for: the help needs no JAX.
    module = importlib.import_module(f"inmerge_jax.cli.{name}")
    return module.main(rest[:-1])


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
