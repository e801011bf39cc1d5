"""A record of every format and a folder to read from, for the tests of formats and records."""

import json

import pytest

from minialign.data.records import read_records
from minialign.utils.files import InputError


class DataFolder:
    """A folder with data.json and with images/a.png and images/b.png, which are never opened."""

    def __init__(self, path):
        self.path = path
        (path / "images").mkdir()
        for name in ("a.png", "b.png"):
            (path / "images" / name).touch()

    def image_path(self, name):
        """Return the path of an image as a Record has it."""
        return str(self.path / "images" / name)

    def write(self, records, name="data.json"):
        """Write records to a file, JSON or JSON lines by its name, and return its path."""
        path = self.path / name
        text = json.dumps(records)
        if path.suffix == ".jsonl":
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            text = "".join(lines)
        path.write_text(text, encoding="utf-8")
        return path

    def read(self, *records, name="data.json", image_folder=None, **options):
        """Write records to a file and read them back."""
        return read_records([self.write(records, name)], image_folder, **options)

    def error_of(self, *records, **options):
        """Return the message with which records are refused, one line that names the file."""
        with pytest.raises(InputError) as error:
            self.read(*records, **options)
        message = str(error.value)
        assert len(message.splitlines()) == 1
        assert str(self.path / "data.json") in message
        return message


def conversation(*texts):
    """Return LLaVA's messages, in which human and gpt take turns."""
    messages = []
    for i, text in enumerate(texts):
        messages.append({"from": ("human", "gpt")[i % 2], "value": text})
    return messages


def llava(**changes):
    """Return a LLaVA-Instruct record of one question, with fields changed. None removes a field."""
    record = {
        "id": "7",
        "image": "a.png",
        "conversations": conversation("<image>\nWhat is it?", " A cup. "),
    }
    return changed(record, **changes)


def changed(record, **changes):
    """Return a record with fields changed. None removes a field."""
    record = {**record, **changes}
    return {name: value for name, value in record.items() if value is not None}


ASPECTS = {"h": "Helpfulness", "e": "Ethical Considerations", "v": "Visual Faithfulness"}


def annotation(**ratings):
    """Return VLFeedback's annotation of one response: a rating and a rationale per aspect."""
    annotated = {}
    for letter, rating in ratings.items():
        annotated[ASPECTS[letter]] = {"Rating": rating, "Rationale": "So it is."}
    return annotated


def vlfeedback(*annotations, responses=("A.", "B.", "C.")):
    """Return a VLFeedback record with these annotations of its first responses."""
    count = len(annotations)
    models = ["x", "y", "z"]
    return {
        "id": "7",
        "prompt": "What is it?",
        "img_path": "a.png",
        "models": models,
        "completions": {
            "annotations": list(annotations),
            "model": models[:count],
            "response": list(responses[:count]),
        },
    }


COMPARISON = {"question": "What is it?", "chosen": "A cup.", "rejected": "A dog."}
TRL_QUESTION = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
# A record of every format as it is published. All of them ask "What is it?" about a.png and have
# the answers "A cup." and "A dog.".
EXAMPLES = {
    "llava": llava(),
    "povid": llava(rejected_conversations=conversation("<image>\nWhat is it?", "A dog.")),
    "llava-rlhf": llava(
        conversations=conversation("<image>\nWhat is it?"),
        output_1={"from": "llava", "value": "A dog."},
        output_2={"from": "llava", "value": "A cup."},
        preference=2,
    ),
    "llama-factory": {
        "id": "7",
        "images": ["a.png"],
        "conversations": conversation("<image>What is it?"),
        "chosen": {"from": "gpt", "value": "A cup."},
        "rejected": {"from": "gpt", "value": "A dog."},
    },
    "llava-pair": llava(rejected="A dog."),
    "rlhf-v": {"idx": 7, "image_path": "a.png", "text": json.dumps(COMPARISON)},
    "rlaif-v": {
        "ds_name": "RLAIF-V",
        "idx": 7,
        "image_path": "a.png",
        "origin_split": "{}",
        **COMPARISON,
    },
    "internvl": {"id": 7, "image": "a.png", **COMPARISON},
    "vlfeedback": vlfeedback(
        annotation(h="3", e="5", v="4"),
        annotation(h="2", e="5", v="1"),
        annotation(h="4", e="N/A", v="5"),
        responses=("A pot.", "A dog.", "A cup."),
    ),
    "trl": {
        "id": "7",
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": TRL_QUESTION}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cup."}]}],
        "rejected": [{"role": "assistant", "content": "A dog."}],
    },
    "pairs": {
        "id": "7",
        "image": "a.png",
        "prompt": "<image>\nWhat is it?",
        "chosen": "A cup.",
        "rejected": "A dog.",
        "rounds": 1,
        "visible": [3],
    },
    "trl-implicit": {
        "id": "7",
        "images": ["a.png"],
        "chosen": [
            {"role": "user", "content": TRL_QUESTION},
            {"role": "assistant", "content": "A cup."},
        ],
        "rejected": [
            {"role": "user", "content": TRL_QUESTION},
            {"role": "assistant", "content": "A dog."},
        ],
    },
}
