"""The public names, frozen: adding or removing one is a decision, taken here."""

import lora_theory

PUBLIC = [
    "Comparison",
    "Compression",
    "Continuation",
    "Covariance",
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
    "SecondRound",
    "SecondRoundSimulation",
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
    "second_round",
    "simulate",
    "simulate_second_round",
    "spectrum",
    "sweep",
    "thresholds",
]


def test_public_names_are_these():
    assert sorted(lora_theory.__all__) == PUBLIC


def test_public_names_exist_and_are_no_modules():
    for name in PUBLIC:
        assert callable(getattr(lora_theory, name)), name
        assert getattr(lora_theory, name).__doc__, name
