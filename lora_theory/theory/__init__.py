"""The asymptotic theory: :func:`predict` both stages, :func:`finetune` the second alone."""

from lora_theory.theory.continued import Continuation, continuation
from lora_theory.theory.frozen import measure_noise
from lora_theory.theory.gradients import Gradient, gradient
from lora_theory.theory.learned import LearnedSpectrum, Outlier, spectrum
from lora_theory.theory.merged import MergedOutlier
from lora_theory.theory.optimal import Optimum, optimize
from lora_theory.theory.predict import finetune, predict, predict_many
from lora_theory.theory.results import (
    EffectiveNoise,
    FinetuningPrediction,
    Prediction,
    PretrainingPrediction,
)
from lora_theory.theory.second_round import SecondRound, second_round
from lora_theory.theory.thresholds import Thresholds, thresholds

__all__ = [
    "Continuation",
    "EffectiveNoise",
    "FinetuningPrediction",
    "Gradient",
    "LearnedSpectrum",
    "MergedOutlier",
    "Optimum",
    "Outlier",
    "Prediction",
    "PretrainingPrediction",
    "SecondRound",
    "Thresholds",
    "continuation",
    "finetune",
    "gradient",
    "measure_noise",
    "optimize",
    "predict",
    "predict_many",
    "second_round",
    "spectrum",
    "thresholds",
]
