"""The trained weights on disk: one .npz file, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_theory.files import written_whole
from lora_theory.problem import Problem, ProblemError

__all__ = ["checked_path", "save_weights"]


def checked_path(save: str | os.PathLike[str]) -> Path:
    """The file to write, once it is sure that its folder exists.

    Raises:
        ProblemError: the name does not end in .npz, or the folder does not exist.
    """
    path = Path(save)
    if path.suffix != ".npz":
        raise ProblemError(f"save = {str(save)!r} is not allowed: the file name must end in .npz")
    if not path.parent.is_dir():
        raise ProblemError(
            f"save = {str(save)!r} is not allowed: the folder {str(path.parent)!r} does not exist"
        )
    return path


def save_weights(path: Path, problem: Problem, seed: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays with the problem (as TOML text) and the root seed beside them.

    The file appears under its name only when it is complete.
    """
    entries: dict[str, Any] = {"problem": problem.to_toml(), "seed": seed, **arrays}
    with written_whole(path, "wb") as stream:
        np.savez(stream, **entries)
