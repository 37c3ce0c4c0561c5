"""Theory and simulation of pre-training and rank-one LoRA fine-tuning of an attention layer."""

from lora_theory.compare import Comparison, compare
from lora_theory.observables import Estimate
from lora_theory.problem import Finetuning, Pretraining, Problem, ProblemError, Teacher
from lora_theory.simulation import Simulation, simulate
from lora_theory.status import Status
from lora_theory.sweeps import load, sweep
from lora_theory.theory import (
    EffectiveNoise,
    Prediction,
    finetune,
    measure_noise,
    predict,
    predict_many,
)

__all__ = [
    "Comparison",
    "EffectiveNoise",
    "Estimate",
    "Finetuning",
    "Prediction",
    "Pretraining",
    "Problem",
    "ProblemError",
    "Simulation",
    "Status",
    "Teacher",
    "compare",
    "finetune",
    "load",
    "measure_noise",
    "predict",
    "predict_many",
    "simulate",
    "sweep",
]
