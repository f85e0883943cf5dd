"""Data sets and batches: sizes, standardisation, reproducible and correctly distributed draws."""

import gzip
import hashlib
import pickle
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.io import savemat

from svag_fast.experiments.data import (
    DATASETS,
    DatasetNotFoundError,
    download,
    draw_batch,
    load_dataset,
    read_idx,
    svhn,
    train_size,
)
from svag_fast.experiments.data.files import roots


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
    with pytest.raises(ValueError, match=f"dataset must be one of {', '.join(DATASETS)} or FILE.npz, got 'mnist'"):
        load_dataset("mnist")


def write_fashion_mnist(folder, *, n=12, compressed=False):
    rng = np.random.default_rng(0)
    made = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (n, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(n, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(3, dtype=np.uint8),
    }
    folder.mkdir(parents=True)
    for name, array in made.items():
        raw = idx_bytes(array)
        (folder / (name + ".gz" * compressed)).write_bytes(gzip.compress(raw) if compressed else raw)
    return made


@pytest.fixture
def small(monkeypatch):
    """The table with other sizes."""

    def change(name, train_size, test_size, **more):
        source = DATASETS[name]._replace(train_size=train_size, test_size=test_size, **more)
        monkeypatch.setitem(DATASETS, name, source)

    return change


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("folder", ["fashion-mnist", "FashionMNIST/raw", "."])
def test_fashion_mnist_is_read_from_the_folder_that_the_environment_names(
    tmp_path, monkeypatch, compressed, folder, small
):
    made = write_fashion_mnist(tmp_path / "data" / folder, compressed=compressed)
    small("fashion-mnist", 12, 3)
    monkeypatch.setenv("SVAG_FAST_DATA", str(tmp_path / "data"))
    data = load_dataset("fashion-mnist")
    pixels = made["train-images-idx3-ubyte"].astype(float)
    expected = (made["t10k-images-idx3-ubyte"] - pixels.mean()) / pixels.std()
    assert data.train_images.shape == (12, 1, 28, 28)
    assert np.allclose(data.test_images.squeeze(1).numpy(), expected, atol=1e-6)
    assert data.test_labels.tolist() == [0, 1, 2]
    assert data.num_classes == 10
    assert data.standardise(data.test_images) is data.test_images


def test_a_data_set_of_another_size_than_the_published_is_refused(tmp_path):
    write_fashion_mnist(tmp_path / "fashion-mnist")
    with pytest.raises(
        ValueError, match=r"fashion-mnist must be 60,000 images for training and 10,000 .* got 12 with 12"
    ):
        load_dataset("fashion-mnist", data_dir=tmp_path)


def test_folders_are_searched_in_order_and_missing_files_say_where_and_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SVAG_FAST_DATA", str(tmp_path / "second"))
    found = roots(tmp_path / "first")
    assert found[:3] == [tmp_path / "first", tmp_path / "second", Path("data")]
    monkeypatch.setattr("svag_fast.experiments.data.fashion_mnist.Path.glob", lambda self, pattern: iter(()))
    for name, advice in (("fashion-mnist", "apt install dataset-fashion-mnist"), ("svhn", "--download")):
        with pytest.raises(DatasetNotFoundError, match=advice) as refused:
            load_dataset(name, data_dir=tmp_path / "first")
        assert all(str(folder) in str(refused.value) for folder in found)


def write_svhn(folder, change=lambda X, y: {"X": X, "y": y}):
    """Both files as MATLAB 5 writes them, compressed; the test's labels are 9, 10 (the digit 0)."""
    sums = {}
    for seed, (name, labels) in enumerate({"train_32x32.mat": [1, 10, 3, 2], "test_32x32.mat": [9, 10]}.items()):
        X = np.random.default_rng(seed).integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        y = np.array(labels, np.uint8)[:, None]
        savemat(folder / name, change(X, y), do_compression=True)
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return sums


def test_svhn_s_images_and_labels_are_those_of_its_files(tmp_path):
    sums = write_svhn(tmp_path)
    data = svhn.load([tmp_path / "nothing here", tmp_path], sums)
    assert data.train_images.shape == (4, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8
    X = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    assert data.train_images[2, 1, 5, 7] == X[5, 7, 1, 2]
    assert data.train_labels.tolist() == [1, 0, 3, 2]
    assert data.test_labels.tolist() == [9, 0]
    assert torch.allclose(data.standardise(data.test_images), (data.test_images / 255 - 0.5) / 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, y: {"X": X}, "train_32x32.mat is no MATLAB file of X and y"),
        (lambda X, y: {"X": X[..., 1:], "y": y}, r"must hold X, bytes \[32, 32, 3, n\], and y, n labels"),
        (lambda X, y: {"X": X.astype(float), "y": y}, "must hold X, bytes"),
        (lambda X, y: {"X": X, "y": y + 1}, "svhn's training labels must be from 0 to 9, got 11"),
    ],
)
def test_another_mat_file_is_refused(tmp_path, change, message):
    sums = write_svhn(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        svhn.load([tmp_path], sums)
    with pytest.raises(ValueError, match=r"train_32x32.mat has the MD5 checksum"):
        svhn.load([tmp_path])


def test_a_mat_file_that_is_not_one_is_refused_and_a_missing_one_named(tmp_path):
    write_svhn(tmp_path)
    (tmp_path / "train_32x32.mat").write_bytes(b"no file of MATLAB's" * 20)
    sums = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in svhn.FILES}
    with pytest.raises(ValueError, match=r"train_32x32.mat is no MATLAB file of X and y"):
        svhn.load([tmp_path], sums)
    sums = write_svhn(tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_32x32.mat"):
        svhn.load([tmp_path], sums)


def own_images(n=6, shape=(3, 4, 5), dtype=np.uint8):
    rng = np.random.default_rng(0)
    x_train, x_test = (rng.integers(0, 256, (count, *shape)).astype(dtype) for count in (n, 2))
    return {"x_train": x_train, "y_train": np.arange(n) % 3, "x_test": x_test, "y_test": np.array([2, 0])}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.int16])
