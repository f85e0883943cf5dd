"""scikit-learn's handwritten digits: 1,797 images of 8x8, which come with the library."""

from __future__ import annotations

import numpy as np

from svag_fast.experiments.data.dataset import Dataset, standardised

TRAIN_SIZE = 1437  # of 1,797: four fifths


def load() -> Dataset:
    """Split them into 1,437 for training and 360 for the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # RandomState's stream is frozen by NumPy's policy: the split is the same for ever.
    order = np.random.RandomState(0).permutation(len(digits.target))
    train, test = order[:TRAIN_SIZE], order[TRAIN_SIZE:]
    return standardised("digits", digits.images[train], digits.target[train], digits.images[test], digits.target[test])
