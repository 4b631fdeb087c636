"""The command `inmerge quickstart`."""

import sys

from inmerge_jax.cli.quickstart import main

if __name__ == "__main__":
    sys.exit(main())
