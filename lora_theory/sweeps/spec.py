"""What a sweep asks for: a problem varied by grid, zip and random; its theory and simulation."""

from __future__ import annotations

import itertools
import json
import math
import numbers
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from lora_theory.arguments import checked_integer
from lora_theory.problem import Problem, ProblemError, assign, read_toml
from lora_theory.simulation.api import checked_effort
from lora_theory.simulation.sizes import SMALLEST_DIM
from lora_theory.sweeps.tasks import SOURCES, Task, defaults_of
from lora_theory.theory.nodes import Discretisation

__all__ = ["SweepSpec"]

_KEYS = (
    "sources", "dims", "seeds", "seeds_per_task", "seed",
    "problem", "grid", "zip", "random", "theory", "simulation",
)  # fmt: skip
_THEORY = ("nodes", "blocks", "seed", "tolerance")
_EFFORT = (
    "starts", "batch", "pretrained", "dtype", "test_sequences", "gradient_tolerance",
    "max_iterations", "start_scale",
)  # fmt: skip
_MOST_POINTS, _SEEDS_PER_TASK = 1_000_000, 4
_SCALES = ("linear", "log")


@dataclass(frozen=True)
class SweepSpec:
    """A validated sweep: its points, and what is computed at each.

    The points are the product of the lists of ``[grid]``, in the order of the file with the last
    one fastest, of the rows of ``[zip]`` and of the draws of ``[random]``.  Draw i of a field
    depends on ``random.seed``, i and the name of the field alone: more points, or more random
    fields, never change it.
    """

    points: tuple[Problem, ...]
    sources: tuple[str, ...]
    dims: tuple[int, ...]
    seeds: int
    seeds_per_task: int
    seed: int
    theory: Mapping[str, Any]
    simulation: Mapping[str, Any]
    raw: Mapping[str, Any]  #: as it was given

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """The sweep in a TOML file; a :class:`ProblemError` says what is wrong with it."""
        return cls.from_dict(read_toml(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The sweep from nested plain values, as in a TOML file.

        Raises:
            ProblemError: an unknown or missing key, a value that is not allowed, no points, or a
                point that is no problem.

        Example:
            >>> spec = SweepSpec.from_dict({
            ...     "problem": {
            ...         "tokens": 2, "activation": "linear", "teacher_rank": 0.5,
            ...         "pretraining": {"samples": 0.2},
            ...     },
            ...     "grid": {"label_noise": [0.0, 0.5], "pretraining.penalty": [0.01, 0.1, 1.0]},
            ... })
            >>> len(spec.points), spec.sources
            (6, ('theory',))
            >>> spec.points[1].pretraining.penalty
            0.1
        """
        _known("", raw, _KEYS)
        tables = {name: _table(raw, name) for name in _KEYS[5:]}
        dims = tuple(
            checked_integer("dims", dim, SMALLEST_DIM) for dim in _list("dims", raw.get("dims", []))
        )
        if len(set(dims)) != len(dims):
            raise ProblemError(f"dims = {list(dims)} is not allowed: they must differ")
        sources = _sources(raw, bool(dims))
        if "simulation" in sources and not dims:
            raise ProblemError("dims is missing: a simulation needs a list of integers")
        seeds = raw.get("seeds")
        if "simulation" in sources and seeds is None:
            raise ProblemError("seeds is missing: a simulation needs an integer ≥ 1")
        _known("theory", tables["theory"], _THEORY)
        Discretisation.checked(**_settings("theory", tables, _THEORY))
        _known("simulation", tables["simulation"], (*_EFFORT, "device"))
        checked_effort(**_settings("simulation", tables, _EFFORT))
        return cls(
            points=tuple(_points(tables)),
            sources=sources,
            dims=dims,
            seeds=0 if seeds is None else checked_integer("seeds", seeds, 1),
            seeds_per_task=checked_integer(
                "seeds_per_task", raw.get("seeds_per_task", _SEEDS_PER_TASK), 1
            ),
            seed=checked_integer("seed", raw.get("seed", 0), 0, 2**32 - 1),
            theory=tables["theory"],
            simulation=tables["simulation"],
            raw=json.loads(json.dumps(raw)),
        )

    def tasks(self) -> list[Task]:
        """All tasks, in the order of the rows of the table: by point, then theory, then by D."""
        found: list[Task] = []
        for problem in self.points:
            for source in self.sources:
                if source == "theory":
                    found.append(Task(problem, "theory", dict(self.theory)))
                else:
                    found += self._simulations(problem)
        return found

    def _simulations(self, problem: Problem) -> Iterator[Task]:
        for dim, first in itertools.product(self.dims, range(0, self.seeds, self.seeds_per_task)):
            runs = {"first": first, "seeds": min(self.seeds_per_task, self.seeds - first)}
            settings = {"dim": dim, "seed": self.seed, **runs, **self.simulation}
            yield Task(problem, "simulation", settings)


def _settings(
    source: str, tables: Mapping[str, Mapping[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
    given = {**defaults_of(source), **tables[source]}
    return {name: given[name] for name in names}


def _points(tables: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    names = [spec.name for spec in Problem.specs()]
    axes = list(_axes(tables, names))
    varied = [name for axis in axes for name in axis[0]]
    for name in varied:
        if varied.count(name) > 1:
            raise ProblemError(f"{name} is varied twice: it must be in one of grid, zip, random")
    count = math.prod(len(rows) for _, rows in axes)
    if count > _MOST_POINTS:
        raise ProblemError(f"the sweep has {count:,} points: at most {_MOST_POINTS:,} are allowed")
    flat = dict(_flattened(tables["problem"]))
    for rows in itertools.product(*(rows for _, rows in axes)):
        values = dict(zip(varied, itertools.chain.from_iterable(rows), strict=True))
        try:
            problem = Problem.from_dict(_nested(flat | values))
            problem.check_text()
        except ProblemError as refusal:
            where = ", ".join(f"{name} = {value!r}" for name, value in values.items())
            raise ProblemError(f"{refusal} (at {where})" if where else str(refusal)) from None
        yield problem


#: Names of fields, and the rows of their values.
_Axis = tuple[tuple[str, ...], Sequence[tuple[Any, ...]]]


def _axes(tables: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Iterator[_Axis]:
    for name, values in tables["grid"].items():
        _field("grid", name, names)
        yield (name,), [(value,) for value in _filled(f"grid.{name}", values)]
    zipped = {name: _filled(f"zip.{name}", values) for name, values in tables["zip"].items()}
    for name, values in zipped.items():
        _field("zip", name, names)
        if len(values) != len(next(iter(zipped.values()))):
            lengths = ", ".join(f"{n} has {len(v)}" for n, v in zipped.items())
            raise ProblemError(f"the lists of zip must be equally long: {lengths}")
    if zipped:
        yield tuple(zipped), list(zip(*zipped.values(), strict=True))
    if tables["random"]:
        yield _draws(tables["random"], names)


def _draws(table: Mapping[str, Any], names: Sequence[str]) -> _Axis:
    fields = {name: law for name, law in table.items() if name not in ("points", "seed")}
    if "points" not in table or not fields:
        raise ProblemError("random needs points, an integer ≥ 1, and at least one field")
    count = checked_integer("random.points", table["points"], 1, _MOST_POINTS)
    seed = checked_integer("random.seed", table.get("seed", 0), 0)
    for name, law in fields.items():
        _field("random", name, names)
        _check_law(f"random.{name}", law)

    def drawn(name: str, index: int) -> Any:
        rng = np.random.default_rng([seed, index, zlib.crc32(name.encode())])
        return _drawn(fields[name], rng)

    return tuple(fields), [tuple(drawn(name, i) for name in fields) for i in range(count)]


def _check_law(name: str, law: Any) -> None:
    if isinstance(law, list):
        _filled(name, law)
        return
    ends = (law.get("from"), law.get("to")) if isinstance(law, Mapping) else (None, None)
    real = all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in ends)
    if not real or not set(law) <= {"from", "to", "scale"} or not law["from"] < law["to"]:
        raise ProblemError(
            f"{name} = {law!r} is not allowed: it must be a list to choose from, or "
            '{from = LOW, to = HIGH, scale = "linear" or "log"} with LOW < HIGH'
        )
    scale = law.get("scale", "linear")
    if scale not in _SCALES or (scale == "log" and law["from"] <= 0):
        raise ProblemError(
            f'{name}.scale = {scale!r} is not allowed: it must be "linear", or "log" with from > 0'
        )


def _drawn(law: Any, rng: np.random.Generator) -> Any:
    if isinstance(law, list):
        return law[rng.integers(len(law))]
    low, high = float(law["from"]), float(law["to"])
    share = rng.random()
    if law.get("scale", "linear") == "log":
        value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    else:
        value = low + share * (high - low)
    return min(max(float(f"{value:.6g}"), low), high)


def _sources(raw: Mapping[str, Any], simulated: bool) -> tuple[str, ...]:
    asked = _list("sources", raw.get("sources", SOURCES if simulated else SOURCES[:1]))
    for source in asked:
        if source not in SOURCES:
            raise ProblemError(
                f"sources = {asked!r} is not allowed: it must be a list of {', '.join(SOURCES)}"
            )
    if not asked:
        raise ProblemError(f"sources is empty: it must list one or more of {', '.join(SOURCES)}")
    return tuple(source for source in SOURCES if source in asked)


def _known(where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in table:
        if name not in known:
            full = f"{where}.{name}" if where else name
            raise ProblemError(
                f"{full} is not a key of a sweep; the keys here are {', '.join(known)}"
            )


def _field(where: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ProblemError(
            f"{where}.{name} is not a field of a problem; the fields are {', '.join(names)}"
        )


def _table(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    table = raw.get(name, {})
    if not isinstance(table, Mapping):
        raise ProblemError(f"{name} = {table!r} must be a table, [{name}]")
    if name in ("grid", "zip", "random"):
        return dict(_flattened(table, laws=True))
    return dict(table)


def _flattened(
    table: Mapping[str, Any], prefix: str = "", *, laws: bool = False
) -> Iterator[tuple[str, Any]]:
    """Dotted names and values; with ``laws`` a table with the key "from" is a value."""
    for name, value in table.items():
        if isinstance(value, Mapping) and not (laws and ("from" in value or "to" in value)):
            yield from _flattened(value, f"{prefix}{name}.", laws=laws)
        else:
            yield prefix + name, value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        assign(nested, name, value)
    return nested


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ProblemError(f"{name} = {value!r} is not allowed: it must be a list")
    return list(value)


def _filled(name: str, value: Any) -> list[Any]:
    values = _list(name, value)
    if not values:
        raise ProblemError(f"{name} is an empty list: the sweep would have no tasks")
    return values
