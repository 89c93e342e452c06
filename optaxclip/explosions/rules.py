"""The rules for an explosion, their default limits, and the reason for each."""

from __future__ import annotations

from optaxclip import limits

RULES = ("nonfinite", "norm", "share", "loss")

NORM_LIMIT = limits.log_quantile()
SHARE_LIMIT = limits.drift()
# A loss jumps less than a norm: with an early jump of 5 most runs of the zoo that
# explode from their first steps are missed, with 2 twice as many early steps of healthy
# ones are flagged. Near zero, as at the minimum of a function without noise or where a
# penalty begins, a healthy loss jumps by any factor. The second limit is for one that
# rises smoothly.
LOSS_LIMIT = limits.minimum(
    limits.log_quantile(2.4, min_ratio=1.7, early_jump=2.5, min_level=0.01),
    limits.above_lowest(),
)

MIN_GROWTH = 20.0
"""A share counts only where the leaf's own norm has grown by this factor as well.

That is its geometric mean growth over the last 64 steps; before, no share counts. A
share alone also rises when the other leaves fall. On the recorded traces of
`tests/benchmarks/detection.py` 3 to 20 notice the same, 40 misses one run of six; the
larger, the fewer false alarms where gates that start at zero open during a warm-up.
"""
MIN_KNOWN = 5
"""In that mean, of the eight steps that stand for the last 64, this many must have a
norm: more than half, so that neither non-finite steps nor zeros blind the rule."""
MAX_GAP = 10
"""Explosions at most this many steps apart are one: a run that is skipped, rolled back
and accepted again is flagged with gaps of a few steps."""
