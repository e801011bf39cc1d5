"""The frozen recipe of a study as options of train.py."""

from collections.abc import Iterable

from minialign.methods.registry import COMMON_OPTIONS, METHODS, SAMPLING_OPTIONS

# The study chooses these itself.
CHOSEN_BY_STUDY = {"method", "control", "seed"}
# Read only beside other options of the method, which no arm has: distillation samples with --on.
UNREAD_OPTIONS = {"distill": set(SAMPLING_OPTIONS)}
# What an option of an arm switches off: noise takes the place of the mask.
SWITCHED_OFF_BY = {"--by": {"rho"}}


def recipe_options(recipe: dict, method: str, arm_options: Iterable[str] = ()) -> list[str]:
    """Return the frozen recipe as options of train.py. A method's own values take precedence.

    The study itself chooses method, control and seed. What the method does not read is left out,
    because train.py refuses it, and so is what the arm's own options switch off.
    """
    settings = recipe | recipe["methods"].get(method, {})
    read_by_method = {*COMMON_OPTIONS, *METHODS[method].options} - CHOSEN_BY_STUDY
    read_by_method -= UNREAD_OPTIONS.get(method, set())
    for word in arm_options:
        read_by_method -= SWITCHED_OFF_BY.get(word, set())
    options = []
    for name, value in settings.items():
        if name not in read_by_method:
            continue
        options.append(f"--{name.replace('_', '-')}")
        if value is not True:
            options.append(str(value))
    return options
