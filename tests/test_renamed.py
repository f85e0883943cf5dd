"""Old public names give the new objects, with a DeprecationWarning at the line that asked."""

from __future__ import annotations

import importlib

import pytest

OLD_NAMES = [
    ("svag_fast", "UnsupportedModule", "UnsupportedModuleError"),
    ("svag_fast", "backend", "use_backend"),
    ("svag_fast.ops.backends", "backend", "use_backend"),
    ("svag_fast.sample_norms", "UnsupportedModule", "UnsupportedModuleError"),
    ("svag_fast.sample_norms.context", "UnsupportedModule", "UnsupportedModuleError"),
    ("svag_fast.noise", "MeanError", "Estimate"),
    ("svag_fast.noise.estimators", "MeanError", "Estimate"),
    ("svag_fast.sde", "SGD", "SGDProcess"),
    ("svag_fast.sde", "SVAG", "SVAGProcess"),
    ("svag_fast.sde.processes", "SVAG", "SVAGProcess"),
]


@pytest.mark.parametrize(("module", "old", "new"), OLD_NAMES)
def test_an_old_name_is_the_new_object_and_warns_where_it_is_used(module: str, old: str, new: str) -> None:
    package = importlib.import_module(module)
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is {new} now") as warned:
        found = getattr(package, old)
    assert found is getattr(package, new)
    assert warned[0].filename == __file__


@pytest.mark.parametrize("module", sorted({module for module, _, _ in OLD_NAMES}))
def test_an_unknown_name_is_an_attribute_error(module: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'bakend'"):
        importlib.import_module(module).bakend  # noqa: B018
