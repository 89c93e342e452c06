"""The panels of a picture: loss, norm, scopes, and the map of all. Internal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from optaxclip.explosions.rules import RULES
from optaxclip.reporting.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Okabe and Ito's colors, which the color-blind can tell apart; no yellow, on white.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#999999")
ALARM = "#d55e00"  # for nothing but what explodes
ZERO = "#ffffff"


# With so many scopes at most, each has a color; with more there is a map of all.
NUM_COLORED = len(COLORS)
# Up to MAX_NAMED scopes, the map names each, in rows of 0.14 inches, which names of 7
# points (0.1 inches) fit: with 40 it is 6.8 inches high. With more, it names NUM_NAMED.
MAX_NAMED, NUM_NAMED = 40, 20
# In characters, of which one of 7 points takes about 0.06 inches: 2 inches in all.
MAX_NAME_LENGTH = 32


def _positive(values: np.ndarray) -> np.ndarray:
    """What a logarithmic axis can show, in float64; NaN for the rest."""
    return np.where((values > 0) & (values < np.inf), values.astype(np.float64), np.nan)


def draw_loss(axes: Axes, history: History) -> None:
    """The loss, with a mark where it is non-finite or exceeds its limit."""
    loss = history.loss.astype(np.float64)
    is_finite = np.isfinite(loss)
    is_positive = is_finite.any() and (loss[is_finite] > 0).all()
    axes.set_title("loss", loc="left", fontsize="medium")
    axes.set_yscale("log" if is_positive else "linear")
    loss[~is_finite] = np.nan
    _draw_line(axes, history.step, loss, color=COLORS[0])
    limit = np.where(np.isfinite(history.loss_limit), history.loss_limit, np.nan)
    _draw_limit(axes, history.step, limit)
    exceeds = history.fired[:, RULES.index("loss")]
    _mark(axes, history.step, loss, exceeds, "o", "above its limit")
    # NaN alone may say that no loss was given.
    is_nonfinite = np.isinf(history.loss) | (history.fired[:, 0] & ~is_finite)
    _mark_above(axes, history.step[is_nonfinite], "not finite")


def draw_norm(axes: Axes, history: History, after: History | None) -> None:
    """The norm of all updates and its limit, with the steps that exploded."""
    norm = _positive(history.norm)
    nonfinite, exceeds, share, loss = history.fired.T
    axes.set_title("norm of all updates", loc="left", fontsize="medium")
    axes.set_yscale("log")
    _draw_line(axes, history.step, norm, color=COLORS[0])
    if after is not None:
        lower = _positive(after.norm)
        _draw_line(axes, history.step, lower, label="after the clip", color=COLORS[1])
        clipped = history.step[lower < norm * (1 - 1e-6)]  # more than a rounding
        style = {"color": COLORS[1], "transform": axes.get_xaxis_transform()}
        axes.plot(clipped, np.zeros(clipped.size), "|", label="clipped", **style)
    _draw_limit(axes, history.step, _positive(history.limit))
    _mark(axes, history.step, norm, exceeds, "o", "above its limit")
    others = (share | loss) & ~exceeds
    _mark(axes, history.step, norm, others, "D", "share or loss above its limit")
    is_nonfinite = nonfinite | ~np.isfinite(history.norm)
    _mark_above(axes, history.step[is_nonfinite], "not finite")


def _draw_limit(axes: Axes, step: np.ndarray, limit: np.ndarray) -> None:
    if not np.isnan(limit).all():
        _draw_line(axes, step, limit, label="its limit", color="black", linestyle="--")


def draw_tag(axes: Axes, history: History, name: str) -> None:
    """A number of the user's own."""
    values = history.tags[name]
    is_finite = np.isfinite(values)
    shown = np.where(is_finite, values, np.nan)
    # The number of a batch is read off; a learning rate or a logit has a size.
    is_size = (shown[is_finite] > 0).all() and (shown[is_finite] % 1).any()
    axes.set_title(name, loc="left", fontsize="medium")
    if is_size:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    _draw_line(axes, history.step, shown, color=COLORS[0])
    _mark_above(axes, history.step[~is_finite], "not finite")


def draw_scopes(axes: Axes, history: History, leader: int | None) -> None:
    """The norm of each scope, the leading one highlighted."""
    norms = _positive(history.norms)
    num_scopes = len(history.names)
    title = f"norms of the {num_scopes} scopes"
    if history.ranked is not None:
        title = f"the {num_scopes - 1} largest norms, and that of the rest"
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_yscale("log")
    others = [i for i in range(num_scopes) if i != leader]
    style: dict[str, Any]
    for k, i in enumerate(others):
        style = {"color": COLORS[-1], "linewidth": 0.5, "rasterized": True}
        if num_scopes <= NUM_COLORED:
            name = _shown(history.names[i])
            label = name if history.norms[:, i].any() else f"{name} (zero)"
            style = {"color": COLORS[k], "label": label}
        _draw_line(axes, history.step, norms[:, i], **style)
    if leader is not None:
        label = f"{_shown(history.names[leader])} led"
        style = {"color": ALARM, "linewidth": 2.5, "zorder": 3, "label": label}
        _draw_line(axes, history.step, norms[:, leader], **style)
        is_nonfinite = ~np.isfinite(history.norms[:, leader])
        _mark_above(axes, history.step[is_nonfinite], "it is non-finite")


