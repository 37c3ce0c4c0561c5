"""Low-rank methods on any weights: decay, preconditioning, compression (docs/lowrank.md)."""

from lora_theory.lowrank import deep_linear, spectral
from lora_theory.lowrank.compression import (
    Factors,
    aa_svd,
    asvd,
    fwsvd,
    obd,
    obd_spectrum,
    svd,
    svd_llm,
)
from lora_theory.lowrank.decay import LowRankDecayState, low_rank_decay, shrink
from lora_theory.lowrank.grams import Gram
from lora_theory.lowrank.polar import polar_factor
from lora_theory.lowrank.preconditioning import (
    Preconditioned,
    gmcn,
    merged,
    precondition,
    refreshed,
    trainable,
)
from lora_theory.lowrank.ranks import allocate_ranks, rank_of_ratio

__all__ = [
    "Factors",
    "Gram",
    "LowRankDecayState",
    "Preconditioned",
    "aa_svd",
    "allocate_ranks",
    "asvd",
    "deep_linear",
    "fwsvd",
    "gmcn",
    "low_rank_decay",
    "merged",
    "obd",
    "obd_spectrum",
    "polar_factor",
    "precondition",
    "rank_of_ratio",
    "refreshed",
    "shrink",
    "spectral",
    "svd",
    "svd_llm",
    "trainable",
]
