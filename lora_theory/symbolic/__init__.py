"""The symbolic route: potentials in SymPy, everything else from them by differentiation.

Potentials → saddle-point equations → closed forms, thresholds and expansions → NumPy functions and
LaTeX.  ``import lora_theory`` does not import this package.

Example:
    >>> from lora_theory.symbolic import notation as n, pretraining_potential
    >>> pretraining_potential().order_equations()[n.V]
    M_hat*J_delta(sqrt(Q_hat)/M_hat, 2*scaled_penalty/M_hat)/(2*sqrt(Q_hat)*V_hat)
"""

from lora_theory.symbolic.averages import lora_conjugates, pretraining_conjugates
from lora_theory.symbolic.catalogue import Equation, equations
from lora_theory.symbolic.latex import latex_equations, write_latex
from lora_theory.symbolic.numerical import SecondMoment, compiled, wishart_moment
from lora_theory.symbolic.potentials import Potential, lora_potential, pretraining_potential
from lora_theory.symbolic.series import PowerSeries

__all__ = [
    "Equation",
    "Potential",
    "PowerSeries",
    "SecondMoment",
    "compiled",
    "equations",
    "latex_equations",
    "lora_conjugates",
    "lora_potential",
    "pretraining_conjugates",
    "pretraining_potential",
    "wishart_moment",
    "write_latex",
]
