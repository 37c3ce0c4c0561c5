"""Node sets and forms of the averages: error at equal numbers of nodes, against time."""

from __future__ import annotations

from common import Column, Part, Row, fresh, problem, timed

NOTES = """
Nodes: standard errors of the informed root of LoRA over its value (E': test_error), softmax, κ0 =
Δ = .5, α = .2, λ = .02, α' = 3, λ' = .2, weights fixed at those of the limit; from 32 blocks, so
itself known to ±13 %, and stated for 8 blocks.  Order: which coordinates come first in the
sequence: y and z fields of label and student, s signal χ*, e its noise ζ.  Residual: h^y − h and
what is orthogonal to it in place of the two fields.  Seconds: one root from the same start.

Forms: error of the response (V̂, and v̂ without its norm term) by the weighted and by the Stein form
on the same blocks, and their difference in units of its error: what jumps of the minimiser carry.
"""
COLUMNS = (
    Column("case", "case"),
    Column("choice", "choice"),
    Column("nodes", "nodes/block"),
    Column("q", "q", ".1e"),
    Column("m", "m", ".1e"),
    Column("overlap", "overlap", ".1e"),
    Column("potential", "potential", ".1e"),
    Column("response", "response", ".1e"),
    Column("seconds", "s", ".2f"),
    Column("remark", "remark"),
)
#: (Q, M, V, Q_y) of the frozen weights, by tokens.
WEIGHTS = {2: (0.812, 0.921, 6.06, 1.75), 3: (1.152, 1.233, 2.746, 1.75)}
BLOCKS, SEEDS = 8, 4
CHOICES = (
    "independent", "Sobol", "Sobol, order s e y z", "Sobol, order s y z e",
    "Sobol, residual first", "Sobol, residual, order s y e z", "lattice", "Halton",
)  # fmt: skip


def node_sets(tokens: int):
    """Generators (dimension, points, blocks, seed) to (blocks, dimension, points), by choice."""
    import math

    import numpy as np
    from scipy.special import ndtri
    from scipy.stats import qmc

    from lora_theory.theory.fields import field_count
    from lora_theory.theory.nodes import gaussian_blocks

    n = field_count(tokens, "softmax")
    parts = {
        "y": range(n),
        "z": range(n, 2 * n),
        "s": range(2 * n, 2 * n + tokens),
        "e": range(2 * n + tokens, 2 * n + 2 * tokens),
    }
    Q, M, _, Q_y = WEIGHTS[tokens]
    along, across = math.sqrt(Q_y) * (1 - M / Q_y), -math.sqrt(Q - M**2 / Q_y)
    along, across = along / math.hypot(along, across), across / math.hypot(along, across)

    def generators(blocks, seed):
        return [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(blocks)]

    def gaussian(uniform):
        return ndtri(np.clip(uniform, 2.0**-54, 1 - 2.0**-54)).T

    def independent(dimension, points, blocks, seed):
        return np.stack([g.standard_normal((dimension, points)) for g in generators(blocks, seed)])

    def ordered(order):
        def make(dimension, points, blocks, seed):
            sobol = gaussian_blocks(dimension, points, blocks, seed)
            nodes = np.empty_like(sobol)
            nodes[:, [i for key in order for i in parts[key]]] = sobol
            return nodes

        return make

    def residual(order):
        def make(dimension, points, blocks, seed):
            nodes = ordered(order)(dimension, points, blocks, seed)
            first, rest = nodes[:, :n].copy(), nodes[:, n : 2 * n].copy()
            nodes[:, :n] = along * first - across * rest
            nodes[:, n : 2 * n] = across * first + along * rest
            return nodes

        return make

    def lattice(dimension, points, blocks, seed):
        # Korobov's rule, shifted and folded: the multiplier is the best of some by the P2 criterion
        def vector(multiplier):
            powers = [1]
            while len(powers) < dimension:
                powers.append(powers[-1] * multiplier % points)
            return np.array(powers)

        def worst(multiplier):
            u = np.outer(np.arange(points), vector(multiplier)) % points / points
            return np.prod(1 + 2 * np.pi**2 * (u**2 - u + 1 / 6), axis=1).mean()

        best = min((2 * k + 3 for k in range(200)), key=worst)
        base = np.outer(np.arange(points), vector(best)) / points
        shifted = ((base + g.random(dimension)) % 1 for g in generators(blocks, seed))
        return np.stack([gaussian(1 - np.abs(2 * u - 1)) for u in shifted])

    def halton(dimension, points, blocks, seed):
        return np.stack(
            [
                gaussian(qmc.Halton(dimension, scramble=True, rng=g).random(points))
                for g in generators(blocks, seed)
            ]
        )

    makers = (
        independent, gaussian_blocks, ordered("seyz"), ordered("syze"),
        residual("yzse"), residual("syez"), lattice, halton,
    )  # fmt: skip
    return dict(zip(CHOICES, makers, strict=True))


