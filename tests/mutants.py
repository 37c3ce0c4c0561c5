"""Wrong theories: the theory package copied under another name with one piece of text replaced."""

import importlib
import itertools
import shutil
import sys
from pathlib import Path
from types import ModuleType

import lora_theory.theory

_COUNT = itertools.count()


def mutant(folder: Path, file: str, right: str, wrong: str) -> ModuleType:
    """``lora_theory.theory`` in which ``right``, found once in ``file``, reads ``wrong``."""
    name = f"mutant_theory_{next(_COUNT)}"
    source = Path(lora_theory.theory.__file__).parent
    copy = shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == file:
            assert text.count(right) == 1, f"{right!r} is {text.count(right)} times in {file}"
            text = text.replace(right, wrong)
        path.write_text(text.replace("lora_theory.theory", name), encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
