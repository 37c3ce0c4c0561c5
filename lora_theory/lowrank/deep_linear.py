"""Deep linear networks: how fast gradient descent converges, predicted and run.

f = ½‖W_L…W_1X − Y‖²_F for layers W_l of n_l×n_{l−1}, inputs X of n_0×N, targets Y of n_L×N.  Loss
above the minimum f* shrinks geometrically while singular values of the layers stay within bounds;
the derivation is in docs/results/preconditioning_deep_linear.md.  Layers may be plain matrices or
:class:`~lora_theory.lowrank.Preconditioned`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from lora_theory.arguments import checked_integer
from lora_theory.compilation import double_precision, quickly_compiled
from lora_theory.lowrank.checks import Matrix, checked_array, checked_matrix, checked_number
from lora_theory.lowrank.polynomials import preconditioning_polynomial
from lora_theory.lowrank.preconditioning import Preconditioned, gmcn, precondition, refreshed
from lora_theory.problem import ProblemError

__all__ = [
    "Rates",
    "Training",
    "asymptotic_factor",
    "envelope",
    "minimum_loss",
    "product_rate",
    "rates",
    "tangent_kernel",
    "train",
]

#: Singular values of X below this share of the largest count as 0.
_RANK = 1e-12


class Rates(NamedTuple):
    """Constants μ of ‖∇f‖² ≥ 2μ(f − f*), weakest first, and the largest eigenvalue beside them."""

    product: float  #: from each layer's smallest singular value, see :func:`product_rate`
    layerwise: float  #: Σ_l σ_min(W_L…W_{l+1})² σ_r(W_{l−1}…W_1X)²
    smallest: float  #: smallest eigenvalue of the tangent kernel: no larger constant holds
    largest: float  #: its largest eigenvalue, the curvature of f at a minimum


@dataclass(frozen=True)
class Training:
    """What :func:`train` recorded, for S seeds and R steps."""

    steps: NDArray[np.int64]  #: (R,) how many steps had been taken
    excess: NDArray[np.float64]  #: (S, R) f − f*; infinite from where a run diverged
    minimum: NDArray[np.float64]  #: (S,) f*
    spectra: list[NDArray[np.float64]]  #: per layer (S, R, min(n_l, n_{l−1})) of what acts, or inf
    scales: NDArray[np.float64]  #: (S, R, L): σ̂ of preconditioned layers, σ_1 of plain ones
    layers: list[Any]  #: at the end, stacked over seeds: matrices, or Preconditioned

    def final(self, seed: int) -> list[Any]:
        """The layers of one seed at the end, for :func:`asymptotic_factor` and others."""
        return [jax.tree.map(lambda array: array[seed], layer) for layer in self.layers]

    @property
    def conditions(self) -> NDArray[np.float64]:
        """(S, R): :func:`~lora_theory.lowrank.gmcn` of the layers that act; inf if diverged."""
        places = np.ndindex(self.excess.shape)
        values = [
            gmcn([np.diag(spectrum[at]) for spectrum in self.spectra])
            if np.isfinite(self.excess[at])
            else math.inf
            for at in places
        ]
        return np.reshape(values, self.excess.shape)


def minimum_loss(inputs: Any, targets: Any) -> float:
    """f* = ½‖Y(1 − Π)‖²_F, Π the projector on the row space of X.

    The least f of all products W_L…W_1, provided that no layer is narrower than min(n_L, rank X).

    Example:
        >>> minimum_loss([[1.0, 0.0]], [[3.0, 2.0]])
        2.0
    """
    X, Y = _checked_data(inputs, targets)
    return float(_reduced(X, Y)[2])


def tangent_kernel(
    layers: Sequence[Any], inputs: Any, *, train_gain: bool = True
) -> NDArray[np.float64]:
    """K of dE/dt = −K[E] for small steps of gradient descent, E = (W_L…W_1X − Y)Π.

    For plain layers K[E] = Σ_l A_lA_lᵀ E B_lᵀB_l with A_l = W_L…W_{l+1}, B_l = W_{l−1}…W_1X.  Under
    preconditioning K = J J̃ᵀ: the gradient J̃ᵀE holds the outer σ̂, while what acts follows it; K
    is then not symmetric, and f need not fall.

    Args:
        layers: W_1, …, W_L, or :class:`Preconditioned` with u and v refreshed.
        inputs: X, of rank r.
        train_gain: whether the gains γ of preconditioned layers are trained.

    Returns:
        (n_L r, n_L r), on entries of E in an orthonormal basis of the row space of X.

    Raises:
        ProblemError: layers that do not fit one another or X, or are no finite matrices; X = 0.

    Example:
        >>> tangent_kernel([[[2.0]], [[3.0]]], [[1.0]]).tolist()
        [[13.0]]
    """
    _check_flag(train_gain)
    checked = _checked_layers(layers)
    X = _rows(_input_matrix(inputs, checked))
    with double_precision():
        exact = jax.tree.map(
            lambda array: jnp.asarray(array, jnp.float64), checked, is_leaf=_is_numpy
        )
        return np.asarray(_kernel(exact, jnp.asarray(X), train_gain))


def asymptotic_factor(
    layers: Sequence[Any], inputs: Any, learning_rate: float, *, train_gain: bool = True
) -> float:
    """The factor by which each step shrinks the residual near a minimum: max |1 − ηλ(K)|.

    f − f* shrinks by its square.  Exact as f → f*, for the layers at the end of training; it is 1
    where K is singular, and convergence is then not geometric.  Args: see :func:`tangent_kernel`.

    Example:
        >>> round(asymptotic_factor([[[2.0]], [[3.0]]], [[1.0]], 0.05), 12)
        0.35
    """
    rate = checked_number("learning_rate", learning_rate, positive=True)
    kernel = tangent_kernel(layers, inputs, train_gain=train_gain)
    return float(np.abs(1 - rate * np.linalg.eigvals(kernel)).max())


def rates(layers: Sequence[Any], inputs: Any) -> Rates:
    """Constants of the inequality ‖∇f‖² ≥ 2μ(f − f*) at plain layers, weakest first.

    Args:
        layers: W_1, …, W_L, plain matrices.
        inputs: X, of rank r.

    Raises:
        ProblemError: as :func:`tangent_kernel`; a preconditioned layer, whose K is not symmetric.

    Example:
        >>> rates([[[2.0]], [[3.0]]], [[1.0]])
        Rates(product=13.0, layerwise=13.0, smallest=13.0, largest=13.0)
    """
    matrices = _checked_layers(layers)
    for index, layer in enumerate(matrices):
        if isinstance(layer, Preconditioned):
            raise ProblemError(
                f"layers[{index}] is preconditioned: these constants are of plain layers; take "
                "merged(layers), or asymptotic_factor"
            )
    X = _rows(_input_matrix(inputs, matrices))
    lowest = [_extremes(W)[0] for W in matrices]
    product = product_rate(lowest, _widths(matrices), _extremes(X)[0])
    layerwise = 0.0
    for place in range(len(matrices)):
        after = _product(matrices[place + 1 :], np.eye(len(matrices[place])))
        before = _product(matrices[:place], X)
        # over all directions of E, not only over as many as the matrix has singular values
        smallest = [
            _extremes(M)[0] if rank <= min(M.shape) else 0.0
            for M, rank in ((after, matrices[-1].shape[0]), (before, X.shape[1]))
        ]
        layerwise += math.prod(smallest) ** 2
    eigenvalues = np.linalg.eigvalsh(tangent_kernel(matrices, inputs))
    return Rates(product, layerwise, max(float(eigenvalues[0]), 0.0), float(eigenvalues[-1]))


def product_rate(lowest: Sequence[float], widths: Sequence[int], input_lowest: float) -> float:
    """μ = σ_r(X)² Σ_l Π_{k≠l} τ_k², from lower bounds τ_k of the layers' singular values.

    Of the sum only the l with n_l ≥ … ≥ n_L and n_{l−1} ≥ … ≥ n_0: W_k has to keep every direction
    of E, on the left for k > l, on the right for k < l.  For non-increasing n_1 ≥ … ≥ n_L < n_0
    that is l = 1 alone, for square layers all L; 0 if there is none.

    Args:
        lowest: τ_1, …, τ_L.
        widths: n_0, …, n_L.
        input_lowest: σ_r(X), the smallest singular value of X that is not 0.

    Raises:
        ProblemError: numbers that are negative or not finite; lengths that do not fit.

    Example:
        >>> product_rate([0.5, 0.5], [3, 2, 2], 2.0), product_rate([0.5, 0.5], [2, 2, 2], 2.0)
        (1.0, 2.0)
    """
    bounds = [checked_number(f"lowest[{i}]", b) for i, b in enumerate(_entries("lowest", lowest))]
    sizes = [
        checked_integer(f"widths[{i}]", n, 1) for i, n in enumerate(_entries("widths", widths))
    ]
    scale = checked_number("input_lowest", input_lowest)
    if len(sizes) != len(bounds) + 1 or not bounds:
        raise ProblemError(
            f"widths has {len(sizes)} entries and lowest {len(bounds)}: there must be n_0, …, n_L "
            "for τ_1, …, τ_L"
        )
    terms = 0.0
    for place in range(len(bounds)):
        before, after = sizes[: place + 1], sizes[place + 1 :]
        if before == sorted(before) and after == sorted(after, reverse=True):
            terms += math.prod(b**2 for i, b in enumerate(bounds) if i != place)
    return scale**2 * terms


def envelope(
    start: float,
    *,
    lowest: Sequence[float],
    highest: float,
    widths: Sequence[int],
    inputs: Any,
    learning_rate: float,
    steps: int,
) -> NDArray[np.float64]:
    """Upper bounds on f − f* after 0, …, ``steps`` steps of gradient descent on plain layers.

    f_{t+1} − f* ≤ (1 − ημ(2 − ηβ)) (f_t − f*) for ηβ ≤ 2, while σ_min(W_k) ≥ τ_k (k = 1, …, L) and
    ‖W_k‖ ≤ s hold before every step; μ is that of :func:`product_rate`, and with x = ‖X‖,
    e² = 2(f_t − f*), c = (L−1) x s^{L−2} (1 + ηx s^{L−2}e)^{L−2},

        β = Λ + ce + ¼c²η²Λe²,    Λ = L s^{2L−2}x².

    Args:
        start: f_0 − f*.
        lowest, highest: τ_1, …, τ_L and s, bounds over all steps.
        widths: n_0, …, n_L.
        inputs: X.
        learning_rate: η.
        steps: how many.

    Raises:
        ProblemError: ηβ > 2, with which nothing is guaranteed; numbers out of range; lengths that
            do not fit.

    Example:
        >>> envelope(8.0, lowest=[1], highest=1, widths=[1, 1], inputs=[[1.0]], learning_rate=0.5,
        ...          steps=2).tolist()
        [8.0, 2.0, 0.5]
    """
    smallest, x = _extremes(_rows(checked_matrix("inputs", inputs)))
    mu = product_rate(lowest, widths, smallest)
    excess, rate = checked_number("start", start), checked_number("learning_rate", learning_rate)
    s, depth = checked_number("highest", highest, positive=True), len(lowest)
    count = checked_integer("steps", steps, 0)
    if s < max(lowest):
        raise ProblemError(f"highest = {highest!r} is not allowed: it must be ≥ all of lowest")
    largest, bounds = depth * s ** (2 * depth - 2) * x**2, [excess]
    for _ in range(count):
        e = math.sqrt(2 * bounds[-1])
        curved = 0.0
        if depth > 1:
            single = x * s ** (depth - 2)
            curved = (depth - 1) * single * (1 + rate * single * e) ** (depth - 2)
        beta = largest + curved * e + (curved * rate * e) ** 2 * largest / 4
        if rate * beta > 2:
            raise ProblemError(
                f"learning_rate = {learning_rate!r} is not allowed: it must be ≤ 2/β = "
                f"{2 / beta:.3g}, β the curvature that these bounds allow"
            )
        bounds.append(bounds[-1] * (1 - rate * mu * (2 - rate * beta)))
    return np.array(bounds)


def train(
    layers: Sequence[Any],
    inputs: Any,
    targets: Any,
    *,
    learning_rate: float,
    steps: int,
    degree: int | None = None,
    gains: Any = 1.0,
    train_gain: bool = True,
    decay: float = 0.0,
    rounds: int = 10,
    every: int = 1,
) -> Training:
    """Full-batch gradient descent on f + λΣ_l‖W_l‖²_F, of several seeds at once, in float64.

    Args:
        layers: the weights W_1, …, W_L at the start; all (n_l, n_{l−1}), or all with the same
            number S of seeds in front.
        inputs, targets: X (n_0, N) and Y (n_L, N), or with the seeds in front.
        learning_rate: η > 0.
        steps: a multiple of ``every``.
        degree: None for plain layers; 1, 3, 5, 7 or 9 for :func:`~lora_theory.lowrank.precondition`
            with its stop-gradients, u and v refreshed after every step.
        gains: γ at the start, a number or (L,) or (S, L); of preconditioned layers.
        train_gain: whether γ is trained, with the same η.
        decay: λ ≥ 0, on the raw weights and not on γ.
        rounds: of power iteration before the first and after every step.
        every: steps from one record to the next.

    Raises:
        ProblemError: arrays that do not fit or are not finite; layers narrower than min(n_L, rank
            X), whose f* is another; numbers out of range.

    Example:
        >>> import numpy as np
        >>> layers = [np.eye(2), np.eye(2)]
        >>> found = train(layers, np.eye(2), np.diag([2.0, 1.5]), learning_rate=0.1, steps=60)
        >>> factor = asymptotic_factor(found.final(0), np.eye(2), 0.1)
        >>> measured = np.sqrt(found.excess[0, -1] / found.excess[0, -2])
        >>> round(factor, 4), round(float(measured), 4)
        (0.7, 0.7)
    """
    if degree is not None:
        preconditioning_polynomial(degree)
    _check_flag(train_gain)
    rate = checked_number("learning_rate", learning_rate, positive=True)
    penalty = checked_number("decay", decay)
    spacing, turns = checked_integer("every", every, 1), checked_integer("rounds", rounds, 1)
    count = checked_integer("steps", steps, 1)
    if count % spacing:
        raise ProblemError(
            f"steps = {count} is not allowed: it must be a multiple of every = {spacing}"
        )
    weights = [_stack(f"layers[{i}]", one) for i, one in enumerate(_entries("layers", layers))]
    X, Y = _stack("inputs", inputs), _stack("targets", targets)
    seeds = max((len(array) for array in (*weights, X, Y)), default=1)
    named = [*((f"layers[{i}]", W) for i, W in enumerate(weights)), ("inputs", X), ("targets", Y)]
    for name, array in named:
        if len(array) not in (1, seeds):
            raise ProblemError(f"{name} has {len(array)} seeds: it must have 1 or {seeds}")
    _checked_layers([W[0] for W in weights])
    _checked_data(X[0], Y[0])
    _input_matrix(X[0], [W[0] for W in weights])
    if Y.shape[1] != weights[-1].shape[1]:
        raise ProblemError(
            f"targets has {Y.shape[1]} rows: it must have {weights[-1].shape[1]}, as the last layer"
        )
    _check_widths(_widths([W[0] for W in weights]), X)
    try:
        gamma = np.broadcast_to(np.asarray(gains, float), (seeds, len(weights)))
    except (TypeError, ValueError):
        raise ProblemError("gains must be a number, or (L,), or (seeds, L) numbers") from None
    if not np.all(np.isfinite(gamma)):
        raise ProblemError("gains has entries that are not finite: all must be")
    data = [_reduced(X[i % len(X)], Y[i % len(Y)]) for i in range(seeds)]
    stacks = [np.broadcast_to(W, (seeds, *W.shape[1:])) for W in weights]
    with double_precision():
        found = _trained(
            [jnp.asarray(W) for W in stacks], jnp.asarray(gamma),
            jnp.asarray([X for X, _, _ in data]), jnp.asarray([Y for _, Y, _ in data]),
            jnp.asarray(rate), jnp.asarray(penalty), jnp.asarray(spacing),
            degree, train_gain, count // spacing, turns,
        )  # fmt: skip
    final, excess, spectra, scales = found
    excess = np.asarray(excess)
    return Training(
        spacing * np.arange(count // spacing + 1),
        np.where(np.isfinite(excess), excess, np.inf),
        np.array([least for _, _, least in data]),
        [np.asarray(spectrum) for spectrum in spectra],
        np.asarray(scales),
        [layer if degree is not None else np.asarray(layer) for layer in final],
    )


# -- what is given -----------------------------------------------------------------------------


def _checked_layers(layers: Sequence[Any]) -> list[Any]:
    """Finite matrices, or preconditioned ones, each of which fits the one before."""
    given = _entries("layers", layers)
    if not given:
        raise ProblemError("layers is empty: it must hold at least one matrix")
    checked = [
        layer if isinstance(layer, Preconditioned) else checked_matrix(f"layers[{i}]", layer)
        for i, layer in enumerate(given)
    ]
    for index, (first, second) in enumerate(itertools.pairwise(map(_shape, checked))):
        if second[1] != first[0]:
            raise ProblemError(
                f"layers[{index + 1}] of shape {second} is not allowed: it must have {first[0]} "
                f"columns, as many as layers[{index}] has rows"
            )
    return checked


def _checked_data(inputs: Any, targets: Any) -> tuple[Matrix, Matrix]:
    """X and Y with as many columns."""
    X, Y = checked_matrix("inputs", inputs), checked_matrix("targets", targets)
    if X.shape[1] != Y.shape[1]:
        raise ProblemError(
            f"targets has {Y.shape[1]} columns: it must have {X.shape[1]}, as many as inputs"
        )
    return X, Y


def _entries(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise ProblemError(f"{name} = {values!r} is not allowed: it must be a sequence") from None


def _check_flag(train_gain: Any) -> None:
    if not isinstance(train_gain, bool):
        raise ProblemError(f"train_gain = {train_gain!r} is not allowed: it must be True or False")


def _input_matrix(inputs: Any, layers: list[Any]) -> Matrix:
    X, columns = checked_matrix("inputs", inputs), _shape(layers[0])[1]
    if len(X) != columns:
        raise ProblemError(
            f"inputs has {len(X)} rows: it must have {columns}, as layers[0] columns"
        )
    return X


def _stack(name: str, value: Any) -> NDArray[np.float64]:
    if np.ndim(value) == 3:
        return checked_array(name, value, (None, None, None), "a matrix, or one per seed")
    return checked_matrix(name, value)[None]


def _check_widths(widths: list[int], X: NDArray[np.float64]) -> None:
    rank = min(widths[-1], max(_rows(one).shape[1] for one in X))
    if min(widths) < rank:
        raise ProblemError(
            f"widths {widths} are not allowed: none must be below min(n_L, rank X) = {rank}, or "
            "the minimum of f is another"
        )


def _shape(layer: Any) -> tuple[int, int]:
    matrix = layer.weight if isinstance(layer, Preconditioned) else layer
    rows, columns = matrix.shape
    return rows, columns


def _widths(layers: Sequence[Any]) -> list[int]:
    return [_shape(layers[0])[1], *(_shape(layer)[0] for layer in layers)]


def _is_numpy(node: Any) -> bool:
    return isinstance(node, np.ndarray)


# -- linear algebra ----------------------------------------------------------------------------


def _rows(X: Matrix) -> Matrix:
    """X in an orthonormal basis of its row space: n_0×r, with its singular values."""
    U, s, _ = np.linalg.svd(X, full_matrices=False)
    kept = s > _RANK * s[0]
    if not kept.any():
        raise ProblemError("inputs is zero: no layer can be learned from it")
    return np.asarray(U[:, kept] * s[kept])


def _reduced(X: Matrix, Y: Matrix) -> tuple[Matrix, Matrix, float]:
    """X and Y on the row space of X, filled up with zeros to one size for all seeds; and f*."""
    U, s, Vt = np.linalg.svd(X, full_matrices=False)
    kept = s > _RANK * s[0]
    part = (Y @ Vt.T) * kept
    rest = Y - part @ Vt
    return U * (s * kept), part, float(np.sum(rest**2) / 2)


def _extremes(matrix: Any) -> tuple[float, float]:
    s = np.linalg.svd(matrix, compute_uv=False)
    return float(s[-1]), float(s[0])


def _product(matrices: Sequence[Any], first: Any) -> Any:
    return reduce(lambda product, W: W @ product, matrices, first)


def _acting(layer: Any, follow: bool = False) -> Array:
    """The matrix that acts; with ``follow`` its derivative follows the outer σ̂ as well."""
    if not isinstance(layer, Preconditioned):
        return layer  # type: ignore[no-any-return]
    acting: Array = layer.effective
    if follow:
        acting *= layer.scale / jax.lax.stop_gradient(layer.scale)
    return acting


@quickly_compiled("train_gain")
def _kernel(layers: list[Any], X: Array, train_gain: bool) -> Array:
    def outputs(layers: list[Any], follow: bool) -> Any:
        return _product([_acting(layer, follow) for layer in layers], X)

    value, backward = jax.vjp(partial(outputs, follow=False), layers)

    def velocity(residual: Array) -> Array:
        (gradient,) = backward(residual.reshape(value.shape))
        moved = [_without_gain(part, train_gain) for part in gradient]
        _, change = jax.jvp(partial(outputs, follow=True), (layers,), (moved,))
        return jnp.ravel(change)

    columns: Array = jax.vmap(velocity)(jnp.eye(value.size, dtype=value.dtype))
    return columns.T


def _spectrum(matrix: Array) -> Array:
    finite = jnp.all(jnp.isfinite(matrix))  # LAPACK complains of others
    return jnp.where(
        finite, jnp.linalg.svd(jnp.where(finite, matrix, 0), compute_uv=False), jnp.inf
    )


def _without_gain(gradient: Any, train_gain: bool) -> Any:
    if train_gain or not isinstance(gradient, Preconditioned):
        return gradient
    return eqx.tree_at(lambda layer: layer.gain, gradient, jnp.zeros_like(gradient.gain))


@quickly_compiled("degree", "train_gain", "records", "rounds")
def _trained(
    weights: list[Array],
    gains: Array,
    X: Array,
    Y: Array,
    rate: Array,
    decay: Array,
    every: Array,
    degree: int | None,
    train_gain: bool,
    records: int,
    rounds: int,
) -> Any:
    def one(weights: list[Array], gains: Array, X: Array, Y: Array) -> Any:
        layers: list[Any] = weights
        if degree is not None:
            layers = [
                precondition(W, degree=degree, gain=gains[i], rounds=rounds)
                for i, W in enumerate(weights)
            ]

        def excess(layers: list[Any]) -> Array:
            return jnp.sum((_product([_acting(layer) for layer in layers], X) - Y) ** 2) / 2

        def step(_: Any, layers: list[Any]) -> list[Any]:
            gradients = jax.grad(excess)(layers)
            moved = [
                _moved(layer, _without_gain(gradient, train_gain), rate, decay)
                for layer, gradient in zip(layers, gradients, strict=True)
            ]
            result: list[Any] = refreshed(moved, rounds)
            return result

        def record(layers: list[Any]) -> Any:
            spectra = [_spectrum(_acting(layer)) for layer in layers]
            scales = [
                layer.scale if isinstance(layer, Preconditioned) else s[0]
                for layer, s in zip(layers, spectra, strict=True)
            ]
            return excess(layers), spectra, jnp.stack(scales)

        def block(layers: list[Any], _: None) -> Any:
            layers = jax.lax.fori_loop(0, every, step, layers)
            return layers, record(layers)

        final, rest = jax.lax.scan(block, layers, None, length=records)
        together = jax.tree.map(
            lambda first, others: jnp.concatenate([first[None], others]), record(layers), rest
        )
        return final, *together

    return jax.vmap(one)(weights, gains, X, Y)


def _moved(layer: Any, gradient: Any, rate: Array, decay: Array) -> Any:
    if not isinstance(layer, Preconditioned):
        return layer - rate * (gradient + 2 * decay * layer)
    weight = layer.weight - rate * (gradient.weight + 2 * decay * layer.weight)
    gain = layer.gain - rate * gradient.gain
    return eqx.tree_at(lambda one: (one.weight, one.gain), layer, (weight, gain))
