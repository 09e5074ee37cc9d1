"""The two errors that a person sees as a sentence; everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """The input is wrong (exit code 2): one sentence with the place, what was expected, the next step."""


class CheckFailed(Exception):
    """A check ran and failed (exit code 1)."""