def choices(tokens: int, sequences: str, points: int, names: list[str]) -> list[Row]:
    """The informed root on every node set; to be called in a fresh process."""
    import math

    import jax
    import numpy as np

    from lora_theory.theory import finetuning as lora
    from lora_theory.theory import nodes as node_module
    from lora_theory.theory.branches import FinetuningNodes, FrozenWeights
    from lora_theory.theory.nodes import Discretisation
    from lora_theory.theory.roots import solve

    stage = problem(tokens, sequences=sequences).finetuning
    Q, M, V, Q_y = WEIGHTS[tokens]
    weights = FrozenWeights(*(np.full(BLOCKS, value) for value in (Q, M, V)), Q_y)
    judged = ("q", "m", "overlap", "potential")
    columns = [lora.OBSERVABLES.index(name) for name in judged]
    start = np.array([math.log(0.1), 0.9, math.log(0.05)])
    sets, rows = node_sets(tokens), []
    for name in names:
        node_module.gaussian_blocks = sets[name]
        deviations, seconds, values = [], [], []
        for seed in range(SEEDS + 1):  # the first one compiles
            discretisation = Discretisation(points, BLOCKS, 10 * seed, 1e-10)
            with jax.enable_x64(True):
                nodes = FinetuningNodes(stage, weights, tokens, "softmax", discretisation)
                averages = nodes.averages(lora.INFORMED)
                spent, root = timed(
                    lambda a=averages, n=nodes: solve(
                        a, start, coarse=n.coarse, relaxation=lora.relaxation, tolerance=1e-10
                    )
                )
            seconds.append(spent)
            blocks = root.block_observables[:, columns]
            deviations.append(blocks - blocks.mean(axis=0))
            values.append(blocks.mean(axis=0))
        spread = np.sqrt((np.concatenate(deviations[1:]) ** 2).sum(0) / (SEEDS * (BLOCKS - 1)))
        errors = spread / math.sqrt(BLOCKS) / np.abs(np.mean(values, axis=0))
        row: Row = {"case": f"T={tokens} {sequences}", "choice": name, "nodes": points}
        row |= dict(zip(judged, errors.tolist(), strict=True))
        rows.append(row | {"seconds": float(np.mean(seconds[1:]))})
    return rows


def forms(tokens: int, activation: str, sequences: str, points: int) -> list[Row]:
    """Weighted and Stein form of both responses at a solution; to be called in a fresh process."""
    import jax
    import numpy as np

    from lora_theory import predict
    from lora_theory.theory import finetuning as lora
    from lora_theory.theory import pretraining as pre
    from lora_theory.theory.branches import FinetuningNodes
    from lora_theory.theory.nodes import Discretisation
    from lora_theory.theory.predict import frozen_weights, pretraining_averages, solve_pretraining
    from lora_theory.theory.roots import standard_error

    asked = problem(tokens, activation, sequences, 0.02)
    blocks = 4 * BLOCKS
    discretisation = Discretisation(points, blocks, 0, 1e-10)
    best = predict(asked, nodes=points, blocks=blocks).finetuning
    alone = asked.replace(finetuning=None)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with jax.enable_x64(True):
        root = solve_pretraining(alone, discretisation)
        if activation == "softmax":
            values = pretraining_averages(alone, discretisation)[0].at(root.unknowns, search=True)
            V_hat = root.observables[pre.OBSERVABLES.index("V_hat")]
            weighted = (1 + values.residual[:, 2]) * V_hat
            jumps = values.observables[:, pre.OBSERVABLES.index("jump_mass")] * V_hat
            found["V̂"] = weighted, weighted - jumps
        nodes = FinetuningNodes(
            asked.finetuning, frozen_weights(alone, root), tokens, activation, discretisation
        )
        s = np.sqrt(best.q - best.m**2 / asked.finetuning.signal)
        x = np.array([np.log(s), best.m / asked.finetuning.signal, np.log(best.v)])
        rows = nodes.averages(lora.INFORMED).at(x, search=True).observables
        response = rows[:, lora.OBSERVABLES.index("response")]
        found["v̂"] = response, response - rows[:, lora.OBSERVABLES.index("jumps")]
    table: list[Row] = []
    for name, (weighted, stein) in found.items():
        apart = (weighted - stein).mean() / weighted.mean()
        noise = standard_error(weighted - stein) / abs(weighted.mean())
        for form, part in (("weighted", weighted), ("Stein", stein)):
            table.append(
                {
                    "case": f"{activation} T={tokens} {sequences}, {name}",
                    "choice": form,
                    "nodes": points,
                    "response": float(standard_error(part) * 2 / abs(weighted.mean())),
                    "remark": f"jumps {apart:+.1%} ± {noise:.1%}" if form == "Stein" else None,
                }
            )
    return table


def measure(toy: bool = False) -> Part:
    if toy:
        rows = fresh("integration.forms", tokens=2, activation="linear", sequences="fresh",
                     points=64)  # fmt: skip
        return Part(NOTES, COLUMNS, rows)
    rows = []
    for tokens, sequences, points in ((2, "fresh", 512), (2, "reused", 512), (3, "fresh", 512)):
        rows += fresh("integration.choices", tokens=tokens, sequences=sequences, points=points,
                      names=CHOICES)  # fmt: skip
    for activation, sequences in (("softmax", "fresh"), ("softmax", "reused"), ("linear", "fresh")):
        rows += fresh("integration.forms", tokens=2, activation=activation, sequences=sequences,
                      points=512)  # fmt: skip
    return Part(NOTES, COLUMNS, rows)
