"""Records and their readers: a picture, a prompt, a chosen response and perhaps a rejected one."""
import random
from dataclasses import dataclass
from pathlib import Path

from .files import BadInput, read_json, read_jsonl


@dataclass(frozen=True)
class Record:
    """`image` as the file names it (a name, or a list of them), `paths` where they lie; `turns`: question, answer, ..., question, with "<image>" where a picture
    belongs; `rejected` None for supervised data."""
    id: str
    image: str | list
    paths: tuple
    turns: tuple
    chosen: str
    rejected: str | None = None


def _conversation(turns, where):
    """(turns up to the last question, last answer) of a LLaVA conversation, checked."""
    if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
        raise BadInput(f"{where}: a conversation is pairs of human and gpt turns; this one has {len(turns) if isinstance(turns, list) else 'none'}")
    texts = []
    for number, turn in enumerate(turns):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise BadInput(f"{where}: turn {number + 1} is not {{\"from\": \"{speaker}\", \"value\": text}}")
        texts.append(turn["value"])
    return tuple(texts[:-1]), texts[-1]


def _llava(raw, where):
    """LLaVA-Instruct, and POVID with its `rejected_conversations`."""
    turns, chosen = _conversation(raw["conversations"], where)
    if "rejected_conversations" not in raw:
        return turns, chosen, None
    others, rejected = _conversation(raw["rejected_conversations"], where)
    if [turn.replace("<image>", "").strip() for turn in others] != [turn.replace("<image>", "").strip() for turn in turns]:
        raise BadInput(f"{where}: the rejected conversation asks something else than the chosen one; both must answer the same question")
    return turns, chosen, rejected


def _pair(raw, where):
    """Our own pairs, as `sample.py pairs` writes them; a prompt of several turns is a list."""
    turns = raw["prompt"] if isinstance(raw["prompt"], list) else [raw["prompt"]]
    if len(turns) % 2 == 0 or not all(isinstance(turn, str) and turn.replace("<image>", "").strip() for turn in turns):
        raise BadInput(f"{where}: the prompt is not a text, nor a list of texts: question, answer, question, ...")
    return tuple(turns), raw["chosen"], raw["rejected"]


READERS = {"conversations": _llava, "prompt": _pair}  # by the field that tells them apart


def _record(raw, where, name, folder):
    if not isinstance(raw, dict):
        raise BadInput(f"{where}: not a JSON object")
    where = f"{where} (id {raw['id']})" if raw.get("id") is not None else where
    reader = next((read for field, read in READERS.items() if field in raw), None)
    images = raw.get("image") if isinstance(raw.get("image"), list) else [raw.get("image")]
    if reader is None or not images or not all(isinstance(image, str) for image in images):
        missing = "conversations" if reader is None else "image"
        raise BadInput(f"{where}: no field {missing!r}; supported are LLaVA-Instruct and POVID records, and the pairs of sample.py")
    try:
        turns, chosen, rejected = reader(raw, where)
    except KeyError as error:
        raise BadInput(f"{where}: no field {error}") from None
    if not any("<image>" in turn for turn in turns):
        turns = ("<image>\n" * len(images) + turns[0], *turns[1:])
    if sum(turn.count("<image>") for turn in turns[::2]) != len(images) or any("<image>" in text for text in (*turns[1::2], str(chosen), str(rejected))):
        raise BadInput(f"{where}: <image> must stand {len(images)} times in the questions, once for each picture, and never in an answer")
    for what, text in (("chosen", chosen), ("rejected", rejected)):
        if text is not None and (not isinstance(text, str) or not text.strip()):
            raise BadInput(f"{where}: the {what} response is empty; remove the record or give it a text")
    paths = tuple(str(Path(folder) / image) for image in images)
    for path in paths:
        if not Path(path).is_file():
            raise BadInput(f"{where}: no picture {path}; give its folder with --images")
    return Record(str(raw["id"] if raw.get("id") is not None else name), raw["image"], paths, turns, chosen.strip(), rejected and rejected.strip())


def read_records(paths, images, limit=None, seed=0):
    """Records of JSON or JSONL files with whole paths of their pictures; `limit` takes a seeded random subset, in file order.

    `images` is the folder that pictures are relative to; None: `images/` beside each file. Raises BadInput with file and record.
    """
    records = []
    for path in map(Path, paths):
        raw = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
        if not isinstance(raw, list) or not raw:
            raise BadInput(f"{path}: not a list of records")
        folder = Path(images) if images else path.parent / "images"
        records += [_record(one, f"{path}, record {number}", f"{path.name}:{number}", folder) for number, one in enumerate(raw, 1)]
    if limit is not None and limit < len(records):
        kept = sorted(random.Random(seed).sample(range(len(records)), limit))
        records = [records[i] for i in kept]
    return records
