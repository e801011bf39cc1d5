"""Shares of a whole, and how they are shown. A share of nothing is no value."""

NO_VALUE = "-"  # what a table shows for None


def share(count: float, total: float) -> float | None:
    """Return count / total, or None if the total is 0."""
    if total == 0:
        return None
    return count / total


def scaled_text(value: float | None, factor: float = 100) -> str:
    """Return a value times a factor with one decimal, by default in percent. None is a dash."""
    if value is None:
        return NO_VALUE
    return f"{factor * value:z.1f}"  # z: what rounds to zero has no sign
