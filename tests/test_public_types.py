"""Type checkers and editors see the types of the public names: mypy finds every misuse, and nothing in right use."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import svag_fast

ROOT = Path(__file__).parents[1]

# A line that ends in "# error: CODE" must have exactly this error, any other none.
USES = """
import torch
import svag_fast
from svag_fast import RunningNoise, per_sample_sq_norms

model = torch.nn.Linear(2, 2)
optimizer = svag_fast.SVAG(model.parameters(), lr=0.1, l=4, momentum=0.9)
noise: RunningNoise = svag_fast.RunningNoise()
noise.update(optimizer.step())
value: float = noise.nsr.standard_error
c1, c2 = svag_fast.svag_coefficients(4.0)
with svag_fast.use_backend("cpu"), per_sample_sq_norms(model, loss_reduction="sum") as norms:
    total: torch.Tensor = norms.total

svag_fast.SVAG(model.parameters(), lr=0.1, l=4, momentum="0.9")  # error: arg-type
svag_fast.SVAG(model.parameters(), l=4)  # error: call-arg
svag_fast.SVAGAdam(model.parameters(), lr=0.1, l=4, beta=0.9)  # error: call-arg
svag_fast.SVAGRMSprop(model.parameters(), lr=0.1, l=4, initial_square_avg=[1.0])  # error: arg-type
svag_fast.SVAGD(model.parameters())  # error: attr-defined
from svag_fast import SGD  # error: attr-defined
per_sample_sq_norms(model, batch_size="2")  # error: arg-type
per_sample_sq_norms(model, reduction="sum")  # error: call-arg
images: torch.Tensor = svag_fast.augment.crop_flip(4)(torch.ones(1), torch.Generator())
svag_fast.augment.crop_flip("4")  # error: arg-type
noise.update(1.0)  # error: arg-type
noise.noise_scale("8")  # error: arg-type
noise.nsr.error  # error: attr-defined
wrong: str = noise.nsr.mean  # error: assignment
first: int = svag_fast.svag_coefficients(4.0)  # error: assignment
with svag_fast.use_backend(1):  # error: arg-type
    pass
"""

# torch's own types are left out: reading them takes a minute, and what is tested is ours.
CONFIG = """
[mypy]
strict = true
disallow_subclassing_any = false
[mypy-svag_fast.*]
follow_imports = silent
[mypy-torch.*]
follow_imports = skip
[mypy-numpy.*]
follow_imports = skip
"""


def test_mypy_finds_every_misuse_of_the_public_names_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "uses.py").write_text(USES)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), "--no-pretty"]
    command += ["--cache-dir", str(tmp_path / "cache"), str(tmp_path / "uses.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {int(n): code for n, code in re.findall(r"uses\.py:(\d+): error: .*\[([a-z-]+)\]", done.stdout)}
    lines = enumerate(USES.splitlines(), 1)
    expected = {n: line.rpartition("# error: ")[2] for n, line in lines if "# error: " in line}
    assert found == expected, done.stdout + done.stderr
    assert f"Found {len(expected)} errors in 1 file" in done.stdout


def test_what_type_checkers_see_is_what_is_imported() -> None:
    """The names imported under TYPE_CHECKING are those of the lazy tables, from the same modules."""
    tree = ast.parse(Path(svag_fast.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.asname == alias.name}
    assert seen == svag_fast._LAZY | dict.fromkeys(svag_fast._MODULES, "svag_fast")
    for name in svag_fast.__all__:
        assert getattr(svag_fast, name) is not None


def test_no_module_hides_a_public_name() -> None:
    """Importing a module of the package sets its name there, over a function that was loaded under that name before."""
    modules = {module.name for module in pkgutil.iter_modules(svag_fast.__path__)}
    assert not modules & set(svag_fast._LAZY)
