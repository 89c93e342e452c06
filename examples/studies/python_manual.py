"""The task of `compare_limits.py` and `muon.py`: to continue Python's manual.

The texts are the help texts that Python ships; a model says at every place of a text
which character comes next.
"""

from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


def load_texts(shape: tuple[int, ...], length: int) -> tuple[np.ndarray, int, float]:
    """Cuts texts out of the manual.

    Returns:
        texts: Characters as int32, `[*shape, length + 1]`.
        num_chars: How many different characters there are.
        chance: The loss of knowing each character's frequency alone: a run that ends
            above it has diverged.
    """
    # Topics that are filed under several words have equal texts.
    manual = "\n".join(dict.fromkeys(topics.values()))
    _, text, counts = np.unique(list(manual), return_inverse=True, return_counts=True)
    starts = np.random.default_rng(0).integers(len(text) - length, size=(*shape, 1))
    texts = text[starts + np.arange(length + 1)].astype(np.int32)
    chance = float(np.mean(np.log(len(text) / counts[text])))
    return texts, len(counts), chance


def stack_models(models: Sequence[nnx.Module]) -> tuple[Any, Any]:
    """Returns the graph of the models, and their parameters `[len(models), ...]`."""
    graphdefs, states = zip(*map(nnx.split, models), strict=True)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return graphdefs[0], params


def mean_loss(graphdef: Any, params: Any, texts: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of each next character, `[batch, length + 1]`."""
    logits = nnx.merge(graphdef, params)(texts[:, :-1])
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    return cross_entropy(logits, texts[:, 1:]).mean()


def final_losses(losses: np.ndarray) -> np.ndarray:
    """Returns the means of the last 5 % of the steps, from `[steps, ...]` to `[...]`.

    A mean that is non-finite is +inf.
    """
    num_last = max(1, len(losses) // 20)
    means = losses[-num_last:].mean(axis=0, dtype=float)
    return np.where(np.isfinite(means), means, np.inf)


def spikes(losses: np.ndarray, *, factor: float = 1.2, window: int = 50) -> np.ndarray:
    """Counts the steps whose loss exceeds `factor` times the median of those before.

    The median is of the `window` steps before, or of as many as there are; a loss that
    is non-finite is +inf. From `[steps, seeds]` to `[seeds]`.
    """
    losses = np.where(np.isfinite(losses), losses.astype(float), np.inf)
    before = (losses[max(0, i - window) : i or 1] for i in range(len(losses)))
    medians = np.array([np.median(values, axis=0) for values in before])
    return np.sum(losses > factor * medians, axis=0)
