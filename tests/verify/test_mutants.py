"""`svag-fast verify` catches every planted fault that it can reach; the unit test that is named catches the rest."""

from __future__ import annotations

import pytest
from verify.mutants import MUTANTS, caught, faulty_text


def test_every_fault_can_be_planted():
    """What each replaces stands in today's code, once; there are forty or more, of different names."""
    for mutant in MUTANTS:
        assert faulty_text(mutant)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40


@pytest.mark.nightly
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_fault_is_caught(mutant):
    assert caught(mutant)
