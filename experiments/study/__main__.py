"""The study: `python -m experiments.study QUESTION [options]`, see `command`."""

import sys
from collections.abc import Sequence

from inmerge_jax.training.environment import configure_malloc


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    configure_malloc()
    # Imported only now: it imports packages that start threads.
    from experiments.study import command

    return command.main(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