@pytest.mark.parametrize("shape", [(4, 5), (1, 4, 5), (3, 4, 5), (4, 5, 3), (4, 5, 1)])
def test_an_npz_file_s_images_are_standardised_by_channel_whatever_their_form(tmp_path, shape, dtype):
    arrays = own_images(shape=shape, dtype=dtype)
    np.savez(tmp_path / "own.npz", **arrays)
    data = load_dataset(str(tmp_path / "own.npz"))
    first = arrays["x_train"].astype(float)
    if len(shape) == 2:
        first = first[:, None]
    elif shape[-1] in (1, 3):
        first = first.transpose(0, 3, 1, 2)
    assert data.train_images.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    expected = (first - first.mean((0, 2, 3), keepdims=True)) / first.std((0, 2, 3), keepdims=True)
    assert np.allclose(data.standardise(data.train_images).numpy(), expected, atol=1e-5)
    assert data.train_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test_labels.tolist() == [2, 0]
    assert data.num_classes == 3
    assert train_size(str(tmp_path / "own.npz")) == 6
    assert load_dataset(str(tmp_path / "own.npz"), label_noise=1.0).test_labels.tolist() == [2, 0]


def test_keras_s_columns_of_labels_are_taken(tmp_path):
    arrays = own_images()
    np.savez(tmp_path / "own.npz", **(arrays | {"y_train": arrays["y_train"][:, None]}))
    assert load_dataset(str(tmp_path / "own.npz")).train_labels.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y_test": None}, "it lacks y_test"),
        ({"x_train": np.array([{}], object)}, "Object arrays cannot be loaded when allow_pickle=False"),
        ({"x_train": np.zeros((6, 4))}, r"x_train must be numbers \[n, H, W\].* got float64 \[6, 4\]"),
        ({"x_train": np.zeros((6, 4, 5), complex)}, "x_train must be numbers"),
        ({"x_train": np.zeros((6, 4, 5), "U3")}, "x_train must be numbers"),
        ({"x_train": np.zeros((6, 4, 5, 6))}, "x_train must have 1 or 3 channels"),
        ({"x_train": np.zeros((6, 3, 5, 3))}, "x_train must have 1 or 3 channels, before or behind"),
        ({"x_train": np.full((6, 3, 4, 5), np.nan)}, "x_train must be finite in float32"),
        ({"x_train": np.full((6, 3, 4, 5), 1e300)}, "x_train must be finite in float32"),
        ({"x_train": np.zeros((6, 3, 4, 5), np.uint8)}, "x_train must not be the same everywhere in a channel"),
        ({"x_train": np.zeros((0, 3, 4, 5))}, "x_train must hold images"),
        ({"x_test": np.ones((2, 3, 4, 6), np.uint8)}, "test images must be one or more, all of one size"),
        ({"x_test": np.ones((0, 3, 4, 5), np.uint8), "y_test": np.zeros(0, int)}, "test images must be one or more"),
        ({"y_train": np.arange(5)}, "training images must be one or more, all of one size, with a label each"),
        ({"y_train": np.arange(6.0)}, r"y_train must be integers \[n\], got float64 \[6\]"),
        ({"y_train": np.zeros((6, 2), int)}, "y_train must be integers"),
        ({"y_train": np.array([0, 1, 2, -1, 0, 0])}, "training labels must be from 0 to 2, got -1"),
        ({"x_test": np.ones((2, 3, 4, 5))}, "x_train and x_test must both be uint8 or neither, got uint8 and float64"),
        (
            {"y_train": np.array([0, 1, 2, 10**9, 0, 0])},
            "y_train must hold labels below 6, its number of images, got 1",
        ),
        ({"y_test": np.array([0, 3])}, "test labels must be from 0 to 2, got 3"),
    ],
)
def test_an_npz_file_of_something_else_is_refused_by_array(tmp_path, change, message, capsys):
    arrays = {name: value for name, value in (own_images() | change).items() if value is not None}
    np.savez(tmp_path / "own.npz", **arrays)
    with pytest.raises(ValueError, match=message) as refused:
        load_dataset(str(tmp_path / "own.npz"))
    assert "own.npz" in str(refused.value)


