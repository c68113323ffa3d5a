"""The gradient noise scale, from the norms of a gradient as it accumulates.

Of n micro-batches of b samples whose loss is a mean, the sum of k gradients has
E |g_1 + ... + g_k|² = k² |G|² + k tr(Σ) / b, with G the mean gradient and Σ the covariance of one
sample's. Two or more k within a step tell the two terms apart, and each step is an independent
estimate (McCandlish et al. 2018, appendix A, has k = 1 and k = n).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class NoiseScale(NamedTuple):
    r"""The gradient noise scale: the batch size at which noise and gradient are of equal size.

    Attributes:
        samples: $\operatorname{tr}(\Sigma) / \lVert G \rVert^2$ in samples, with $\Sigma$ the
            covariance of one sample's gradient and $G$ their mean; infinite where the gradient
            cannot be told from noise.
        low: Lower end of the 95 % interval.
        high: Upper end.
        steps: How many steps it was estimated from.
    """

    samples: float
    low: float
    high: float
    steps: int

    def __str__(self) -> str:
        return (
            f"noise scale {self.samples:.3g} samples [{self.low:.3g}, {self.high:.3g}] "
            f"from {self.steps} steps"
        )


def estimate(records: np.ndarray, micro_batch: int) -> NoiseScale:
    """Fit the two terms to records [n, 4]: step, k, variance of the sum in units of one, |sum|².

    The estimate of the noise is far from zero, that of the signal may not be. So the interval is
    computed for signal / noise (normal approximation) and inverted. Where no noise is found, it is
    computed for noise / signal.

    Raises:
        ValueError: if fewer than two steps tell the terms apart.
    """
    signal, noise = [], []
    for step in np.unique(records[:, 0]):
        _, k, variance, square = records[records[:, 0] == step].T
        design = np.stack([k**2 / variance, np.ones_like(k)], axis=1)
        if np.linalg.matrix_rank(design) == 2 and np.isfinite(square).all():
            fit = np.linalg.lstsq(design, square / variance, rcond=None)[0]
            signal.append(fit[0])
            noise.append(fit[1])
    n = len(signal)
    if n < 2:
        raise ValueError(
            "noise_scale: expected two steps or more with two micro-batches or more each, got "
            f"{n} such steps; accumulate over micro-batches and watch with noise=True"
        )
    if np.mean(noise) > 0:
        ratio, error = _ratio(signal, noise)
        bounds = (ratio, ratio + 1.96 * error, ratio - 1.96 * error)
        samples, low, high = (math.inf if x <= 0 else micro_batch / x for x in bounds)
    else:
        ratio, error = _ratio(noise, signal)
        bounds = (ratio, ratio - 1.96 * error, ratio + 1.96 * error)
        samples, low, high = (max(0.0, micro_batch * x) for x in bounds)
    return NoiseScale(samples, low, high, n)


def _ratio(a: list[float], b: list[float]) -> tuple[float, float]:
    """The ratio of two means and its standard error (delta method)."""
    ratio = np.mean(a) / np.mean(b)
    error = np.std(np.subtract(a, ratio * np.array(b)), ddof=1) / np.mean(b) / len(a) ** 0.5
    return float(ratio), float(error)
