"""How norms had grown before an explosion, told from a history. Internal."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from optaxclip.explosions.leading import STEPS_BEFORE, fit_growth, leading_leaf
from optaxclip.reporting.history import History

_leading_leaf = jax.jit(leading_leaf)
_fit_growth = jax.jit(fit_growth)


def growth_of(kept: History, began: int) -> list[str]:
    """Sentences: how the norms had grown up to the last explosion, if they had."""
    nonfinite = np.flatnonzero(kept.fired[began:, 0])
    end = began + int(nonfinite[0] if len(nonfinite) else 0)
    whole = _grown(kept.norm, kept.limit, began, end)
    found = [("The norm had grown by", whole)]
    # In a non-finite row nothing has grown most.
    finite = np.flatnonzero(np.isfinite(kept.norms[: end + 1]).all(axis=1))
    most = leading_at(kept, finite[-1]) if len(finite) else -1
    if kept.norms.shape[1] > 1 and most >= 0:
        unknown = np.full_like(kept.limit, np.inf)
        what = f"In the end that of {kept.names[most]!r} had grown most, by"
        found.append((what, _grown(kept.norms[:, most], unknown, began, end)))
    return [
        f"{what} about {grown.rate:.3g}x per step since step "
        f"{kept.step[grown.start]}, from {grown.low:.3g} to {grown.high:.3g}."
        for what, grown in found
        if grown
    ]


def leading_at(kept: History, row: int) -> int:
    """The scope that leads in a row, by the rule of the device; -1 for none.

    In a record of the largest norms only one that is non-finite, by its rank.
    """
    # The device, where it judged the step, knew more of the steps before.
    if kept.leaf[row] >= 0:
        return int(kept.leaf[row])
    before = row - STEPS_BEFORE
    # Nothing is known of a row before the first, nor of which scope had a rank then.
    is_known = (before >= 0) & (kept.ranked is None)
    known = np.where(is_known[:, None], kept.norms[np.maximum(before, 0)], 0)
    return int(_leading_leaf(kept.norms[row], known))


class Grown(NamedTuple):
    """A rise between two rows of a history."""

    start: int
    low: float
    high: float
    rate: float
    """By which factor per step, fitted to all between the two."""


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
    fitted = np.zeros(len(norms), np.float32)
    fitted[start : end + 1] = norms[start : end + 1]
    rate = float(_fit_growth(fitted))
    # What jumped, and has fallen since, had not grown.
    if not np.any(norms[rise] > limits) or rate <= 1:
        return None
    return Grown(start, norms[start], norms[end], rate)
