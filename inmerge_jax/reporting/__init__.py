"""Tables, plots and the HTML report of a run; everything is read from the run's folder."""

from typing import Any

__all__ = ["make_report", "markdown", "read_run", "summarize", "to_rich", "write_report"]

_HOME = {
    "make_report": "tables",
    "markdown": "tables",
    "read_run": "runs",
    "summarize": "summary",
    "to_rich": "tables",
    "write_report": "html",
}


def __getattr__(name: str) -> Any:
    """Loads matplotlib, SciPy and Jinja2 on first use, so that importing the package is cheap."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
