"""Write numbers as the page shows them: counts, shares, changes and durations."""

import sys


def is_number(value) -> bool:
    """Return whether a value of JSON is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "1,200 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def number_text(value: float) -> str:
    """Return a number with four digits at most, without an exponent if it is not tiny or huge."""
    return with_minus(f"{value:.4g}".replace("e-0", "e-"))


def signed(value: float) -> str:
    """Return a number with its sign and one decimal. Only 0 has no sign."""
    rounded = round(value, 1)
    return "0.0" if rounded == 0 else with_minus(f"{rounded:+.1f}")


def with_minus(text: str) -> str:
    """Return a text with minus signs, which are as wide as a plus, in place of hyphens."""
    return text.replace("-", "−")


def percent(value: float) -> str:
    """Return a share in percent. The space before the sign breaks no line."""
    return f"{value:.1f}\u00a0%"


def duration_text(seconds: float) -> str:
    """Return a duration in words, such as "2 min 5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
