"""Self-examination of an installation: versions, devices, precision, a few known numbers."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lora_theory.observables import to_plain

__all__ = ["Check", "Report", "examine", "installed_version"]

_PACKAGES = ("lora-theory", "jax", "jaxlib", "numpy", "scipy", "tyro")
#: Linear pre-training at T = 2, κ0 = Δ = 0.5, α = 0.2, λ = 0.02 (docs/theory.md).
_REFERENCE = {"Q": 1.7088, "M": 1.4634, "V": 1.3992, "test_error": 0.7981}
_REFERENCE_PRECISION = 1e-4


@dataclass(frozen=True)
class Check:
    """One thing that was tried: what should have come out, and what did."""

    name: str
    ok: bool
    expected: str
    found: str


@dataclass(frozen=True)
class Report:
    """What :func:`examine` found; its text is the table of ``lora-theory doctor``."""

    ok: bool
    versions: dict[str, str]
    devices: tuple[str, ...]
    default_precision: str
    checks: tuple[Check, ...]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values under the attribute names."""
        names = ("ok", "versions", "devices", "default_precision", "checks")
        return {name: to_plain(getattr(self, name)) for name in names}

    def __str__(self) -> str:
        rows = {
            **self.versions,
            "devices": ", ".join(self.devices),
            "precision": f"{self.default_precision} by default, float64 inside the package",
        }
        lines = [f"{name:<12}{value}" for name, value in rows.items()]
        for check in self.checks:
            verdict = (
                "ok" if check.ok else f"FAILED: expected {check.expected}, found {check.found}"
            )
            lines.append(f"{check.name}: {verdict}")
        lines.append(
            "This installation works."
            if self.ok
            else "This installation does not work: reinstall the versions of constraints.txt."
        )
        return "\n".join(lines)


def examine() -> Report:
    """Try JAX, 64-bit precision and the theory on numbers known beforehand; a few seconds.

    A check that raises is a failed check, so a broken JAX is reported like a wrong number.

    Example:
        >>> examine().ok
        True
    """
    checks = tuple(_tried(name, check) for name, check in _CHECKS.items())
    return Report(
        ok=all(check.ok for check in checks),
        versions={
            "python": platform.python_version(),
            **{n: installed_version(n) for n in _PACKAGES},
        },
        devices=_devices(),
        default_precision=_default_precision(),
        checks=checks,
    )


def _precision() -> tuple[bool, str, str]:
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        left = float(jnp.asarray(1.0) + jnp.asarray(1e-12)) - 1.0
    return abs(left - 1e-12) < 1e-15, "1e-12", f"{left:.3g}"


def _spectrum() -> tuple[bool, str, str]:
    """Below the support J is a moment: 1 + κ0 + δ² − 2ε√κ0 + ε² (docs/theory.md, section 2)."""
    import jax
    import jax.numpy as jnp

    from lora_theory.theory.spectrum import truncated_second_moment

    delta, epsilon, rank = 0.3, -5.0, 0.5
    expected = 1 + rank + delta**2 - 2 * epsilon * rank**0.5 + epsilon**2
    with jax.enable_x64(True):
        found = float(truncated_second_moment(*map(jnp.asarray, (delta, epsilon, rank))))
    return abs(found / expected - 1) < 1e-10, f"{expected:.10g}", f"{found:.10g}"


def _known_answer() -> tuple[bool, str, str]:
    from lora_theory.problem import Pretraining, Problem
    from lora_theory.theory import predict

    problem = Problem(
        tokens=2,
        activation="linear",
        teacher_rank=0.5,
        label_noise=0.5,
        pretraining=Pretraining(samples=0.2, penalty=0.02),
    )
    answer = predict(problem).pretraining
    found = {name: float(getattr(answer, name)) for name in _REFERENCE}
    ok = answer.status.is_solved and all(
        abs(found[name] - value) <= _REFERENCE_PRECISION for name, value in _REFERENCE.items()
    )
    return ok, _listed(_REFERENCE), _listed(found)


_CHECKS: dict[str, Callable[[], tuple[bool, str, str]]] = {
    "64-bit precision": _precision,
    "spectral moment": _spectrum,
    "pre-training of linear attention": _known_answer,
}


def _tried(name: str, check: Callable[[], tuple[bool, str, str]]) -> Check:
    try:
        ok, expected, found = check()
    except Exception as error:  # whatever it is, it is the finding
        return Check(name, False, "an answer", f"{type(error).__name__}: {error}")
    return Check(name, ok, expected, found)


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def _devices() -> tuple[str, ...]:
    import jax

    try:
        found = [f"{device.platform} ({device.device_kind})" for device in jax.devices()]
    except Exception as error:  # JAX raises several kinds here
        return (f"none that JAX can use ({type(error).__name__} {error})".replace(" )", ")"),)
    return tuple(dict.fromkeys(found))


def _default_precision() -> str:
    import jax.numpy as jnp

    return str(jnp.result_type(float))


def installed_version(package: str) -> str:
    """The version of a distribution, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
