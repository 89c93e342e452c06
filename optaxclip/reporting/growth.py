"""How norms had grown before an explosion, told from a history. Internal."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from optaxclip.explosions.leading import STEPS_BEFORE, leading_leaf
from optaxclip.reporting.history import History

_leading_leaf = jax.jit(leading_leaf)


def growth_of(kept: History, began: int) -> list[str]:
    """Sentences: how the norms had grown up to the last explosion, if they had."""
    nonfinite = np.flatnonzero(kept.fired[began:, 0])
    end = began + int(nonfinite[0] if len(nonfinite) else 0)
    whole = _grown(kept.norm, kept.limit, began, end)
    found = [("The norm had grown by", whole)]
    most = _leading_at(kept.norms, end)
    if kept.norms.shape[1] > 1 and kept.ranked is None and most >= 0:
        unknown = np.full_like(kept.limit, np.inf)
        what = f"In the end that of {kept.names[most]!r} had grown most, by"
        found.append((what, _grown(kept.norms[:, most], unknown, began, end)))
    return [
        f"{what} {grown.rate:.3g}x per step since step {kept.step[grown.start]}, "
        f"from {grown.low:.3g} to {grown.high:.3g}."
        for what, grown in found
        if grown
    ]


def _leading_at(norms: np.ndarray, row: int) -> int:
    """As on the device, of the last row up to this one without a non-finite norm."""
    finite = np.flatnonzero(np.isfinite(norms[: row + 1]).all(axis=1))
    if not len(finite):
        return -1
    before = finite[-1] - STEPS_BEFORE
    # Of a row before the first nothing is known.
    known = np.where(before[:, None] >= 0, norms[np.maximum(before, 0)], 0)
    return int(_leading_leaf(norms[finite[-1]], known))


class Grown(NamedTuple):
    """A rise between two rows of a history."""

    start: int
    end: int
    low: float
    high: float

    @property
    def rise(self) -> float:
        """By which factor."""
        return self.high / self.low

    @property
    def rate(self) -> float:
        """By which factor per step."""
        return self.rise ** (1 / (self.end - self.start))


def _grown(norms: np.ndarray, limits: np.ndarray, began: int, end: int) -> Grown | None:
    """From the last norm that was as usual to the last one up to `end`, if it rose.

    As usual is up to the 90th percentile of the quietest 32 steps before it began. To
    rise is to exceed the limit, or where there is none twice the largest norm before:
    all else is noise.
    """
    norms = norms.astype(float)
    known = np.flatnonzero((norms > 0) & np.isfinite(norms))
    before = known[known < began]
    known = known[known <= end]
    if not len(before):
        return None
    blocks = np.array_split(norms[before], -(-len(before) // 32))
    # The quietest block, since a slow explosion may fill half of what is kept.
    usual = np.percentile(min(blocks, key=np.median), 90)
    start, end = int(known[norms[known] <= usual][-1]), int(known[-1])
    rise = slice(start + 1, end + 1)
    largest = norms[known[known <= start]].max()
    # In a warm-up there is no limit, and of single leaves none is known.
    limits = np.where(limits < np.inf, limits, 2 * largest)[rise]
    if not np.any(norms[rise] > limits):
        return None
    return Grown(start, end, norms[start], norms[end])
