"""Read the fields of a config.json one by one, each checked for its type and its bounds."""

from dataclasses import dataclass
from pathlib import Path

from minialign.utils.files import check

# No real size comes near it. Sizes are compared with the weights when these are opened.
LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class ConfigSection:
    """The fields of a config.json, or of an object in it.

    Every method raises InputError with the file, the field and its value.
    """

    path: Path | str
    name: str  # such as "text_config", empty for the file itself
    values: dict

    def label(self, key) -> str:
        """Return how a message names a field: by its file and its section."""
        if self.name:
            return f"{self.path}: {key} in {self.name}"
        return f"{self.path}: {key}"

    def get(self, key):
        """Return a field as it is, or None if it is absent."""
        return self.values.get(key)

    def size(self, key) -> int:
        """Return a field that is a whole number above 0."""
        value = self.get(key)
        # type() rather than isinstance(): to Python, True is an integer too.
        is_size = type(value) is int and 0 < value <= LARGEST_SIZE
        check(
            is_size,
            f"{self.label(key)} is {value!r:.40}, not a whole number from 1 to {LARGEST_SIZE}",
        )
        return value

    def number(self, key, lowest, highest) -> float:
        """Return a field that is a number from `lowest` to `highest`."""
        value = self.get(key)
        # NaN is in no interval. The bounds come before float(), which fails for a huge int.
        is_number = type(value) in (int, float) and lowest <= value <= highest
        check(
            is_number,
            f"{self.label(key)} is {value!r:.40}, not a number from {lowest:g} to {highest:g}",
        )
        return float(value)

    def flag(self, key) -> bool:
        """Return a field that is true or false. Null and an absent field are false."""
        value = self.get(key)
        check(
            value is None or isinstance(value, bool),
            f"{self.label(key)} is {value!r:.40}, not true or false",
        )
        return bool(value)

    def choice(self, key, supported) -> str:
        """Return a field that is one of the supported names."""
        value = self.get(key)
        # A list or an object cannot be looked up in a dict, so the type is checked first.
        is_supported = isinstance(value, str) and value in supported
        check(
            is_supported,
            f"{self.label(key)} {value!r:.60} is not supported; supported: {', '.join(supported)}",
        )
        return value

    def section(self, key) -> dict:
        """Return a field that is an object. Null and an absent field are an empty one."""
        value = self.get(key)
        if value is None:
            return {}
        check(
            isinstance(value, dict),
            f"{self.label(key)} is {value!r:.40}, not a JSON object",
        )
        return value
