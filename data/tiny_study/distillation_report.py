"""The report of the study of distillation: what study.json stores, as Markdown, and captions."""

from pathlib import Path

from minialign.evaluation.evaluation_sets import find_captions_file, read_captions
from minialign.evaluation.shares import scaled_text
from minialign.utils.digests import file_digest
from minialign.utils.files import read_json
from minialign.utils.text_tables import markdown_head, markdown_row
from tiny_study.arms import Run
from tiny_study.comparisons import (
    COMPARED_SCORES,
    SETS,
    difference_text,
    judge_targets,
    list_differences,
    list_values,
    summarize_values,
)
from tiny_study.tables import Result, load_results

NUM_CAPTIONS = 20  # of each arm, to look at
# The columns of the tables: heading, score, and the factor that is shown.
COLUMNS = (
    ("CHAIR_i", "chair_i", 100),
    ("recall", "recall", 100),
    ("POPE", "pope", 100),
    ("repeats", "repeats", 100),
)
FLUENCY_COLUMNS = (
    ("well formed", "well_formed", 100),
    ("nats a token, text alone", "text_logp", 1),
    ("words", "words", 1),
    ("repeats", "repeats", 100),
)


def summarize_distillation(runs: list[Run], bases: dict, sets: dict, out) -> dict:
    """Return what study.json stores of the runs that are done.

    Args:
        runs: all runs of the study.
        bases: {folder: about.json}.
        sets: {name: folder} of the evaluation sets.
        out: the study's folder.
    """
    results = name_bases(load_results(runs, bases, out))
    values = list_values(results)
    differences = list_differences(results)
    return {
        "bases": describe_bases(bases, out),
        "summary": summarize_values(values),
        "targets": judge_targets(differences),
        "differences": differences,
        "values": values,
        "captions": show_captions(results, sets),
    }


def name_bases(results: list[Result]) -> list[Result]:
    """Return results with the name of a base's folder in place of its path."""
    named = []
    for result in results:
        base_name = Path(result.base).name
        named.append(
            Result(
                q=result.q,
                set_name=result.set_name,
                arm=result.arm,
                base=base_name,
                seed=result.seed,
                scores=result.scores,
            )
        )
    return named


def describe_bases(bases: dict, out) -> list[dict]:
    """Return name, seed, q and digest of each base, and how many records its arms shared."""
    described = []
    for folder, about in bases.items():
        name = Path(folder).name
        records = {}
        for path in sorted((Path(out) / "records").glob(f"{name}-*/counts.json")):
            seed = path.parent.name.removeprefix(f"{name}-")
            if seed.isdigit():
                records[seed] = read_json(path, dict)
        base = {"name": name} | about
        base["model"] = file_digest(Path(folder) / "model" / "model.safetensors")
        base["records"] = records
        described.append(base)
    return described


def show_captions(results: list[Result], sets: dict) -> dict:
    """Return the first captions of each arm on balanced images, {base: [image]}.

    They are those of the first base of each q, with alignment seed 0.
    """
    folder = sets.get("balanced")
    if folder is None:
        return {}
    _, rows = read_captions(find_captions_file(Path(folder)))
    first_base_of_q = {}
    captions_of_base = {}
    for result in results:
        first_base = first_base_of_q.setdefault(result.q, result.base)
        if result.base != first_base or result.seed != 0 or result.set_name != "balanced":
            continue
        if result.base not in captions_of_base:
            shown = []
            for row in rows[:NUM_CAPTIONS]:
                objects = [_object_text(item) for item in row["objects"]]
                shown.append({"image": row["image"], "request": row["prompt"], "shows": objects})
            captions_of_base[result.base] = shown
        captions = result.scores["captions"][:NUM_CAPTIONS]
        for image, caption in zip(captions_of_base[result.base], captions, strict=True):
            image[result.arm] = caption
    return captions_of_base


def _object_text(item):
    """Return an annotated object in words, as far as its color and place are annotated."""
    text = item["name"]
    if item.get("colour"):
        text = f"{item['colour']} {text}"
    if item.get("place"):
        text = f"{text}, {item['place']}"
    return text


# --- Markdown


def distillation_lines(report: dict) -> list[str]:
    """Return the tables of the study as lines of Markdown."""
    lines = ["**Targets**", ""]
    lines += target_table(report["targets"])
    lines += ["", "**Scores, mean ± deviation over bases ± over seeds**", ""]
    lines += score_table(report["summary"], COLUMNS)
    lines += ["", "**Differences [95 % interval over images]**", ""]
    lines += difference_table(report["differences"])
    lines += ["", "**The words**", ""]
    lines += score_table(report["summary"], FLUENCY_COLUMNS)
    return lines


def target_table(targets: list[dict]) -> list[str]:
    """Return a table with a line for each target and base."""
    lines = markdown_head(["q", "base", "target", "runs", *SETS, "holds"])
    for row in targets:
        cells = [f"{row['q']:g}", row["base"], row["target"], str(row["runs"])]
        for name in SETS:
            cells.append(difference_text(row["sets"].get(name)))
        cells.append("yes" if row["holds"] else "no")
        lines.append(markdown_row(cells))
    return lines


def score_table(summary: list[dict], columns) -> list[str]:
    """Return a table with a line for each q, set and arm."""
    lines = markdown_head(
        ["q", "set", "arm", "bases", "runs", *[heading for heading, _, _ in columns]]
    )
    for row in summary:
        cells = [f"{row['q']:g}", row["set"], row["arm"], str(row["bases"]), str(row["runs"])]
        for _, score, factor in columns:
            cells.append(_spread(row[score], factor))
        lines.append(markdown_row(cells))
    return lines


def difference_table(differences: list[dict]) -> list[str]:
    """Return a table with a line for each comparison, set and base. Shares are in points."""
    lines = markdown_head(["q", "base", "set", "arm", "against", "runs", *COMPARED_SCORES])
    for row in differences:
        cells = [f"{row['q']:g}", row["base"], row["set"], row["arm"], row["against"]]
        cells.append(str(row["runs"]))
        for score in COMPARED_SCORES:
            cells.append(difference_text(row[score]))
        lines.append(markdown_row(cells))
    return lines


def caption_lines(captions: dict) -> list[str]:
    """Return the captions to look at as Markdown, image by image."""
    lines = []
    for base, images in captions.items():
        lines += [f"# {base}", ""]
        for image in images:
            lines += [f"## {image['image']}: {'; '.join(image['shows'])}", "", image["request"], ""]
            for name, text in image.items():
                if name not in ("image", "request", "shows"):
                    lines.append(f"- {name}: {text}")
            lines.append("")
    return lines


def _spread(spread, factor):
    """Return a mean with its deviations, as far as they are known."""
    if spread is None:
        return "-"
    text = scaled_text(spread["mean"], factor)
    for name in ("over_bases", "over_seeds"):
        if spread[name] is not None:
            text += f" ± {factor * spread[name]:.1f}"
    return text
