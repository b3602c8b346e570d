"""The two errors that a user can mend; the command line prints either as one line, anything else is
a bug of ours."""


class InputError(ValueError):
    """What the caller gave is wrong: the message says what, which value, the rule and the way
    out."""


class MachineError(RuntimeError):
    """The machine lacks something (a package, Lean, disk, a GPU): the message says what mends
    it."""
