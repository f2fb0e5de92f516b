"""The one exception that means "you can mend this"."""


class UserError(Exception):
    """Something the user can put right: a config field, a data row, a checkpoint, a missing device.

    The message is one sentence that says what is wrong, where, and how to mend it. The command
    line prints it to stderr without a traceback and exits with code 2.
    """
