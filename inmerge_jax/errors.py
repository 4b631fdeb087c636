"""The error for input that its user can mend."""


class InputError(ValueError):
    """Bad input: the message names the value, where it came from and the remedy.

    The command line prints it without a traceback and exits with status 2; every other exception
    is a fault of the program and keeps its traceback.
    """
