"""Norms and clips as their definitions say, in NumPy's widest floats, one loop each."""

import numpy as np


def wide(x) -> np.ndarray:
    x = np.asarray(x)
    if np.iscomplexobj(x):
        return x.astype(np.clongdouble)
    return x.astype(np.float64).astype(np.longdouble)


def norm(arrays, ord=2) -> np.longdouble:
    sizes = np.concatenate([np.abs(wide(x)).reshape(-1) for x in arrays] or [[]])
    if sizes.size == 0 or sizes.max() == 0:
        return np.longdouble(0)
    if np.isinf(ord) or not np.isfinite(sizes).all():
        return sizes.max()
    return sizes.max() * np.sum((sizes / sizes.max()) ** ord) ** (
        1 / np.longdouble(ord)
    )


def scopes(leaves: list, per: str) -> list[list[tuple[int, tuple]]]:
    """Each scope as a list of (leaf, index of a part of it)."""
    everything = [(i, ()) for i in range(len(leaves))]
    if per == "tree":
        return [everything]
    if per == "leaf":
        return [[part] for part in everything]
    if per == "group":  # of even and odd leaves
        return [everything[::2], everything[1::2]]
    return [
        [(i, (Ellipsis, unit))]
        for i, leaf in enumerate(leaves)
        if np.ndim(leaf) > 1
        for unit in range(np.shape(leaf)[-1])
    ] + [[(i, ())] for i, leaf in enumerate(leaves) if np.ndim(leaf) <= 1]


def clip(leaves: list, limit: float, per="tree", ord=2) -> list[np.ndarray]:
    """In long double; the first row of the contract's table that fits decides."""
    out = [wide(x).copy() for x in leaves]
    for scope in scopes(leaves, per):
        size = norm([np.asarray(leaves[i])[index] for i, index in scope], ord)
        for i, index in scope:
            x = out[i][index]
            if not np.isfinite(size):
                x = np.where(np.isfinite(x), 0, np.nan)
            elif not limit >= 0:
                x = x * 0
            elif size > limit:
                x = x * (np.longdouble(limit) / size)
            out[i][index] = x
    return out
