"""What the tables were computed from: manifest.json beside them, one entry per table.

An entry names the profile, the hash of the table and of data beside it, the problems (what all
share, what varies), the sizes and seeds of the simulations, what else labels the rows and, for
theory and simulation apart, versions, device and time.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from figure_tools import SOURCES, Profile

from lora_theory import Problem
from lora_theory.files import written_whole

PACKAGES = ("lora-theory", "jax", "jaxlib", "numpy", "scipy", "optax", "pandas", "matplotlib")
#: Values of a field up to which they are listed; of more, their number and ends.
LISTED = 12
#: What a field is where a row does not say, unless it does not apply there.
DEFAULTS = {
    spec.name: f"{spec.default:g}" if isinstance(spec.default, float) else spec.default
    for spec in Problem.specs()
    if isinstance(spec.default, float | str) and not re.search(r"compression|selection", spec.name)
}
#: Columns that are no labels.
NUMBERS = ("source", "status", "start", "observable", "value", "error", "missed", "jump_mass")
SIZES = {"D": ("dim", "dims"), "seeds": ("seeds",), "root seeds": ("root_seed",)}
SIZES |= {"dtype": ("dtype",)}


def read(folder: Path) -> dict[str, Any]:
    """All entries, by table."""
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(folder: Path, name: str, profile: Profile, seconds: float) -> None:
    """Enter a table that was just written; what was not computed keeps how it was."""
    entries = read(folder)
    how = {
        "seconds": round(seconds),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()} | {n: version(n) for n in PACKAGES},
    }
    computed = entries.get(name, {}).get("computed", {}) | dict.fromkeys(profile.sources, how)
    entries[name] = described(folder / f"{name}.csv", profile.name) | {
        "computed": {source: computed[source] for source in SOURCES if source in computed}
    }
    write(folder, entries)


def write(folder: Path, entries: dict[str, Any]) -> None:
    """All entries, in the order of their names."""
    with written_whole(folder / "manifest.json") as stream:
        json.dump(dict(sorted(entries.items())), stream, indent=1, ensure_ascii=False)
        stream.write("\n")


def described(path: Path, profile: str) -> dict[str, Any]:
    """What the table itself says."""
    table = pd.read_csv(path, dtype=str)
    fields = [spec.name for spec in Problem.specs() if spec.name in table]
    asked = table.dropna(subset=["tokens"]) if "tokens" in table else table
    problems = asked[fields].fillna(DEFAULTS).map(plain).drop_duplicates()
    sizes = [column for columns in SIZES.values() for column in columns]
    labels = table.drop(columns=[*fields, *sizes, *NUMBERS], errors="ignore")
    same = {name: values.iloc[0] for name, values in problems.items() if values.nunique() == 1}
    return {
        "profile": profile,
        "table": {"sha256": sha256(path), "rows": len(table)},
        "problems": {
            "number": len(problems) if fields else 0,
            "same": {name: value for name, value in same.items() if problems[name].notna().all()},
            "varied": {
                name: listed(values)
                for name, values in problems.items()
                if values.nunique(dropna=False) > 1
            },
        },
        "simulation": {
            label: listed(table[column])
            for label, columns in SIZES.items()
            for column in columns
            if column in table and table[column].notna().any()
        },
        "labels": {
            name: listed(values)
            for name, values in labels.items()
            if 0 < values.nunique() <= 2 * LISTED
        },
        "data": {
            data.name: sha256(data) for data in sorted(path.parent.glob(f"{path.stem}_*.csv"))
        },
    }


def listed(values: Iterable[str]) -> Any:
    """The distinct values, or their number and ends."""
    distinct = sorted(pd.Series(values).dropna().map(plain).unique(), key=_order)
    if len(distinct) <= LISTED:
        return distinct
    return {"number": len(distinct), "from": distinct[0], "to": distinct[-1]}


def plain(value: Any) -> Any:
    """A number in its shortest spelling, anything else as it is."""
    try:
        return f"{float(value):.8g}" if isinstance(value, str) else value
    except ValueError:
        return value


def _order(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
