"""The asymptotic theory: :func:`predict` both stages, :func:`finetune` the second alone."""

from lora_theory.theory.frozen import measure_noise
from lora_theory.theory.predict import finetune, predict, predict_many
from lora_theory.theory.results import (
    EffectiveNoise,
    FinetuningPrediction,
    Prediction,
    PretrainingPrediction,
)

__all__ = [
    "EffectiveNoise",
    "FinetuningPrediction",
    "Prediction",
    "PretrainingPrediction",
    "finetune",
    "measure_noise",
    "predict",
    "predict_many",
]
