"""The wheel holds the package, typed, and nothing else; it imports in an environment of its own."""

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
BIN = "Scripts" if sys.platform == "win32" else "bin"

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
import lora_theory
for module in pkgutil.walk_packages(lora_theory.__path__, "lora_theory."):
    # the explorer needs its extra
    if not module.name.endswith("__main__") and not module.name.startswith("lora_theory.explorer."):
        importlib.import_module(module.name)
for name in lora_theory.__all__:
    getattr(lora_theory, name)
print(lora_theory.__file__)
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the hatchling that is installed, so without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    built = run(*command, CHECKOUT, cwd=folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_typed_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(CHECKOUT).as_posix()
        for path in (CHECKOUT / "lora_theory").rglob("*.*")
        if path.suffix in (".py", ".js", ".css")
    }
    assert "lora_theory/py.typed" in names
    assert sources <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lora_theory"}
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert wheel.name == f"lora_theory-{project['version']}-py3-none-any.whl"


def test_wheel_imports_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / BIN / "python"
    options = ("--quiet", "--no-compile", "--retries", "1", "-c", CHECKOUT / "constraints.txt")
    installed = run(python, "-m", "pip", "install", *options, wheel, cwd=tmp_path)
    if installed.returncode and "connection" in installed.stderr.lower():
        pytest.skip("no network: the dependencies cannot be installed")
    assert installed.returncode == 0, installed.stderr

    imported = run(python, "-I", "-c", IMPORT_EVERYTHING, cwd=tmp_path)
    assert imported.returncode == 0, imported.stderr
    assert Path(imported.stdout.strip()).is_relative_to(environment.resolve())

    helped = run(environment / BIN / "lora-theory", "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    assert "usage" in helped.stdout.lower()

    explored = run(environment / BIN / "lora-theory", "explore", "--no_browser", cwd=tmp_path)
    assert explored.returncode == 2
    assert explored.stderr.startswith("lora-theory explore: explore needs the extra")
    assert "pip install 'lora-theory[explore]'" in " ".join(explored.stderr.split())
