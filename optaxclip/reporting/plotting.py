"""A picture of the last steps of a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from optaxclip.reporting.drawing import (
    MAX_NAMED,
    NUM_COLORED,
    add_legend,
    draw_loss,
    draw_map,
    draw_norm,
    draw_scopes,
    draw_tag,
)
from optaxclip.reporting.growth import leading_at
from optaxclip.reporting.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure


TAG = "tag/"  # before the names of tags, which may be those of other panels


def plot(
    history: History,
    path: str | os.PathLike[str] | None = None,
    *,
    after: History | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Draws the last steps of a run: the loss, the norms, what exploded and where.

    The total norm with its limit and the steps that exploded; with several scopes the
    norm of each, the leading one thick; with more than seven also a map of all; and
    each number that was given as `tag=`. A non-finite value is a triangle at the
    upper edge. Needs matplotlib.

    Args:
      history: As `history` reads it, at least one step.
      path: Where to save the picture, `.png`, `.pdf` or `.svg`; None for nowhere.
      after: That of a recorder behind a clip: its norm is drawn too, and the steps on
        which it is smaller are marked as clipped.
      figure: A matplotlib `Figure` to draw into, in place of what it shows, such as
        that of an earlier call; it keeps its size. None for a new one.

    Returns:
      The figure. A new one is not registered with pyplot.

    Raises:
      ValueError: If the history is empty, or `after` holds other steps; `figure` then
        stays as it was.
      ImportError: If matplotlib is missing.

    Example:
      >>> import jax.numpy as jnp, optaxclip
      >>> recorder = optaxclip.record()
      >>> grads = {"b": jnp.array([4.0]), "w": jnp.array([3.0])}
      >>> state = recorder.init(grads)
      >>> _, state = recorder.update(grads, state, value=jnp.array(0.5))
      >>> figure = optaxclip.plot(optaxclip.history(state, grads))
      >>> print([axes.get_label() for axes in figure.axes])
      ['loss', 'norm', 'scopes']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'optaxclip.plot needs matplotlib: pip install "optaxclip[report]"'
        ) from error
    for drawn in (history,) if after is None else (history, after):
        if not isinstance(drawn, History):
            raise TypeError(
                "plot draws a History: plot(optaxclip.history(opt_state, params)), not "
                f"of a {type(drawn).__name__}"
            )
    if path is not None and not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the name of a file, not {path!r}")
    if figure is not None and not isinstance(figure, Figure):
        raise TypeError(f"figure must be a Figure of matplotlib, not {figure!r}")
    if not len(history.step):
        raise ValueError("history holds no steps")
    if after is not None and not np.array_equal(after.step, history.step):
        raise ValueError("after= holds other steps than history")
    leader = leading(history)
    heights = _heights(history)
    if figure is None:
        figure = Figure(figsize=(11, 0.6 + sum(heights.values())))
    # What it shows goes: axes of an earlier call may lack a panel that is due by now.
    figure.clear()
    figure.set_layout_engine("constrained")
    panels = figure.subplot_mosaic(
        [[name] for name in heights], height_ratios=list(heights.values()), sharex=True
    )
    if "loss" in panels:
        draw_loss(panels["loss"], history)
    draw_norm(panels["norm"], history, after)
    if "scopes" in panels:
        draw_scopes(panels["scopes"], history, leader)
    for name in history.tags:
        draw_tag(panels[f"{TAG}{name}"], history, name)
    for axes in panels.values():
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        add_legend(axes, loc="upper left")
    if "map" in panels:
        draw_map(panels["map"], history, leader)
    lowest = panels[list(heights)[-1]]
    lowest.set_xlabel("step")
    lowest.set_xlim(history.step[0] - 0.5, history.step[-1] + 0.5)
    lowest.locator_params("x", integer=True, min_n_ticks=1)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _heights(history: History) -> dict[str, float]:
    """The panels from top to bottom, with their heights in inches."""
    num_scopes = len(history.names)
    heights = {"norm": 2.4}
    if not np.isnan(history.loss).all():
        heights = {"loss": 1.8} | heights
    if num_scopes > 1:
        heights["scopes"] = 2.8
    heights |= {f"{TAG}{name}": 1.2 for name in history.tags}
    # Ranks are in order: a map of them shows nothing more.
    if num_scopes > NUM_COLORED and history.ranked is None:
        heights["map"] = 4.6 if num_scopes > MAX_NAMED else 1.2 + 0.14 * num_scopes
    return heights


def leading(history: History) -> int | None:
    """The scope that led on the first step of the last explosion; None for none."""
    first = history.began
    if first is None or history.ranked is not None:  # the ranks are not one scope each
        return None
    leaf = leading_at(history, first)
    return leaf if leaf >= 0 else None