def test_what_is_no_npz_file_is_refused_and_a_missing_one_named(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"there is no file .*own.npz"):
        load_dataset(str(tmp_path / "own.npz"))
    assert train_size(str(tmp_path / "own.npz")) is None
    np.savez(tmp_path / "whole.npz", **own_images())
    pickled = pickle.dumps([1])
    for raw in (b"", b"no zip", (tmp_path / "whole.npz").read_bytes()[:-30], pickled):
        (tmp_path / "own.npz").write_bytes(raw)
        with pytest.raises(ValueError, match=r"must be an .npz file of the arrays x_train, y_train, x_test, y_test"):
            load_dataset(str(tmp_path / "own.npz"))
        assert train_size(str(tmp_path / "own.npz")) is None


def fake_torchvision(monkeypatch, classes):
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(**classes)))


def test_a_download_is_torchvision_s_for_both_parts_and_is_then_found(tmp_path, monkeypatch, small):
    asked = []

    class FashionMNIST:
        def __init__(self, root, *, train, download):
            asked.append((root, train, download))
            if train:
                write_fashion_mnist(Path(root, "FashionMNIST", "raw"), compressed=True)

    class SVHN:
        def __init__(self, root, *, split, download):
            asked.append((root, split, download))

    fake_torchvision(monkeypatch, {"FashionMNIST": FashionMNIST, "SVHN": SVHN})
    small("fashion-mnist", 12, 3)
    download("fashion-mnist", tmp_path)
    download("svhn", tmp_path)
    root = str(tmp_path)
    assert asked == [(root, True, True), (root, False, True), (root, "train", True), (root, "test", True)]
    assert len(load_dataset("fashion-mnist", data_dir=tmp_path).train_labels) == 12


def test_a_download_that_can_t_be_says_why(tmp_path, monkeypatch):
    class CIFAR10:
        def __init__(self, root, *, train, download):
            raise OSError("Name or service not known")

    fake_torchvision(monkeypatch, {"CIFAR10": CIFAR10})
    with pytest.raises(
        DatasetNotFoundError, match=r"cifar10 could not be downloaded into .*: Name or service not known"
    ):
        download("cifar10", tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DatasetNotFoundError, match=r"needs torchvision: pip install 'svag_fast\[vision\]'"):
        download("cifar10", tmp_path)
    for name in ("digits", "own.npz"):
        with pytest.raises(
            ValueError, match=f"dataset must be one that torchvision has, where it is downloaded, got '{name}'"
        ):
            download(name, tmp_path)


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


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_cut_gzip_is_refused_and_a_missing_file_named(tmp_path, damage):
    whole = gzip.compress(idx_bytes(np.zeros((20, 30), np.uint8)))
    (tmp_path / "x-ubyte.gz").write_bytes(whole[:-9] if damage == "cut" else whole[:12] + b"\xff" * 9 + whole[21:])
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
