"""The records that all arms of a study learn from, on one base with one alignment seed.

BDHS finds no usable rejected response for some records, and its training leaves them out. Without
more care its control would learn from more records than it does. So pairs are sampled once for all
records, by every sampler in SAMPLERS. The records for which each of them found a usable response
are the ones that every arm learns from:

    chosen.json       them, in the form of instruct.json, in its order
    bdhs.jsonl        the pairs of BDHS for them
    unguided.jsonl    the pairs of BDHS without guidance for them
    counts.json       how many there are, and for how many each sampler found nothing
    all-NAME.jsonl    what each sampler sampled for all records
"""

from pathlib import Path

from minialign.training.inputs import load_and_validate, sample_or_read_pairs
from minialign.training.options import parse_options
from minialign.utils.files import check, read_json, write_json, write_jsonl
from minialign.utils.locks import file_lock
from tiny_study.recipe import recipe_options

SAMPLERS = {"bdhs": [], "unguided": ["--unguided"]}  # options of train.py --method bdhs


def share_records(base, seed: int, recipe: dict, out) -> Path:
    """Return the folder of the shared records of a base and seed, which is made if it is missing.

    Args:
        base: the folder of the base.
        seed: the alignment seed. It decides what is sampled.
        recipe: the frozen options of train.py.
        out: the study's folder.

    Runs that are done at the same time wait for the one that makes it.
    """
    folder = Path(out) / "records" / f"{Path(base).name}-{seed}"
    with file_lock(folder / "lock", folder, wait=True):
        if not (folder / "counts.json").exists():
            make_shared_records(base, seed, recipe, folder)
    return folder


def make_shared_records(base, seed, recipe, folder):
    """Sample pairs for all records of a base, and write those that all samplers can use."""
    # 1. The pairs of each sampler, as train.py samples them. Interrupted, it continues.
    data = Path(base) / "train" / "instruct.json"
    words = ["--model", str(Path(base) / "model"), "--data", str(data)]
    words += [*recipe_options(recipe, "bdhs"), "--method", "bdhs", "--seed", str(seed)]
    vlm = None
    pairs_of = {}
    for name, sampler_options in SAMPLERS.items():
        options = parse_options([*words, *sampler_options, "--out", str(folder)])
        if vlm is None:
            vlm, records, _ = load_and_validate(options)
        path = folder / f"all-{name}.jsonl"
        pairs_of[name] = sample_or_read_pairs(options, vlm, records, path)

    # 2. The records that all of them can use.
    unusable_ids = {name: find_unusable(pairs) for name, pairs in pairs_of.items()}
    left_out = set().union(*unusable_ids.values())
    ids = [record.id for record in records]
    check(len(set(ids)) == len(ids), f"{data}: two records have the same id; rename one")
    check(len(left_out) < len(ids), f"{data}: no sampler found a pair; see {folder}")

    # 3. Their files. The counts come last: they say that all is done.
    sampled_ids = set(ids)  # --limit leaves records out
    chosen = []
    for record in read_json(data, list):
        if record["id"] in sampled_ids - left_out:
            chosen.append(record)
    write_json(folder / "chosen.json", chosen)
    for name, pairs in pairs_of.items():
        write_jsonl(folder / f"{name}.jsonl", [p for p in pairs if p["id"] not in left_out])
    counts = {"records": len(chosen), "of": len(ids)}
    for name, unusable in unusable_ids.items():
        counts[f"unusable, {name}"] = len(unusable)
    write_json(folder / "counts.json", counts)


def find_unusable(pairs: list[dict]) -> set[str]:
    """Return the ids of the pairs that can teach nothing."""
    return {pair["id"] for pair in pairs if not is_usable(pair)}


def is_usable(pair: dict) -> bool:
    """Return whether the rejected response of a pair can teach anything."""
    return pair["rejected"] not in ("", pair["chosen"])
