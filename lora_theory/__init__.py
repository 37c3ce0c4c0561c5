"""Theory and simulation of pre-training and rank-one LoRA fine-tuning of an attention layer."""

from lora_theory.compare import Comparison, compare
from lora_theory.observables import Estimate
from lora_theory.problem import (
    Finetuning,
    Pretraining,
    Problem,
    ProblemError,
    Selection,
    Teacher,
)
from lora_theory.simulation import (
    RandomStartThreshold,
    Simulation,
    random_start_threshold,
    sample_pretrained,
    simulate,
)
from lora_theory.status import Status
from lora_theory.sweeps import load, sweep
from lora_theory.theory import (
    Continuation,
    EffectiveNoise,
    Gradient,
    LearnedSpectrum,
    Optimum,
    Prediction,
    Thresholds,
    continuation,
    finetune,
    gradient,
    measure_noise,
    optimize,
    predict,
    predict_many,
    spectrum,
    thresholds,
)

__all__ = [
    "Comparison",
    "Continuation",
    "EffectiveNoise",
    "Estimate",
    "Finetuning",
    "Gradient",
    "LearnedSpectrum",
    "Optimum",
    "Prediction",
    "Pretraining",
    "Problem",
    "ProblemError",
    "RandomStartThreshold",
    "Selection",
    "Simulation",
    "Status",
    "Teacher",
    "Thresholds",
    "compare",
    "continuation",
    "finetune",
    "gradient",
    "load",
    "measure_noise",
    "optimize",
    "predict",
    "predict_many",
    "random_start_threshold",
    "sample_pretrained",
    "simulate",
    "spectrum",
    "sweep",
    "thresholds",
]
