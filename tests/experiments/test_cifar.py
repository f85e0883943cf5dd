"""CIFAR from files in its real formats: values, where they are found, checksums, and pickles that would run code."""

import contextlib
import dataclasses
import hashlib
import os
import pickle

import cifar_files
import numpy as np
import pytest
import torch

from svag_fast.experiments.data import DatasetNotFoundError, cifar, safe_pickle
from svag_fast.experiments.data.cifar import CIFAR10, CIFAR100


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("version", [CIFAR10, CIFAR100], ids=lambda version: version.name)
def test_images_and_labels_are_the_files_in_order(tmp_path, version, archive):
    small = cifar_files.write(tmp_path, version, archive=archive)
    data = cifar.load(small, [tmp_path / "nothing here", tmp_path])
    batches = len(version.train)
    assert data.train_images.shape == (3 * batches, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8
    expected = np.concatenate([cifar_files.images(3, number) for number in range(batches)])
    # A row is 1,024 red bytes, row by row of the image, then green and blue.
    assert np.array_equal(data.train_images.reshape(-1, 3072).numpy(), expected)
    assert data.train_images[0, 1, 2, 3] == expected[0, 1024 + 2 * 32 + 3]
    assert data.train_labels.tolist() == [number + i for number in range(batches) for i in range(3)]
    assert data.test_labels.tolist() == [batches, batches + 1, batches + 2]
    assert data.num_classes == version.num_classes


def test_a_batch_is_standardised_as_torchvision_s_transforms_do(tmp_path):
    data = cifar.load(cifar_files.write(tmp_path, CIFAR10), [tmp_path])
    some = data.train_images[[0, 4]]
    mean, deviation = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    assert data.standardise(some).dtype == torch.float32
    assert torch.allclose(data.standardise(some), (some / 255 - mean) / deviation, atol=1e-5)
    whole = data.standardised()
    assert torch.equal(whole.train_images[[0, 4]], data.standardise(some))
    assert whole.standardise(whole.test_images) is whole.test_images
    assert data.to("meta").standardise(data.to("meta").train_images).shape == data.train_images.shape


def test_the_folder_itself_may_be_named(tmp_path):
    small = cifar_files.write(tmp_path, CIFAR10)
    assert len(cifar.load(small, [tmp_path / CIFAR10.folder]).train_labels) == 15


def test_what_is_nowhere_says_where_it_was_looked_for_and_how_to_get_it(tmp_path):
    with pytest.raises(
        DatasetNotFoundError, match=r"cifar100's files \(cifar-100-python or cifar-100-python.tar.gz\)"
    ) as e:
        cifar.load(CIFAR100, [tmp_path])
    assert str(tmp_path) in str(e.value)
    assert "--download" in str(e.value)


@pytest.mark.parametrize("archive", [False, True], ids=["folder", "archive"])
def test_files_that_are_not_the_published_ones_are_refused(tmp_path, archive):
    cifar_files.write(tmp_path, CIFAR10, archive=archive)
    md5 = CIFAR10.archive_md5 if archive else CIFAR10.train["data_batch_1"]
    with pytest.raises(ValueError, match=f"has the MD5 checksum [0-9a-f]{{32}}, and the published file has {md5}"):
        cifar.load(CIFAR10, [tmp_path])


def test_a_missing_batch_is_named(tmp_path):
    small = cifar_files.write(tmp_path, CIFAR10)
    (tmp_path / CIFAR10.folder / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4"):
        cifar.load(small, [tmp_path])


def test_an_archive_of_something_else_is_refused(tmp_path):
    small = cifar_files.write(tmp_path, CIFAR100, archive=True)
    other = dataclasses.replace(small, folder="elsewhere")
    with pytest.raises(ValueError, match="must be an archive of train, test in elsewhere"):
        cifar.load(other, [tmp_path])
    raw = (tmp_path / small.archive).read_bytes()
    raw = raw[: len(raw) // 2]
    (tmp_path / small.archive).write_bytes(raw)
    cut = dataclasses.replace(small, archive_md5=hashlib.md5(raw).hexdigest())
    with pytest.raises(ValueError, match="must be an archive of"):
        cifar.load(cut, [tmp_path])


GOOD = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [3, 9]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD | {b"labels": [3, 10]}, "cifar10's training labels must be from 0 to 9, got 10"),
        (GOOD | {b"labels": [-1, 9]}, "cifar10's training labels must be from 0 to 9, got -1"),
        (GOOD | {b"labels": [3]}, "data_batch_1 must hold data, bytes .n, 3072., and labels, a list of n integers"),
        (GOOD | {b"labels": [3, 9.0]}, "data_batch_1 must hold data"),
        (GOOD | {b"labels": [3, 1 << 70]}, "data_batch_1 must hold data"),
        ({b"data": GOOD[b"data"]}, "data_batch_1 must hold data"),
        (GOOD | {b"data": GOOD[b"data"][:, 1:]}, "data_batch_1 must hold data"),
        (GOOD | {b"data": GOOD[b"data"].astype(np.float32)}, "data_batch_1 is no batch: its arrays must be of uint8"),
        (GOOD | {b"data": np.array([[GOOD]], object)}, "data_batch_1 is no batch: its arrays must be of uint8"),
        ([1, 2], "data_batch_1 must hold data"),
    ],
)
def test_a_pickle_of_something_else_is_refused_by_file(tmp_path, content, message):
    small = cifar_files.write(tmp_path, CIFAR10)
    raw = pickle.dumps(content, protocol=2)
    (tmp_path / CIFAR10.folder / "data_batch_1").write_bytes(raw)
    small = dataclasses.replace(small, train=small.train | {"data_batch_1": hashlib.md5(raw).hexdigest()})
    with pytest.raises(ValueError, match=message):
        cifar.load(small, [tmp_path])


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_and_arrays_come_back_from_every_protocol(protocol):
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    value = {b"a": array, b"f": np.asfortranarray(array), b"l": [1, (2.5, "x", None, True)], b"n": {b"raw": b"\xff"}}
    if protocol == 5:
        with pytest.raises(ValueError, match="it names numpy"):  # arrays by another door, which no CIFAR file has
            safe_pickle.loads(pickle.dumps(value, protocol=protocol))
        return
    found = safe_pickle.loads(pickle.dumps(value, protocol=protocol))
    assert np.array_equal(found[b"a"], array)
    assert np.array_equal(found[b"f"], array)
    assert found[b"l"] == value[b"l"]
    assert found[b"n"] == value[b"n"]


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "function", [os.mkdir, os.system, eval, exec, print, getattr, np.load, np.frombuffer, pickle.loads, __import__]
)
def test_a_pickle_that_names_a_function_is_refused_and_runs_nothing(tmp_path, function, protocol):
    mark = tmp_path / "was here"
    arguments = {os.system: f"mkdir '{mark}'", os.mkdir: str(mark)}
    hostile = pickle.dumps(
        {b"data": Runs(function, arguments.get(function, f"__import__('os').mkdir({str(mark)!r})"))}, protocol
    )
    with pytest.raises(ValueError, match="which is no part of plain values and arrays"):
        safe_pickle.loads(hostile)
    assert not mark.exists()


def test_the_hostile_pickles_above_would_have_run_by_pickle_itself(tmp_path):
    pickle.loads(pickle.dumps(Runs(os.mkdir, str(tmp_path / "was here"))))
    assert (tmp_path / "was here").exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80\x02",
        b"\x80\x63.",
        b"no pickle",
        b"\x80\x02}(U\x04dataK\x01",
        b"\x80\x02cnumpy\nndarray\n)R.",  # calling what is only ever handed on
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x02tb.",
        b"\x80\x02cnumpy\ndtype\nU\x01O\x85R.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x06\x00\x00\x00base64\x86R.",
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x02P1\n.",  # a persistent object
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J\xff\xff\xff\x7f\x85cnumpy\ndtype\nU\x02u1\x85R\x89U\x01xtb.",
    ],
)
def test_damaged_and_crafted_pickles_are_refused(raw):
    with pytest.raises(ValueError, match=r"^(it must be a pickle|its arrays|its bytes)"):
        safe_pickle.loads(raw)


def test_every_cut_and_every_changed_byte_of_a_batch_gives_a_value_or_a_value_error():
    raw = cifar_files.python2_pickle(cifar_files.images(1)[:, :12], [7], b"labels")
    for at in range(len(raw)):
        for changed in (raw[:at], raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]):
            with contextlib.suppress(ValueError):
                safe_pickle.loads(changed)