def draw_map(axes: Axes, history: History, leader: int | None) -> None:
    """A map of all scopes, each in units of its own median."""
    norms = _positive(history.norms)
    # In units of its own median: large and small scopes would else be mere stripes.
    norms /= [np.median(x[x > 0]) if (x > 0).any() else 1 for x in norms.T]
    is_known = ~np.isnan(norms)
    # A few extremes, such as an explosion to 1e30, shall not take all the colors.
    low, high = (
        np.quantile(norms[is_known], [0.01, 0.99]) if is_known.any() else (1.0, 1.0)
    )
    shown = np.clip(norms, low, high)
    shown[history.norms == 0] = low / 10
    mesh = axes.pcolormesh(
        np.append(history.step, history.step[-1] + 1) - 0.5,
        np.arange(len(history.names) + 1) - 0.5,
        shown.T,
        norm="log",
        vmin=low,
        vmax=high,
        cmap="cividis",
        rasterized=True,
    )
    mesh.cmap = mesh.cmap.with_extremes(under=ZERO, bad=ALARM)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_title("norm of each scope / its median", loc="left", fontsize="medium")
    _name_rows(axes, history.names, leader)
    for is_found, color, label in (
        (history.norms == 0, ZERO, "zero"),
        (~np.isfinite(history.norms), ALARM, "not finite"),
    ):
        if is_found.any():
            axes.plot([], [], "s", color=color, markeredgecolor="black", label=label)
    add_legend(axes, loc="lower right", ncols=2)
    bar = axes.figure.colorbar(
        mesh,
        ax=axes,
        location="bottom",
        pad=0.01,
        shrink=0.5,
        aspect=40,
        label="norm / its median, 1st to 99th percentile of all",
        ticks=np.unique(np.geomspace(low, high, 5)),
        format="%.2g",
    )
    bar.minorticks_off()


def _name_rows(axes: Axes, names: list[str], leader: int | None) -> None:
    """Names all rows of the map, or some that leave each other room."""
    num_shown = len(names) if len(names) <= MAX_NAMED else NUM_NAMED
    rows = np.linspace(0, len(names) - 1, num_shown).round().astype(int)
    if leader is not None and leader not in rows:
        rows = rows[np.abs(rows - leader) > 0.6 * len(names) / num_shown]
        rows = np.append(rows, leader)
    axes.yaxis.tick_right()
    axes.set_yticks(rows, [_shown(names[i]) for i in rows], fontsize=7)
    for row, label in zip(rows, axes.get_yticklabels(), strict=True):
        if row == leader:
            label.set(color=ALARM, fontweight="bold")


def _draw_line(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    *,
    linewidth: float = 1.2,
    **style: Any,
) -> None:
    """A line with gaps where values are NaN, and a dot between two gaps."""
    axes.plot(steps, values, linewidth=linewidth, **style)
    is_gap = np.isnan(np.pad(values, 1, constant_values=np.nan))
    is_alone = is_gap[:-2] & is_gap[2:] & ~is_gap[1:-1]
    if is_alone.any():
        axes.plot(steps[is_alone], values[is_alone], ".", color=style["color"])


def _mark(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    is_marked: np.ndarray,
    marker: str,
    label: str,
) -> None:
    """Marks points of a line."""
    if is_marked.any():
        axes.plot(
            steps[is_marked],
            values[is_marked],
            marker,
            markersize=5,
            markerfacecolor="none",
            color=ALARM,
            label=label,
        )


def _mark_above(axes: Axes, steps: np.ndarray, label: str) -> None:
    """Marks steps at the upper edge, whatever the scale."""
    if steps.size:
        axes.plot(
            steps,
            np.ones(steps.size),
            "^",
            markersize=5,
            color=ALARM,
            label=label,
            transform=axes.get_xaxis_transform(),
            clip_on=False,
        )


def add_legend(axes: Axes, **place: Any) -> None:
    """A legend at the upper right corner of the axes, outside: it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(bbox_to_anchor=(1, 1), frameon=False, borderaxespad=0.3, **place)


def _shown(name: str) -> str:
    """A name as matplotlib shows it, short enough to stand beside the axes."""
    if len(name) > MAX_NAME_LENGTH:
        half = MAX_NAME_LENGTH // 2
        name = f"{name[:half]}…{name[1 - half :]}"
    name = name.replace("$", r"\$")  # else a formula
    return f" {name}" if name.startswith("_") else name  # else not in the legend
