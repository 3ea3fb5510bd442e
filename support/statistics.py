"""Estimates over problems with their errors: clustered standard errors, paired bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Estimate:
    """A mean or ratio over problems: offset + scale * sum_p top_p / sum_p bottom_p; a plain mean has bottom 1."""

    top: np.ndarray  # [P]
    bottom: np.ndarray  # [P]
    offset: float = 0.0
    scale: float = 1.0

    @property
    def value(self) -> float:
        return self.offset + self.scale * float(self.top.sum() / self.bottom.sum())

    @property
    def error(self) -> float | None:
        """Standard error, clustered by problem: a problem's samples stand or fall together. None for one problem."""
        problems = len(self.top)
        if problems < 2:
            return None
        residual = self.top - self.bottom * self.top.sum() / self.bottom.sum()
        spread = np.sqrt((residual**2).sum() * problems / (problems - 1)) / self.bottom.sum()
        return abs(self.scale) * float(spread)


def average(estimates: Sequence[Estimate]) -> tuple[float, float | None]:
    """The mean over problem sets, each counting the same, and its standard error; None where one set has none."""
    errors = [estimate.error for estimate in estimates]
    value = sum(estimate.value for estimate in estimates) / len(estimates)
    return value, None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)


def difference(ones: Sequence[Estimate], others: Sequence[Estimate], *, resamples: int = 2000,
               seed: int = 0) -> tuple[float, float, float]:
    """others - ones, each pair on the same problems, as the mean over pairs (problem sets), and its 95 % interval:
    problems are resampled within their set, with both models' samples."""
    rng, gaps = np.random.default_rng(seed), np.zeros(resamples)
    for one, other in zip(ones, others, strict=True):
        draws = rng.integers(len(one.top), size=(resamples, len(one.top)))
        for estimate, sign in ((other, 1), (one, -1)):
            top, bottom = (values[draws].sum(axis=1) for values in (estimate.top, estimate.bottom))
            gaps += sign * (estimate.offset + estimate.scale * top / bottom) / len(ones)
    low, high = np.quantile(gaps, [0.025, 0.975])
    value = sum(other.value - one.value for one, other in zip(ones, others)) / len(ones)
    return value, float(low), float(high)
