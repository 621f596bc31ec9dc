"""Means over runs that differ by their seed."""

import statistics

# 97.5 % quantiles of Student's t by degrees of freedom, one less than seeds.
T_QUANTILES = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622}


def interval(values: list[float]) -> dict[str, float]:
    """Mean and 95 % interval by Student's t, of two values or more."""
    mean = statistics.mean(values)
    half = T_QUANTILES[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def check_seeds(seeds: list[int]) -> None:
    """Raises ValueError where there is no interval."""
    if len(set(seeds)) - 1 not in T_QUANTILES:
        raise ValueError(f"an interval takes 2 to {max(T_QUANTILES) + 1} different seeds")
