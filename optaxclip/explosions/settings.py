"""The arguments of `skip_explosions` that decide what becomes of a step. Internal."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.typing import ArrayLike

from optaxclip.checks import check_length, check_number


class Settings(NamedTuple):
    """Numbers that are known while tracing, but for the two factors."""

    max_consecutive: int
    rollback_after: int
    give_up_after: int
    snapshot_every: int
    cool_down: ArrayLike | None
    recovery: ArrayLike
    has_snapshots: bool
    """Whether it rolls back."""


def check_settings(
    *,
    max_consecutive: int,
    rollback_after: int,
    give_up_after: int,
    snapshot_every: int,
    cool_down: ArrayLike | None,
    recovery: ArrayLike,
    rollback: Any,
) -> Settings:
    """The settings; raises the errors of those that are out of range."""
    if not isinstance(rollback, bool) and rollback != "host":
        raise TypeError(f'rollback must be True, False or "host", not {rollback!r}')
    # What may be traced is checked where it is a number, and clipped in `cool`.
    check_number("recovery", recovery, lambda x: x >= 1, ">= 1")
    if cool_down is not None:
        check_number("cool_down", cool_down, lambda x: 0 < x <= 1, "within (0, 1]")
    return Settings(
        max_consecutive=check_length("max_consecutive", max_consecutive, 1),
        rollback_after=check_length("rollback_after", rollback_after, 1),
        give_up_after=check_length("give_up_after", give_up_after, 1),
        snapshot_every=check_length("snapshot_every", snapshot_every, 1),
        cool_down=cool_down,
        recovery=recovery,
        has_snapshots=bool(rollback),
    )
