"""The exception for mistakes of the user."""


class UserError(Exception):
    """A mistake that the user can correct: a config field, a data file, a missing device.

    The message is one sentence: what is wrong, where, and how to fix it. The command line prints it
    to stderr without a traceback and exits with code 2.
    """


class AgreedError(UserError):
    """A mistake that every process of a job has been told of, so that they can still save
    together."""


class WorkdirInUse(UserError):
    """Another process trains in the workdir."""
