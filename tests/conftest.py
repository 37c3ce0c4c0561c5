"""Strict common ground: no display, repeatable Hypothesis runs, JAX's precision untouched.

Programs are compiled once for all test processes and those they start, and kept between runs.  The
functions that tests compile themselves need room as well: one process runs half of the tests.
"""

import os
from collections.abc import Iterator

import hypothesis
import jax
import pytest

from lora_theory.compilation import keep_programs, make_room

os.environ["MPLBACKEND"] = "Agg"
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    assert config.cache is not None
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    keep_programs(config.cache.mkdir("compiled"))


@pytest.fixture(autouse=True)
def _jax_is_left_as_it_was() -> Iterator[None]:
    make_room()
    yield
    assert not jax.config.jax_enable_x64, "a test, or the package, left JAX in 64-bit mode"
