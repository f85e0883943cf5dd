"""The pages are true: links lead somewhere, paths exist, the API is listed whole, the README's loop runs."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from sentences import pages
from test_floors import FLOORS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["", ".ops", ".optim", ".sample_norms", ".nn", ".replicas", ".noise", ".theory", ".sde"]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(#[^)\s]*)?\)")
PATH = re.compile(r"`((?:svag_fast|tests|bench|csrc|kernels|examples|requirements|docs)/[\w./]*)`")
ROW = re.compile(r"^\| `(\w+)` \| [^|]+ \| \[[^\]]+\]\(\.\./([^)]+)\) \|$", re.M)


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.M)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(without_code(page)):
        if not target.startswith("http"):
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target + anchor
    for path in PATH.findall(without_code(page)):
        assert "X." in path or "NAME." in path or (ROOT / path).exists(), path


def section(heading: str) -> dict[str, str]:
    """The names under a heading of docs/api.md, each with the file that its row links to."""
    text = (ROOT / "docs" / "api.md").read_text()
    assert text.count(f"# {heading}\n") == 1, heading
    return dict(ROW.findall(text.partition(f"# {heading}\n")[2].partition("\n#")[0]))


def defined(file: str) -> set[str]:
    """The names that a file's top level defines."""
    names = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_the_api_page_lists_every_public_name_with_the_file_that_defines_it(package: str) -> None:
    listed = section("svag_fast" + package)
    assert sorted(listed) == sorted(importlib.import_module("svag_fast" + package).__all__)
    assert {name: file for name, file in listed.items() if name not in defined(file)} == {}


def test_the_api_pages_modules_define_what_is_listed() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    modules = re.findall(r"^### (svag_fast\..*)$", text, re.M)
    assert modules
    for module in modules:
        for name, file in section(module).items():
            assert file == module.replace(".", "/") + ".py"
            assert name in defined(file), (module, name)


def test_contributing_shows_the_floors_in_their_order() -> None:
    block = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    shown = [re.split(r"  +", line)[0].split(", ") for line in block.strip().splitlines()]
    assert [name for floor in reversed(shown) for name in reversed(floor)] == [f for f in FLOORS if f != "__main__"]


def test_the_replicas_pages_code_runs() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/replicas.md").read_text(), re.DOTALL):
        exec(compile(block, "replicas.md", "exec"), names)
    assert names["stats"].nsr.shape == names["means"].inner.shape == names["test"].accuracy.shape == (16,)


def test_the_readmes_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    loop = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "4 * 1000" in loop
    exec(compile(loop.replace("4 * 1000", "4 * 10"), "README.md", "exec"), {})
    assert re.search(r"\d", capsys.readouterr().out)
