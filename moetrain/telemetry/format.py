"""Numbers as people read them: three digits and a unit."""

import math

_LEVELS = "▁▂▃▄▅▆▇█"


def quantity(value: float) -> str:
    """950, 12.4k, 3.10M, 2.00G, 7.50T."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.95 of the smaller unit would print as 1000
        if abs(value) >= 0.9995 * limit:
            return _three_digits(value / limit) + suffix
    return f"{value:.0f}"


def size(num_bytes: float) -> str:
    """512 B, 13.2 MB, 1.31 GB (powers of 1000)."""
    text = quantity(num_bytes)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def duration(seconds: float) -> str:
    """0.34s, 9.7s, 12s, 2m41s, 3h05m, 2d04h; ? when unknown."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.2f}s" if seconds < 0.995 else f"{seconds:.1f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    if minutes:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{whole}s"


def share(fraction: float) -> str:
    """31.2 %; ? when unknown."""
    return f"{100 * fraction:.1f} %" if math.isfinite(fraction) else "?"


def sparkline(values: list[float], width: int) -> str:
    """The last `width` points as bar heights between their own least and greatest value; values that are not finite leave a gap."""
    shown = values[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(" " if not math.isfinite(value) else level((value - low) / span if span else 0.5) for value in shown)


def level(fraction: float) -> str:
    """One bar of eight heights for 0..1; outside values are clamped."""
    return _LEVELS[min(max(int(fraction * len(_LEVELS)), 0), len(_LEVELS) - 1)]


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    return f"{value:.2f}" if magnitude < 9.995 else f"{value:.1f}" if magnitude < 99.95 else f"{value:.0f}"
