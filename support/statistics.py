"""Estimates over problems with their errors: clustered standard errors, paired bootstrap, Student's t."""

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


def difference(one: Estimate, other: Estimate, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """other - one on the same problems, and its 95 % interval: problems are resampled, with both models' samples."""
    draws = np.random.default_rng(seed).integers(len(one.top), size=(resamples, len(one.top)))

    def values(estimate):
        top, bottom = (values[draws].sum(axis=1) for values in (estimate.top, estimate.bottom))
        return estimate.offset + estimate.scale * top / bottom

    low, high = np.quantile(values(other) - values(one), [0.025, 0.975])
    return other.value - one.value, float(low), float(high)


def t_quantile(level: float, freedom: int) -> float:
    """Quantile of Student's t, level >= 1/2: with t = sqrt(freedom) tan(u) its density is cos(u)^(freedom - 1)."""
    u = np.linspace(0, np.pi / 2, 50_001)
    mass = np.cos(u) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((mass[1:] + mass[:-1]) / 2)])  # trapezoids
    return float(np.sqrt(freedom) * np.tan(np.interp(2 * level - 1, mass / mass[-1], u)))
