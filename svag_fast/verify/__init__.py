"""The paper's theorems, lemmas and equations as a battery of checks: ``svag-fast verify``."""
