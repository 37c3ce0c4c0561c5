"""Strict common ground: no display, repeatable Hypothesis runs, JAX's precision untouched.

Programs are compiled once for all test processes and those they start, and kept between runs.  The
functions that tests compile themselves need room as well: one process runs half of the tests.
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


#: A size makes JAX lock the folder, which processes share.
COMPILED = {
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_compilation_cache_max_size": 4_000_000_000,
}


def pytest_configure(config: pytest.Config) -> None:
    assert config.cache is not None
    settings = {"jax_compilation_cache_dir": str(config.cache.mkdir("compiled")), **COMPILED}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(autouse=True)
def _jax_is_left_as_it_was() -> Iterator[None]:
    make_room()
    yield
    assert not jax.config.jax_enable_x64, "a test, or the package, left JAX in 64-bit mode"
