"""Strict common ground: no display, repeatable Hypothesis runs, JAX's configuration untouched."""

import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

os.environ["MPLBACKEND"] = "Agg"
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _jax_configuration_is_left_alone() -> Iterator[None]:
    yield
    assert not jax.config.jax_enable_x64, "a test, or the package, left JAX in 64-bit mode"
