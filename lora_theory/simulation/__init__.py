"""Simulation: real data, really trained, measured with the observables of the theory."""

from lora_theory.simulation.api import simulate
from lora_theory.simulation.losses import loss_on_attention, loss_on_outputs
from lora_theory.simulation.random_start import RandomStartThreshold, random_start_threshold
from lora_theory.simulation.results import (
    EffectiveNoiseRuns,
    FinetuningRuns,
    PretrainingRuns,
    Simulation,
)
from lora_theory.simulation.sampled import sample_pretrained
from lora_theory.simulation.second_round import SecondRoundSimulation, simulate_second_round

__all__ = [
    "EffectiveNoiseRuns",
    "FinetuningRuns",
    "PretrainingRuns",
    "RandomStartThreshold",
    "SecondRoundSimulation",
    "Simulation",
    "loss_on_attention",
    "loss_on_outputs",
    "random_start_threshold",
    "sample_pretrained",
    "simulate",
    "simulate_second_round",
]
