"""Data sets and batches: sizes, standardisation, reproducible and correctly distributed draws."""

import gzip
import struct

import numpy as np
import pytest
import torch

from svag_fast.experiments.data import DATASETS, DatasetNotFoundError, draw_batch, load_dataset, read_idx


def idx_bytes(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_digits_are_split_1437_to_360_and_standardised_by_the_training_pixels():
    digits = load_dataset("digits")
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.test_images.shape == (360, 1, 8, 8)
    assert digits.num_classes == 10
    pixels = digits.train_images.double()
    assert abs(float(pixels.mean())) < 1e-6
    assert abs(float(pixels.std(correction=0)) - 1) < 1e-6


def test_the_digits_split_is_a_permutation_of_scikit_learn_s_images_and_does_not_change():
    from sklearn.datasets import load_digits

    digits, again = load_dataset("digits"), load_dataset("digits")
    counts = torch.bincount(torch.cat([digits.train_labels, digits.test_labels]))
    assert torch.equal(counts, torch.from_numpy(np.bincount(load_digits().target)))
    assert torch.equal(digits.train_images, again.train_images)
    assert digits.train_labels[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]


def test_a_batch_without_replacement_is_distinct_and_covers_the_population_evenly():
    """4,000 batches of 5 out of 20: each index 1,000 times with standard deviation sqrt(4000 * 1/4 * 3/4) = 27.4."""
    generator = seeded()
    draws = torch.stack([draw_batch(20, 5, replacement=False, generator=generator) for _ in range(4000)])
    assert all(len(set(row.tolist())) == 5 for row in draws)
    assert (torch.bincount(draws.flatten(), minlength=20) - 1000).abs().max() < 4.5 * 27.4


def test_a_batch_with_replacement_repeats_as_often_as_independent_draws_do():
    """P(all 5 of 20 distinct) = 0.5814; of 4,000 batches, standard deviation 31.2."""
    generator = seeded()
    distinct = sum(
        len(set(draw_batch(20, 5, replacement=True, generator=generator).tolist())) == 5 for _ in range(4000)
    )
    assert abs(distinct - 4000 * 0.5814) < 4.5 * 31.2


@pytest.mark.parametrize("replacement", [False, True])
def test_batches_follow_from_the_generator_alone(replacement):
    first = draw_batch(50, 7, replacement=replacement, generator=seeded(3))
    torch.rand(5)
    assert torch.equal(first, draw_batch(50, 7, replacement=replacement, generator=seeded(3)))
    generator = seeded(3)
    draw_batch(50, 7, replacement=replacement, generator=generator)
    assert not torch.equal(first, draw_batch(50, 7, replacement=replacement, generator=generator))


def test_unknown_data_set_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=f"dataset must be {' or '.join(DATASETS)}, got 'mnist'"):
        load_dataset("mnist")


@pytest.mark.parametrize("compressed", [False, True])
def test_fashion_mnist_is_read_from_the_folder_that_the_environment_names(tmp_path, monkeypatch, compressed):
    rng = np.random.default_rng(0)
    made = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(12, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(3, dtype=np.uint8),
    }
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for name, array in made.items():
        raw = idx_bytes(array)
        (folder / (name + ".gz" * compressed)).write_bytes(gzip.compress(raw) if compressed else raw)
    monkeypatch.setenv("SVAG_FAST_DATA", str(tmp_path))
    data = load_dataset("fashion-mnist")
    pixels = made["train-images-idx3-ubyte"].astype(float)
    expected = (made["t10k-images-idx3-ubyte"] - pixels.mean()) / pixels.std()
    assert data.train_images.shape == (12, 1, 28, 28)
    assert np.allclose(data.test_images.squeeze(1).numpy(), expected, atol=1e-6)
    assert data.test_labels.tolist() == [0, 1, 2]
    assert data.num_classes == 10


def test_missing_fashion_mnist_says_where_it_looked_and_how_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("SVAG_FAST_DATA", str(tmp_path))
    monkeypatch.setattr("svag_fast.experiments.data.fashion_mnist.Path.glob", lambda self, pattern: iter(()))
    with pytest.raises(DatasetNotFoundError, match="apt install dataset-fashion-mnist") as refused:
        load_dataset("fashion-mnist")
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "not an IDX file"),
        (b"\0\0\x08\x03\0\0", "not an IDX file"),
        (idx_bytes(np.zeros((2, 3), np.uint8))[:-1], "holds 6 bytes, but 5 follow"),
    ],
)
def test_a_foreign_or_cut_idx_file_is_refused(tmp_path, raw, message):
    (tmp_path / "x-ubyte").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "x-ubyte")


def test_a_cut_gzip_is_refused_and_a_missing_file_named(tmp_path):
    (tmp_path / "x-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros((20, 30), np.uint8)))[:-9])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_idx(tmp_path / "x-ubyte")
    with pytest.raises(DatasetNotFoundError, match="y-ubyte"):
        read_idx(tmp_path / "y-ubyte")


def test_label_noise_redraws_its_part_of_the_training_labels_once_and_leaves_the_test_clean():
    clean, noisy, again = (load_dataset("digits", label_noise=part) for part in (0.0, 0.2, 0.2))
    assert torch.equal(noisy.train_labels, again.train_labels)
    assert torch.equal(noisy.test_labels, clean.test_labels)
    assert torch.equal(noisy.train_images, clean.train_images)
    n = len(clean.train_labels)
    changed = noisy.train_labels != clean.train_labels
    # A redrawn label stays what it was in one case of ten: 287 draws, and four standard deviations.
    drawn = round(0.2 * n)
    assert abs(int(changed.sum()) - 0.9 * drawn) < 4 * (0.09 * drawn) ** 0.5
    counts = torch.bincount(load_dataset("digits", label_noise=1.0).train_labels, minlength=10)
    assert float(((counts - n / 10).square() / (n / 10)).sum()) < 27.9  # chi² of 9: 0.1 %
    assert set(noisy.train_labels.tolist()) <= set(range(10))


@pytest.mark.parametrize("part", [-0.1, 1.5, float("nan")])
def test_label_noise_out_of_range_is_refused(part):
    with pytest.raises(ValueError, match="from 0 to 1"):
        load_dataset("digits", label_noise=part)
