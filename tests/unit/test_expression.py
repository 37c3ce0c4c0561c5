"""Expressions in s: what they allow, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_theory.expression import Expression

S = np.array([-2.0, -0.5, 0.0, 0.3, 4.0])
SPELLED = {
    "abs(s)**1.5 + s**2/2": np.abs(S) ** 1.5 + S**2 / 2,
    "s if s >= 0 else inf": np.where(S >= 0, S, np.inf),
    "-(s - 1)*2": -2 * (S - 1),
    "minimum(s**2, (s - 2)**2)": np.minimum(S**2, (S - 2) ** 2),
    "log1p(s**2) + tanh(s)": np.log1p(S**2) + np.tanh(S),
    "3": np.full(5, 3.0),
    "1/0": np.full(5, np.inf),
}


@pytest.mark.parametrize("text", SPELLED)
def test_values_of_numpy_and_jax(text):
    np.testing.assert_allclose(Expression(text)(S), SPELLED[text], rtol=1e-12)
    with jax.enable_x64(True):
        found = Expression(text)(jnp.asarray(S), jnp)
    np.testing.assert_allclose(found, SPELLED[text], rtol=1e-12)
    assert Expression(text)(jnp.asarray(S, jnp.float32), jnp).dtype == jnp.float32


@pytest.mark.parametrize(
    "text",
    ["", "x", "s.real", "__import__('os').getcwd()", "lambda: s", "s[0]", "'s'", "True", "None",
     "1j*s", "abs(s, s)", "print(s)", "s == 1", "0 < s < 1", "s if s else 1", "(s",
     "10**5" + "0" * 1000, "s; s"],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"allowed in it|not an expression|longer than"):
        Expression(text)
