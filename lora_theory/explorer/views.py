"""The views of the explorer: each a generator of tables, captions and figures that get better."""

from lora_theory.explorer.comparison_view import comparison
from lora_theory.explorer.curve_view import Measured, curve, trajectory
from lora_theory.explorer.map_view import phase_map
from lora_theory.explorer.noise_view import noise
from lora_theory.explorer.points import OBSERVABLES, View
from lora_theory.explorer.spectrum_view import learned_spectrum

__all__ = [
    "OBSERVABLES", "Measured", "View", "comparison", "curve", "learned_spectrum", "noise",
    "phase_map", "trajectory",
]  # fmt: skip
