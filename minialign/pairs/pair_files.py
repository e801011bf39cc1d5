"""Files of preference pairs: sampled group by group, so that an interrupted run can resume."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minialign.data.records import Record
from minialign.models.checkpoint import fingerprint
from minialign.models.loading import VLM
from minialign.utils.digests import file_digest
from minialign.utils.distributed import barrier, is_main_process, map_across_ranks
from minialign.utils.files import append_jsonl, check, friendly_errors, read_jsonl, write_jsonl


def preference_pair(record: Record, rejected: str) -> dict:
    """Return a preference pair as it is written to a file, without its sampler's own fields."""
    if len(record.turns) == 1:
        prompt = record.turns[0]
    else:
        prompt = list(record.turns)
    pair = {
        "id": record.id,
        "image": record.image,
        "prompt": prompt,
        "chosen": record.chosen,
        "rejected": rejected,
    }
    if record.system is not None:
        pair["system"] = record.system
    return pair


def sample_pair_file(
    sampler, records: list[Record], path, *, group_size: int, resume: bool = False
) -> list[dict]:
    """Sample pairs for all records, write them to `path` as JSONL and return them.

    Raises InputError if a run that is to be resumed had other settings, records or weights.
    """
    pairs = sample_in_groups(sampler, records, path, group_size=group_size, resume=resume)
    write_jsonl(path, pairs)
    remove_unfinished(path)
    return pairs


def sample_in_groups(
    sampler, records: list[Record], path, *, group_size: int, resume: bool
) -> list[dict]:
    """Sample pairs for all records in groups of `group_size`, and return them.

    They are kept in `path`.part, behind a header with the settings, until the caller has written
    its files and calls `remove_unfinished`.
    """
    part = unfinished_path(path)
    header = pair_file_header(sampler, records, group_size)
    # 1. Read what an interrupted run has finished.
    pairs = []
    if resume and part.exists():
        pairs = read_finished_groups(part, header, group_size)
    barrier()  # no process may write before all have read
    # 2. Write the header and the finished pairs, without a line that was cut short.
    write_jsonl(part, [header, *pairs])
    # 3. Sample group by group. A restart continues with the same groups of the same list of
    #    records.
    with tqdm(total=len(records), initial=len(pairs), desc="pairs", unit="pair") as progress:
        for first in range(len(pairs), len(records), group_size):
            group = map_across_ranks(records[first : first + group_size], sampler.pairs)
            append_jsonl(part, group)
            pairs += group
            progress.update(len(group))
    return pairs


def unfinished_path(path) -> Path:
    """Return where the pairs of `path` are kept until all of them are sampled."""
    return Path(f"{path}.part")


def remove_unfinished(path):
    """Remove the unfinished file of `path`, if there is one. The files with all pairs are written.

    A process that was stopped before this may have left it beside the finished file.
    """
    if is_main_process():
        unfinished_path(path).unlink(missing_ok=True)


def read_finished_pairs(
    path, records: list[Record], remedy: str
) -> tuple[list[Record], list[dict]]:
    """Read a finished file of pairs that were sampled for `records`, or for some of them.

    remedy: what to do about a file that does not fit, for errors.

    Returns the records of the pairs, and the pairs, in their order. `--keep` leaves out some.
    """
    pairs = read_jsonl(path)
    for number, pair in enumerate(pairs, start=1):
        has_rejected = isinstance(pair, dict) and isinstance(pair.get("rejected"), str)
        check(has_rejected, f"{path}: pair {number} has no rejected response; {remedy}")
    records_of_pairs = []
    for record in records:
        num_matched = len(records_of_pairs)
        if num_matched < len(pairs) and is_pair_of(record, pairs[num_matched]):
            records_of_pairs.append(record)
    check(
        pairs and len(records_of_pairs) == len(pairs),
        f"{path}: was sampled for other records than those of --data; {remedy}",
    )
    barrier()  # another process may still check whether there is an unfinished file
    remove_unfinished(path)
    return records_of_pairs, pairs


def is_pair_of(record: Record, pair: dict) -> bool:
    """Return whether a pair was sampled for a record: all but the rejected response is the same."""
    expected = preference_pair(record, pair["rejected"])
    has_same_fields = all(pair.get(name) == value for name, value in expected.items())
    return has_same_fields and pair.get("system") == record.system


def pair_file_header(sampler, records, group_size) -> dict:
    """Return what the pairs depend on, to compare when a run is resumed."""
    contents = []
    for record in records:
        images = [file_digest(path) for path in record.paths]
        content = (record.id, record.paths, images, record.turns, record.chosen)
        if record.system is not None:
            content = (*content, record.system)
        contents.append(content)
    digest = hashlib.sha256(repr(contents).encode()).hexdigest()
    header = sampler.metadata()
    header["group"] = group_size
    header["model"] = fingerprint(sampler.vlm.model)
    header["files"] = list(sampler.vlm.file_digests.values())  # not the paths: a model may move
    header["template"] = sampler.vlm.template
    header["records"] = digest[:16]
    return header


def read_finished_groups(part: Path, header: dict, group_size: int) -> list[dict]:
    """Read the complete groups of an unfinished file, whose header must be the same."""
    # What follows the last line break is empty, or a line that was cut short.
    lines = part.read_bytes().split(b"\n")[:-1]
    expected_header = json.dumps(header, ensure_ascii=False).encode()
    check(
        lines and lines[0] == expected_header,
        f"{part}: was begun with other settings, data, weights or files of the model, or by an "
        "earlier version; give the same options, or remove it",
    )
    num_pairs = len(lines) - 1
    num_finished = num_pairs // group_size * group_size
    with friendly_errors(part, "remove it"):
        return [dict(json.loads(line)) for line in lines[1 : 1 + num_finished]]


@dataclass
class GivenPairs:
    """Makes pairs as a sampler does, of the rejected responses that the data has already."""

    vlm: VLM
    records: list[Record]

    def metadata(self) -> dict:
        """Return what the pairs depend on beside prompts, images and chosen responses."""
        rejected = [record.rejected for record in self.records]
        digest = hashlib.sha256(repr(rejected).encode()).hexdigest()
        return {"rejected": digest[:16]}

    def pairs(self, records: list[Record]) -> list[dict]:
        """Return a preference pair for each record."""
        return [preference_pair(record, record.rejected) for record in records]


def check_pairs(records: list[Record], purpose: str = "this") -> list[Record]:
    """Return the records. Raises InputError unless each has a rejected response."""
    for record in records:
        check(
            record.rejected is not None,
            f"{record.location}: has no rejected response; {purpose} needs pairs, "
            "`sample.py pairs` makes them",
        )
    return records
