"""Tables (`tables`), figures (`plots`) and the HTML report (`html_report`) of a finished run."""

import contextlib
import os
import sys

# Figures are drawn without a backend. A notebook's variable may name one that is not installed
# where its command runs, and matplotlib would then refuse to be imported.
if "MPLBACKEND" in os.environ and "matplotlib" not in sys.modules:
    _backend = os.environ.pop("MPLBACKEND")
    try:
        import matplotlib
    finally:
        os.environ["MPLBACKEND"] = _backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend
