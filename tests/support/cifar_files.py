"""Small files in the formats that CIFAR is published in: pickles of Python 2 (protocol 2), and an archive of them."""

import dataclasses
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np

from svag_fast.experiments.data.cifar import Version


def _text(raw: bytes) -> bytes:
    return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def python2_pickle(images: np.ndarray, labels: list[int], key: bytes) -> bytes:
    """What Python 2's cPickle makes of {"batch_label": ..., "data": uint8 [n, 3072], key: [ints]}."""
    shape = b"".join(map(_integer, images.shape)) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + _text(b"u1") + _integer(0) + _integer(1) + b"\x87R"
    dtype += b"(" + _integer(3) + _text(b"|") + b"NNN" + _integer(-1) + _integer(-1) + _integer(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + _integer(0) + b"\x85" + _text(b"b") + b"\x87R"
    array += b"(" + _integer(1) + shape + dtype + b"\x89" + _text(images.tobytes()) + b"tb"
    items = _text(b"batch_label") + _text(b"a small batch") + _text(b"data") + array
    items += _text(key) + b"](" + b"".join(map(_integer, labels)) + b"e"
    return b"\x80\x02}(" + items + b"u."


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), dtype=np.uint8)


def write(root: Path, version: Version, *, n: int = 3, archive: bool = False) -> Version:
    """Write a batch of n images a file into `root`, and return the version with these files' checksums."""
    files = {}
    for number, name in enumerate((*version.train, *version.test)):
        labels = [(number + i) % version.num_classes for i in range(n)]
        files[name] = python2_pickle(images(n, number), labels, version.labels)
    sums = {name: hashlib.md5(raw).hexdigest() for name, raw in files.items()}
    small = dataclasses.replace(
        version, train={name: sums[name] for name in version.train}, test={name: sums[name] for name in version.test}
    )
    if not archive:
        for name, raw in files.items():
            (root / version.folder).mkdir(parents=True, exist_ok=True)
            (root / version.folder / name).write_bytes(raw)
        return small
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, raw in files.items():
            member = tarfile.TarInfo(f"{version.folder}/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    (root / version.archive).write_bytes(buffer.getvalue())
    return dataclasses.replace(small, archive_md5=hashlib.md5(buffer.getvalue()).hexdigest())
