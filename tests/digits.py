"""Small images of digits in the files that MNIST comes in."""

import gzip
from pathlib import Path

import numpy as np


def blob_digits(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images with one noisy bright bar, whose place is the label: easy to learn."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(num) % 10
    images = rng.integers(0, 50, (num, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label : 2 * label + 4] += 200
    return images.astype(np.uint8), labels.astype(np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    header = np.array([0x800 + array.ndim, *array.shape], ">u4")
    return header.tobytes() + array.tobytes()


def write_idx(directory: Path, *, compress: bool = False, num_train: int = 300):
    """Writes the four files and returns the arrays in them, as `load` gives them."""
    arrays = []
    for part, num, seed in (("train", num_train, 0), ("t10k", 110, 1)):
        images, labels = blob_digits(num, seed)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            path = directory / f"{part}-{name}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(content) if compress else content)
            arrays.append(array)
    return arrays
