"""Exit statuses and error messages, the same for every command."""

import re
import sys
from collections.abc import Mapping
from types import MappingProxyType

DONE, FAILED, BAD_INPUT, PEER_LOST = range(4)
"""Exit statuses. A command that a signal ends exits with 128 plus its number: 130 or 143."""

_NO_RENAMES: Mapping[str, str] = MappingProxyType({})


def with_options(message: str, renamed: Mapping[str, str] = _NO_RENAMES) -> str:
    """Replaces the arguments that a message names in backticks by command-line options.

    `batch_size` becomes --batch-size, and `optimizer=sgd` becomes --optimizer sgd.

    Args:
      message: the message of a `UsageError`.
      renamed: argument name to option, where the option is not the name with dashes.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        flag = renamed.get(name) or "--" + name.replace("_", "-")
        return f"{flag} {value}" if value else flag

    return re.sub(r"`([a-z]\w*)(?:=(\w+))?`", option, message)


def report(error: Exception, renamed: Mapping[str, str] = _NO_RENAMES) -> int:
    """Prints bad input on stderr, see `with_options`; returns the exit status for it."""
    print(f"error: {with_options(str(error), renamed)}", file=sys.stderr)
    return BAD_INPUT
