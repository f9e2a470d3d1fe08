"""What a stranger installs is what stands in the repository."""

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fxquant

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def in_fresh_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_every_package_on_disk_is_packaged() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    on_disk = {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
        for name, folder in setuptools["package-dir"].items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert on_disk == set(setuptools["packages"])


def test_every_folder_with_code_is_a_package() -> None:
    folders = {file.parent for folder in ("fxquant", "backend", "patterns") for file in (ROOT / folder).rglob("*.py")}
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()] == []


def test_the_version_is_said_once_and_alike() -> None:
    assert fxquant.__version__ == PYPROJECT["project"]["version"] == importlib.metadata.version("fxquant")


def test_the_backend_is_found_through_its_entry_point() -> None:
    (found,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="outlierq")
    assert callable(found.load())


@pytest.mark.parametrize("folder", ["backend", "patterns"])
def test_one_module_has_one_name(folder: str) -> None:
    done = in_fresh_python(f"import {folder}")
    assert done.returncode != 0
    assert f"import fxquant.{folder}, not '{folder}'" in done.stderr


def test_importing_fxquant_asks_for_no_optional_package() -> None:
    optional = ("transformers", "triton", "scipy", "sympy.plotting", "hypothesis", "pytest")
    done = in_fresh_python(
        f"import sys, torch\nbefore = set(sys.modules)\nimport fxquant\n"
        f"print(sorted(m for m in set(sys.modules) - before if m.startswith({optional!r})))"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_constraints_pin_what_the_project_asks_for() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    project = PYPROJECT["project"]
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {dependency.split(">")[0].split("=")[0].lower().replace("_", "-") for dependency in asked}
    assert names <= pinned


def test_a_wheel_holds_every_source_and_nothing_at_the_top_level(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("fxquant", "backend", "patterns"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", *offline, "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"fxquant/py.typed"}
    for name, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items():
        files = [f for suffix in ("*.py", "*.cpp", "*.h", "tiles-*.json") for f in (ROOT / folder).rglob(suffix)]
        expected |= {str(Path(*name.split("."), f.relative_to(ROOT / folder))) for f in files}
    assert names == expected

