"""Checks and measures the project on an accelerator; see docs/performance.md."""

import sys

from experiments.benchmarks.accelerator.command import main

if __name__ == "__main__":
    sys.exit(main())
