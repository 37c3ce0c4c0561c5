"""Sweeps: many points of theory and simulation, on one machine or a cluster, that lose nothing."""

from lora_theory.sweeps.api import Plan, Summary, kept_simulations, load, plan, sweep
from lora_theory.sweeps.engine import SweepError
from lora_theory.sweeps.spec import SweepSpec
from lora_theory.sweeps.store import StoreError

__all__ = [
    "Plan", "StoreError", "Summary", "SweepError", "SweepSpec",
    "kept_simulations", "load", "plan", "sweep",
]  # fmt: skip
