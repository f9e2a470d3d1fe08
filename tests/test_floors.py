"""Imports run one way, kernels' languages stay in their room, and no model is named: the architecture, as tests."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import ZOO

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"fxquant": "fxquant", "patterns": "fxquant.patterns", "backend": "fxquant.backend"}

# From the ground up. A module may import its own floor and those below; what is not named here is a door, on the top floor.
FLOORS = (
    ("fxquant.errors",),
    ("fxquant.numerics",),
    ("fxquant.recipe",),  # what is wanted, in terms of numbers alone
    ("fxquant.graph",),
    ("fxquant.plan", "fxquant.page_frame"),
    ("fxquant.page",),
    ("fxquant.report",),
    ("fxquant.patterns",),
    ("fxquant.backend",),
)


def module_of(file: Path) -> str:
    folder, *inner = file.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *inner]).removesuffix(".__init__")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Every module that ``file`` imports, relative ones resolved, with its line; under TYPE_CHECKING too."""
    package = module_of(file).split(".")
    if file.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def floor(module: str) -> int:
    inside = (n for n, names in enumerate(FLOORS) if any(module == name or module.startswith(name + ".") for name in names))
    return next(inside, len(FLOORS))


def sources() -> list[Path]:
    return [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", sources(), ids=module_of)
def test_imports_go_down(file: Path) -> None:
    here = floor(module_of(file))
    for line, module in imports(file):
        if module.split(".")[0] == "fxquant" and module != "fxquant.__version__":
            where = f"{file.relative_to(ROOT)}:{line} imports {module}, which is on a higher floor"
            assert floor(module) <= here, where


def test_triton_and_inductor_are_named_in_backend_alone() -> None:
    found = []
    for file in sources():
        if file.is_relative_to(ROOT / "backend"):
            continue
        found += [(file.name, line, m) for line, m in imports(file) if m.split(".")[0] == "triton" or "_inductor" in m]
        attributes = (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute))
        found += [(file.name, n.lineno, n.attr) for n in attributes if n.attr in ("_inductor", "triton")]
    assert found == []


def test_transformers_is_named_in_integrations_alone() -> None:
    found = [
        (module_of(file), line)
        for file in sources()
        if not module_of(file).startswith("fxquant.integrations")
        for line, module in imports(file)
        if module.split(".")[0] == "transformers"
    ]
    assert found == []


# Names of the zoo that are also plain words of this trade.
WORDS = {"clip", "switch", "opt", "phi", "git", "glm", "mpt", "ctrl", "esm", "vit", "ast", "sew", "t", "mt", "seed"}


def test_no_model_is_named_in_the_code() -> None:
    families = {re.split(r"[-.]", a.name)[0].rstrip("0123456789") for a in ZOO} - WORDS
    named = re.compile(rf"\b({'|'.join(sorted(families))})(?![a-z])", re.IGNORECASE)
    found = [
        f"{file.relative_to(ROOT)}:{number}: {hit[0]}"
        for file in sources()
        for number, text in enumerate(file.read_text().splitlines(), 1)
        if (hit := named.search(text))
    ]
    assert found == []
