"""Exit statuses and error messages, the same for every command."""

import errno
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from inmerge_jax.buckets import BucketError, bucket_errors
from inmerge_jax.errors import UsageError

DONE, FAILED, BAD_INPUT, PEER_LOST = range(4)
"""Exit statuses. A command that a signal ends exits with 128 plus its number: 130 or 143."""

_NO_RIGHTS = (errno.EACCES, errno.EPERM)
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, *_NO_RIGHTS)

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

    return re.sub(r"`((?:augment\.)?[a-z]\w*)(?:=(\w+))?`", option, message)


def report(error: Exception, renamed: Mapping[str, str] = _NO_RENAMES) -> int:
    """Prints bad input on stderr, see `with_options`; returns the exit status for it."""
    print(f"error: {with_options(str(error), renamed)}", file=sys.stderr)
    return BAD_INPUT


def run_command(
    command: Callable[[], None],
    output: Path,
    renamed: Mapping[str, str] = _NO_RENAMES,
    *,
    stopped: str,
) -> int:
    """Runs a command and returns its exit status; prints what the user can mend.

    Args:
      command: the command.
      output: the file or folder that it writes.
      renamed: see `with_options`.
      stopped: what to say after Ctrl-C.
    """
    try:
        with bucket_errors():
            command()
    except UsageError as error:
        return report(error, renamed)
    except BucketError as error:
        remedy = "check network, address and rights, then start again"
        print(f"error: a bucket failed: {error.strerror}; {remedy}", file=sys.stderr)
        return FAILED
    except OSError as error:
        if not is_unwritable(error):
            raise
        return report_unwritable(error, output, begun=False)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    return DONE


def is_unwritable(error: OSError) -> bool:
    """Whether the system lacked room or rights."""
    return error.errno in _CANNOT_WRITE


def report_unwritable(error: OSError, output: Path, *, begun: bool) -> int:
    """Prints an error that `is_unwritable`, with its remedy; returns the exit status for it.

    Args:
      error: the error.
      output: what to name where the error names no file.
      begun: whether there is a run to resume.
    """
    from inmerge_jax.files import write_error

    if error.errno not in _NO_RIGHTS:
        return report(write_error(Path(error.filename or output), error, begun=begun))
    # The file may be one that is read.
    print(f"error: {error}; give rights to it, then start again", file=sys.stderr)
    return BAD_INPUT
