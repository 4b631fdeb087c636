"""The command `inmerge train`."""

import sys

from inmerge_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
