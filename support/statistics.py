"""Estimates over problems with their errors: clustered standard errors, paired bootstrap, Student's t, Holm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

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


@cache
def t_mass(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """u and P(|T| <= sqrt(freedom) tan u) for Student's t: its density in u is cos(u)^(freedom - 1)."""
    u = np.linspace(0, np.pi / 2, 50_001)
    mass = np.cos(u) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((mass[1:] + mass[:-1]) / 2)])  # trapezoids
    return u, mass / mass[-1]


def t_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t, level >= 1/2."""
    u, mass = t_mass(freedom)
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * level - 1, mass, u)))


def t_test(values) -> float:
    """Two-sided p-value of Student's test that the mean of the values is 0; nan for fewer than two, or all equal."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2 or np.ptp(values) == 0:
        return math.nan
    t = abs(values.mean()) / (values.std(ddof=1) / math.sqrt(len(values)))
    u, mass = t_mass(len(values) - 1)
    return float(1 - np.interp(np.arctan(t / math.sqrt(len(values) - 1)), u, mass))


def mean_interval(values) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t; nan for one value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    half = t_quantile(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(half)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the i-th smallest times those not smaller. nan stays nan."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = list(p_values), 0.0
    for place, (p, i) in enumerate(known):
        highest = corrected[i] = max(highest, min(1.0, p * (len(known) - place)))
    return corrected
