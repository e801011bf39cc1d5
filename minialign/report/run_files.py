"""Read what a run has left in its folder, as far as it is there."""

from dataclasses import dataclass
from pathlib import Path

from minialign.evaluation.kept_answers import (
    ANSWERS_FILE,
    CAPTIONS_FILE,
    read_answers,
    read_captions,
)
from minialign.options import TINY_WORLD
from minialign.report.number_texts import is_number
from minialign.utils.files import check, friendly_errors, read_json, read_jsonl, read_optional_json

CONFIG_FILE = "config.json"
PAIRS_FILE = "pairs.jsonl"
REMEDY = "remove it, and the report is made without it"
RELIANCE_FILE = "reliance.jsonl"  # the words of a few answers (chosen_reliance.py)
# The variants of a model in the order in which they are shown.
VARIANTS = ("base", "control", "aligned")


@dataclass(eq=False)  # each is equal to itself alone, so that results about it can be cached
class RunFiles:
    """The content of the folder of a run. What a run does not write is empty."""

    folder: Path
    config: dict
    scores: dict  # variant: evaluation set: scores, as in evaluation.json
    summary: dict  # empty until the run is finished
    log: list[dict]  # the lines of metrics.jsonl
    control_log: list[dict]
    reward_log: list[dict]  # of the reward model that RLOO and PPO train first
    pairs: list[dict]
    captions: list[dict]
    answers: list[dict]
    reliance: list[dict]

    @property
    def settings(self) -> dict:
        """The options of the run, by their names."""
        return self.config["settings"]

    @property
    def method(self) -> str:
        """The name of the training method."""
        return self.settings["method"]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    def variants(self) -> list[str]:
        """Return which of base, control and aligned have scores."""
        return [variant for variant in VARIANTS if variant in self.scores]

    def scores_of(self, variant, set_name) -> dict:
        """Return the scores of a variant on an evaluation set. They are empty if it has none."""
        return self.scores.get(variant, {}).get(set_name, {})

    def set_names(self) -> list[str]:
        """Return the names of the evaluation sets."""
        names = {}
        for scores_of_sets in self.scores.values():
            names |= dict.fromkeys(scores_of_sets)
        return list(names)


def read_run(folder) -> RunFiles:
    """Read the folder of a run of train.py, finished or not.

    Raises InputError if it is no such folder, or for a file that is broken.
    """
    folder = Path(folder)
    config_path = folder / CONFIG_FILE
    check(
        config_path.is_file(),
        f"{folder}: has no {CONFIG_FILE}; name the folder of a run, as --out of train.py did",
    )
    config = read_json(config_path, dict)
    with friendly_errors(config_path, "restore the original file"):
        method = config["settings"]["method"]
    check(isinstance(method, str), f"{config_path}: its method is not a text; restore the file")
    return RunFiles(
        folder=folder,
        config=config,
        scores=read_scores(folder),
        summary=read_summary(folder / "summary.json"),
        log=read_log(folder / "metrics.jsonl"),
        control_log=read_log(folder / "control" / "metrics.jsonl"),
        reward_log=read_log(folder / "reward" / "metrics.jsonl"),
        pairs=read_lines(folder / PAIRS_FILE),
        captions=read_if_there(folder / CAPTIONS_FILE, read_captions),
        answers=read_if_there(folder / ANSWERS_FILE, read_answers),
        reliance=read_lines(folder / RELIANCE_FILE),
    )


def is_tiny_file(path) -> bool:
    """Return whether a file or folder belongs to the shipped tiny world."""
    return Path(path).is_relative_to(TINY_WORLD)


def read_scores(folder) -> dict:
    """Return the scores of a run, or those so far of a run that is not finished."""
    for name in ("evaluation.json", ".evaluation.json"):
        path = folder / name
        if path.exists():
            scores = read_json(path, dict)
            check_scores(scores, path)
            return scores
    return {}


def check_scores(scores, path):
    """Raise InputError unless there are scores, all numbers or null, of each variant on each set.

    A set may also have scores of each split of POPE.
    """
    for variant, scores_of_sets in scores.items():
        check(isinstance(scores_of_sets, dict), f"{path}: {variant!r} has no sets; {REMEDY}")
        for set_name, scores_of_set in scores_of_sets.items():
            message = (
                f"{path}: the scores of {variant!r} on {set_name!r} are not all numbers; {REMEDY}"
            )
            check(isinstance(scores_of_set, dict), message)
            splits = scores_of_set.get("pope", {})
            check(isinstance(splits, dict), message)
            scores_of_captions = {**scores_of_set}
            scores_of_captions.pop("pope", None)
            tables = [scores_of_captions, *splits.values()]
            check(all(is_table(table) for table in tables), message)


def is_table(value) -> bool:
    """Return whether a value of JSON is an object of numbers, or null for shares of nothing."""
    return isinstance(value, dict) and all(
        score is None or is_number(score) for score in value.values()
    )


def read_summary(path) -> dict:
    """Return what a run has cost, or an empty dict if it is not finished."""
    summary = read_optional_json(path)
    if summary:
        seconds = summary.get("seconds")
        check(isinstance(seconds, dict), f"{path}: has no seconds; {REMEDY}")
        numbers = [summary.get(name) for name in ("steps", "pairs", "peak_memory_mb")]
        numbers += seconds.values()
        check(all(map(is_number, numbers)), f"{path}: a number is missing; {REMEDY}")
    return summary


def read_if_there(path, read) -> list[dict]:
    """Return what the function `read` reads from a file, or nothing if there is no such file."""
    return read(path) if path.exists() else []


def read_lines(path) -> list[dict]:
    """Return the objects in a file of JSON lines, or none if there is no such file."""
    if not path.exists():
        return []
    lines = read_jsonl(path)
    for i, line in enumerate(lines, start=1):
        check(isinstance(line, dict), f"{path}, record {i}: not a JSON object; {REMEDY}")
    return lines


def read_log(path) -> list[dict]:
    """Return the lines of a metrics.jsonl. Raise InputError for a step that is not a number."""
    lines = read_lines(path)
    for i, line in enumerate(lines, start=1):
        has_number = is_number(line.get("step", 0))
        check(has_number, f"{path}, record {i}: 'step' is not a number; {REMEDY}")
    return lines
