"""Bias-Driven Hallucination Sampling (Sec. 3.4, Alg. 1): rejected responses from the model itself, its picture hidden; and the
teacher-forced distortion of Sec. 3.3.

A record's draws depend on (seed, record id, round) alone. One prefill of (visible vectors, prompt, y+) serves all sentences of
a record: each rewinds the cache to its cut and writes on from there, and all sentences of all records decode as one batch.
"""

import hashlib
import json
import os
from pathlib import Path

from tqdm import tqdm

from minialign.data.chat_templates import IMAGE_PLACEHOLDER
from minialign.models.checkpoint import fingerprint
from minialign.utils.distributed import barrier, is_main_process, map_across_ranks
from minialign.utils.files import check, friendly_errors, write_jsonl


def preference_pair(record, rejected):
    """A preference pair as it is written, without its trace; an <image> that the policy may have spelt out is dropped."""
    prompt = record.turns[0] if len(record.turns) == 1 else list(record.turns)
    return {
        "id": record.id,
        "image": record.image,
        "prompt": prompt,
        "chosen": record.chosen,
        "rejected": rejected.replace(IMAGE_PLACEHOLDER, ""),
    }


def sample_pair_file(sampler, records, path, group, resume=False):
    """Pairs of all records, written to `path` as JSONL; groups are formed from the full list, so a restart changes nothing.

    Work in progress lies beside, in `path`.part, a header line first; it is renamed when it is whole.
    Raises BadInput when what is to be resumed was begun with other settings, data or weights.
    """
    part, vlm = Path(f"{path}.part"), sampler.vlm
    data = hashlib.sha256(
        repr(
            [(record.id, record.paths, record.turns, record.chosen) for record in records]
        ).encode()
    ).hexdigest()[:16]
    header = sampler.metadata() | {
        "group": group,
        "model": fingerprint(vlm.model),
        "template": vlm.template,
        "records": data,
    }
    done = []
    if resume and part.exists():
        lines = part.read_bytes().split(b"\n")[:-1]  # a line cut short has no end
        same = lines and lines[0] == json.dumps(header, ensure_ascii=False).encode()
        check(
            same,
            f"{part}: was begun with other settings, data or weights; give the same options, or remove it",
        )
        with friendly_errors(part, "remove it"):
            done = [
                dict(json.loads(line)) for line in lines[1 : 1 + (len(lines) - 1) // group * group]
            ]
    barrier()  # until all have read what was done before
    write_jsonl(part, [header, *done])
    with (
        open(part if is_main_process() else os.devnull, "a", encoding="utf-8") as stream,
        tqdm(total=len(records), initial=len(done), desc="pairs", unit="pair") as bar,
    ):
        for first in range(len(done), len(records), group):
            pairs = map_across_ranks(records[first : first + group], sampler.pairs)
            stream.write("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
            stream.flush()
            done += pairs
            bar.update(len(pairs))
    write_jsonl(path, done)
    if is_main_process():
        part.unlink()
    return done


def check_pairs(records, what="this"):
    """The records, each with a rejected response. Raises BadInput naming the first that has none."""
    for record in records:
        check(
            record.rejected is not None,
            f"record {record.id} has no rejected response; {what} needs pairs, `sample.py pairs` makes them",
        )
    return records
