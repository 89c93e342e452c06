"""Norms, clips and limits as their definitions say, one loop each.

Norms and clips are in NumPy's widest floats, limits in float64.
"""

import math

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


def clip_by_value(leaves: list, limit: float) -> list[np.ndarray]:
    return [np.clip(wide(x), -limit, limit) for x in leaves]


# The definitions as loops over the norms of one scope, each with the norm of all
# scopes together (`totals`); every norm is finite and not zero.


def zscore(norms, totals, max_zscore=2.5, decay=0.97, warmup=25):
    mean = std = math.nan
    num_outliers, found = 0, []
    for step, norm in enumerate(norms, 1):
        if step <= warmup:
            found.append(math.inf)
            mean, std = np.mean(norms[:step]), np.std(norms[:step])
            continue
        unit = std + 1e-6 * mean
        z = (norm - mean) / unit
        is_outlier = z > max_zscore
        limit = mean + max_zscore * (std * max_zscore / z if is_outlier else unit)
        x = limit if is_outlier and num_outliers + 1 < warmup else norm
        num_outliers = min(max(num_outliers + (1 if is_outlier else -1), 0), warmup)
        mean = decay * mean + (1 - decay) * x
        std = math.sqrt(decay * std**2 + (1 - decay) * (x - mean) ** 2)
        found.append(limit)
    return found


def percentile(norms, totals, percent=10, window=1024):
    steps = range(1, len(norms) + 1)
    return [np.percentile(norms[max(0, t - window) : t], percent) for t in steps]


def ema(norms, totals, multiple, decay=0.98, warmup=100, max_warmup_norm=math.inf):
    mean, found = math.inf, []
    for step, (norm, total) in enumerate(zip(norms, totals, strict=True), 1):
        if step < warmup:
            fits = total <= max_warmup_norm
            limit = math.inf if fits else norm * max_warmup_norm / total
            mean = min(mean, norm, limit)
        else:
            limit = multiple * mean
            mean = decay * mean + (1 - decay) * min(norm, limit)
        found.append(limit)
    return found


def window_sigma(norms, totals, sigmas=3, window=128):
    found = []
    for step in range(len(norms)):
        recent = norms[max(0, step - window) : step]
        if len(recent) < max(2, window // 2):
            found.append(math.inf)
        else:
            mean, std = np.mean(recent), np.std(recent)
            found.append(mean + sigmas * max(std, 0.01 * mean))
    return found


def quantile(norms, totals, target=0.5, initial_norm=0.1, rate=0.2):
    limit, found = initial_norm, []
    for norm in norms:
        found.append(limit)
        limit *= math.exp(-rate * ((norm <= limit) - target))
    return found


def log_quantile(norms, totals, power=3, min_ratio=3, max_jump=5, window=128):
    logs, found = np.log(norms), []
    for step in range(len(norms)):
        recent = logs[max(0, step - window) : step]
        if not len(recent):
            found.append(math.inf)
            continue
        limit = np.max(recent[-(window // 4) :]) + math.log(max_jump)
        if len(recent) >= window // 2:
            median, high = np.percentile(recent, [50, 95])
            rise = max(power * (high - median), math.log(min_ratio))
            limit = min(limit, median + rise)
        found.append(math.exp(limit))
    return found


def sustained_rise(norms, totals, max_ratio=5, window=64, patience=3):
    mean = change = num_above = 0
    logs, found = np.log(norms), []
    for step, log in enumerate(logs):
        limit = mean + max(2.5 * change, math.log(max_ratio)) if step else math.inf
        num_above = num_above + 1 if log > limit else 0
        found.append(math.exp(limit) if num_above >= patience else math.inf)
        mean += (log - mean) / min(step + 1, window)
        if step:
            change += (abs(log - logs[step - 1]) - change) / min(step, window)
    return found


def above_lowest(norms, totals, max_ratio=8, min_level=0.01, window=8):
    mean, lowest, num_above, found = 0, math.inf, 0, []
    for step, norm in enumerate(norms):
        limit = max_ratio * max(lowest, min_level)
        num_above = num_above + 1 if norm > limit else 0
        mean += (norm - mean) / min(step + 1, window)
        is_lasting = num_above >= window
        found.append(limit if is_lasting else math.inf)
        lowest = mean if is_lasting else min(lowest, mean)
        num_above = 0 if is_lasting else num_above
    return found


def fraction_of_start(norms, totals, fraction=1e-3, num_steps=8):
    logs = np.log(norms)
    return [
        fraction * math.exp(np.mean(logs[: min(step, num_steps)])) if step else 0
        for step in range(len(norms))
    ]


def mean_over_rms(norms, totals, decay=0.6, squares_decay=0.999):
    mean = square = 0
    found = []
    for n, norm in enumerate(norms, start=1):
        mean = decay * mean + (1 - decay) * norm
        square = squares_decay * square + (1 - squares_decay) * norm**2
        corrected = square / (1 - squares_decay**n)
        found.append(mean / (1 - decay**n) / math.sqrt(corrected))
    return found
