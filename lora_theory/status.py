"""How a stage ended, in words a user can act on."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Status"]


class Status(StrEnum):
    """Status of a stage; :attr:`remedy` says what it means and what to do.

    ``is_solved`` is False only where the numbers must not be used.
    """

    CONVERGED = "converged"
    JUMPS = "jumps"
    UNSTABLE = "unstable"
    COLLAPSED = "collapsed"
    TIE = "tie"
    NOT_CONVERGED = "not_converged"

    @property
    def remedy(self) -> str:
        """What the status means and what can be done, in one sentence."""
        return _REMEDIES[self]

    @property
    def is_solved(self) -> bool:
        """Whether the numbers are right within their stated errors."""
        return self is not Status.NOT_CONVERGED


_REMEDIES = {
    Status.CONVERGED: "Solved to the requested residual; nothing to do.",
    Status.JUMPS: (
        "Single nodes on a jump of a proximal operator leave a residual above the tolerance, below "
        "its own quadrature error; more nodes lower the error, more samples or more penalty remove "
        "the jumps."
    ),
    Status.UNSTABLE: (
        "The replica-symmetric solution is unstable (replicon at least 1, or jumps of a proximal "
        "operator that matter, see stability): its numbers are an approximation; more samples or "
        "more penalty make it stable."
    ),
    Status.COLLAPSED: (
        "The penalty keeps the trained parameter at zero, where overlap and gain have no meaning; "
        "lower the penalty or take more samples."
    ),
    Status.TIE: (
        "Two branches have potentials closer than their quadrature error: the values are those of "
        "the lower one, see branches; more nodes may decide."
    ),
    Status.NOT_CONVERGED: (
        "No solution to the requested tolerance was found: do not use the numbers; change the "
        "problem slightly, or raise the number of nodes (theory) or iterations (simulation)."
    ),
}
