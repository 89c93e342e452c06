"""The curves of a run: events and a progress bar as it goes, and a picture.

Every example records through `Recorder`. Names decide the groups in TensorBoard's page:

    loss, accuracy
    norm/before, norm/after                   the whole gradient's, around the clip
    norm_before/<leaf>, norm_after/<leaf>     each parameter's

and, if asked for, one histogram of all leaves on either side of the clip:

    log10_leaf_norms/before, log10_leaf_norms/after
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from tqdm import tqdm

import optaxclip

# Okabe and Ito's colors, which the color-blind can tell apart; no yellow, on white.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")


class Recorder:
    """Writes to TensorBoard, shows the progress, and remembers all scalars.

    Attributes:
        history: All that was added, `{name: {step: value}}`.
        picture: The file that `draw` writes.
    """

    def __init__(self, logdir: Path, *, num_steps: int, histograms: bool = False):
        self.history: dict[str, dict[int, float]] = {}
        self.picture = logdir / "curves.png"
        self.histograms = histograms
        self.writer = SummaryWriter(str(logdir))
        self.bar = tqdm(total=num_steps, unit="step")

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.writer.close()

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Adds one scalar to each curve that `values` names."""
        for name, value in values.items():
            self.history.setdefault(name, {})[step] = float(value)
            self.writer.add_scalar(name, float(value), step)

    def add_steps(
        self, num_steps: int, before: optaxclip.History, after: optaxclip.History
    ) -> None:
        """Adds the newest steps of two recorders, around the clip.

        Args:
            num_steps: How many of them.
            before: What `optaxclip.history` gives before the clip.
            after: The same after it.
        """
        for i in range(-num_steps, 0):
            values = {"loss": before.loss[i]}
            for when, kept in (("before", before), ("after", after)):
                values[f"norm/{when}"] = kept.norm[i]
                for name, norm in zip(kept.names, kept.norms[i], strict=True):
                    values[f"norm_{when}/{name}"] = norm
            self.add(int(before.step[i]) + 1, values)
        if self.histograms:
            self.add_histograms(num_steps, before, after)
        self.bar.update(num_steps)
        shown = [n for n in ("loss", "norm/before", "accuracy") if n in self.history]
        self.bar.set_postfix({name: self.last(name) for name in shown})

    def add_histograms(
        self, num_steps: int, before: optaxclip.History, after: optaxclip.History
    ) -> None:
        """Adds one histogram of the norms of all leaves in the newest steps."""
        for when, kept in (("before", before), ("after", after)):
            norms = kept.norms[-num_steps:]
            # A logarithm, as norms are decades apart; none of zero, inf and NaN.
            shown = np.log10(norms[(norms > 0) & (norms < np.inf)])
            if shown.size:
                name, step = f"log10_leaf_norms/{when}", int(kept.step[-1]) + 1
                self.writer.add_histogram(name, shown, step, bins="auto")

    def last(self, name: str) -> float:
        """Returns the newest value of a curve."""
        return next(reversed(self.history[name].values()))

    def mean_ratio(self, name: str, base: str) -> float:
        """Returns the mean of one curve divided by another, where 0/0 is 1."""
        pairs = zip(
            self.history[name].values(), self.history[base].values(), strict=True
        )
        return statistics.fmean(x / y if y else 1 for x, y in pairs)

    def draw(
        self, title: str, *, limit: float | None = None, per: str = "tree"
    ) -> None:
        """Draws the loss, the accuracy and all norms over time into `picture`.

        Args:
            title: Stands above all panels.
            limit: The limit of the norm, a dashed line, if there is one.
            per: What the limit is for, the whole "tree" or each "leaf".
        """
        figure = Figure(figsize=(11, 9), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left")
        axes = figure.subplot_mosaic("LA;NN;BC")
        axes["C"].sharey(axes["B"])
        num_steps = len(self.history["loss"])
        block = -(-num_steps // 200)

        def plot(panel: str, name: str, *, mean_of: int = 1, **style: Any) -> None:
            steps, values = np.array(list(self.history[name].items())).T
            blocks = range(0, len(steps), mean_of)
            xs = [steps[i : i + mean_of].mean() for i in blocks]
            ys = [values[i : i + mean_of].mean() for i in blocks]
            axes[panel].plot(xs, ys, **style)

        plot("L", "loss", color=COLORS[0], linewidth=0.6, alpha=0.35)
        plot("L", "loss", color=COLORS[0], mean_of=block)
        plot("A", "accuracy", color=COLORS[0], marker=".")
        for panel, when, color in (("B", "before", 1), ("C", "after", 0)):
            label = f"{when} the clip"
            plot("N", f"norm/{when}", color=COLORS[color], linewidth=0.9, label=label)
            leaves = [name for name in self.history if name.startswith(f"norm_{when}/")]
            for i, name in enumerate(leaves):
                line, color = divmod(i, len(COLORS))
                plot(
                    panel,
                    name,
                    mean_of=block,
                    color=COLORS[color],
                    linestyle=("-", "--", ":")[line % 3],
                    linewidth=1.3,
                    label=name.removeprefix(f"norm_{when}/"),
                )
        if limit is not None:
            for panel in "BC" if per == "leaf" else "N":
                axes[panel].axhline(limit, color="black", linestyle="--", label="limit")

        mean = f", mean of {block} steps" if block > 1 else ""
        for panel, name in {
            "L": f"training loss{mean}",
            "A": "test accuracy",
            "N": "norm of the gradient",
            "B": f"norm of each leaf before the clip{mean}",
            "C": f"norm of each leaf after the clip{mean}",
        }.items():
            axes[panel].set_title(name, loc="left", fontsize="medium")
            axes[panel].set_xlabel("step")
            axes[panel].set_xlim(0, num_steps + 1)
            axes[panel].set_yscale("linear" if panel == "A" else "log")
            axes[panel].grid(alpha=0.3)
            axes[panel].spines[["top", "right"]].set_visible(False)
        axes["N"].legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False
        )
        handles, labels = axes["B"].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, frameon=False
        )
        figure.savefig(self.picture, dpi=100)
