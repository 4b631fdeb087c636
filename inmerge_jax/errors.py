"""The error for invalid input."""


class UsageError(ValueError):
    """Invalid input: the message names the value, its origin and the remedy.

    Messages name arguments in backticks, such as `batch_size`; the command line shows them as
    options. It prints the message without a traceback and exits with status 2. Every other
    exception is a bug and keeps its traceback.
    """
