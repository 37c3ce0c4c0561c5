"""How a command can end."""

from enum import IntEnum

__all__ = ["Exit"]


class Exit(IntEnum):
    """Exit codes; those above 2 follow the conventions of shells and sysexits.h."""

    SOLVED = 0
    NOT_CONVERGED = 1
    BAD_INPUT = 2
    BUG = 70
    NOT_WRITTEN = 74
    INTERRUPTED = 130
    BROKEN_PIPE = 141
