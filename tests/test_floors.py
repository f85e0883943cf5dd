"""The architecture: packages are floors, and an import never runs back up."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# From the ground up: a package imports from those above it in this list, and from no other.
FLOORS = [
    "moved", "versions", "files", "numeric", "augment", "_C", "kernels", "stats", "theory", "ops", "optim",
    "sample_norms", "nn", "replicas", "noise", "sde", "experiments", "analysis", "verify", "plots", "studies", "cli",
    "__main__",
]  # fmt: skip


def imports() -> Iterator[tuple[str, str, str]]:
    """Yield (importing package or module, imported one, place) of everything in svag_fast/ and kernels/."""
    for path in [*(ROOT / "svag_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        here = "kernels" if parts[0] == "kernels" else parts[1]
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = node.module == "svag_fast"
                names = [f"svag_fast.{alias.name}" for alias in node.names] if whole else [node.module]
            for name in names:
                package, _, rest = name.partition(".")
                there = rest.partition(".")[0]
                if package == "svag_fast" and there not in ("", "__version__", here):
                    yield here, there, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_import_goes_down() -> None:
    upward = [
        f"{place}: {here} imports {there}"
        for here, there, place in imports()
        if here != "__init__" and FLOORS.index(there) >= FLOORS.index(here)
    ]
    assert not upward, "\n".join(upward)


def test_every_package_has_its_floor() -> None:
    rooms = {path.stem for path in (ROOT / "svag_fast").iterdir() if path.name.endswith(".py") or path.is_dir()}
    assert rooms - {"__init__", "__pycache__"} <= set(FLOORS)


def test_the_wheel_has_every_package() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "svag_fast").rglob("__init__.py")}
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted([*(".".join(f.parts) for f in folders), "svag_fast.kernels"])
