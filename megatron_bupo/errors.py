"""The exception for wrong input by the user."""


class UsageError(ValueError):
    """Bad input from outside: a flag, a file, a combination.

    The message is one line: what was given, what is allowed, what to do. The command line prints it and exits
    with code 2; it never shows a traceback for it. Errors of the program itself stay ordinary exceptions.
    """
