"""Strict common ground: no display, repeatable Hypothesis runs, JAX's configuration untouched.

The functions that tests compile themselves need room as well: one process runs half of the tests.
"""

import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

from lora_theory.compilation import make_room

os.environ["MPLBACKEND"] = "Agg"
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _jax_is_left_as_it_was() -> Iterator[None]:
    make_room()
    yield
    assert not jax.config.jax_enable_x64, "a test, or the package, left JAX in 64-bit mode"
