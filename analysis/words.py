"""Uniform formatting of numbers in text."""

import math

MINUS = "\N{MINUS SIGN}"


def signed(value: float, digits: int = 2) -> str:
    """Format a difference with an explicit sign and a typographic minus."""
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "+∞" if value > 0 else f"{MINUS}∞"
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS)


def p_value(p: float) -> str:
    """Format a p-value to two significant digits, never rounding it across 0.05."""
    if p < 0.001:
        return "< 0.001"
    text = f"{p:.2g}"
    return f"{p:.3f}" if (float(text) < 0.05) != (p < 0.05) else text


def duration(seconds: float) -> str:
    """Format a duration: "12 s", "3 min 05 s" or "2 h 07 min"."""
    if not math.isfinite(seconds):
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(number: int, word: str) -> str:
    """Format a number with its noun: 1 seed, 8 seeds."""
    return f"{number} {word}{'' if number == 1 else 's'}"
