"""Theory and simulation of pre-training and rank-one LoRA fine-tuning of an attention layer."""

from lora_theory.observables import Estimate
from lora_theory.problem import Finetuning, Pretraining, Problem, ProblemError

__all__ = ["Estimate", "Finetuning", "Pretraining", "Problem", "ProblemError"]
