"""Write the folders of small runs, as train.py leaves them, and read the pages about them."""

import json
from html.parser import HTMLParser

from conftest import TINY

VOID_ELEMENTS = {"br", "img", "meta"}
EVALUATION_SET = TINY / "final" / "typical"
SETTINGS = {
    "method": "bdhs",
    "loss": "dpo",
    "beta": 0.5,
    "model": str(TINY / "model"),
    "data": [str(TINY / "train" / "instruct.json")],
    "images": None,
    "eval": [str(EVALUATION_SET)],
    "steps": 3,
    "batch_size": 32,
    "seed": 0,
    "rounds": 5,
}
LOG = [
    {"step": 0, "loss": 0.7, "logp_chosen": -2.0, "ref_logp_chosen": -2.0, "grad_norm": 3.0},
    {"step": 1, "loss": 0.5, "logp_chosen": -2.5, "ref_logp_chosen": -2.0, "grad_norm": 2.0},
    {"step": 2, "loss": 0.4, "logp_chosen": -3.0, "ref_logp_chosen": -2.0, "grad_norm": 1.0},
]
SUMMARY = {
    "seconds": {"load": 1.0, "sample": 20.0, "train": 70.0},
    "steps": 3,
    "pairs": 40,
    "peak_memory_mb": 890,
}


def caption_line(image="0001.png", objects=("cup",), **texts) -> dict:
    """Return a line of captions.jsonl. Every "cup" and "dog" in the texts of the models counts."""
    answers = {}
    for variant, text in texts.items():
        mentions = []
        for name in ("cup", "dog"):
            start = text.find(name)
            if start >= 0:
                present = name in objects
                place = {"start": start, "end": start + len(name)}
                mentions.append(place | {"object": name, "present": present})
        mentions.sort(key=lambda mention: mention["start"])
        missed = [name for name in objects if name not in text]
        answers[variant] = {"text": text, "mentions": mentions, "missed": missed}
    return {
        "set": "typical",
        "folder": str(EVALUATION_SET / "images"),
        "image": image,
        "prompt": "What is there?",
        "objects": list(objects),
        "answers": answers,
    }


def scores(chair_i, recall=0.5) -> dict:
    """Return the scores of one set."""
    return {"chair_i": chair_i, "recall": recall, "words": 20.0, "pope": {}}


def write_run(folder, settings=(), log=LOG, **files):
    """Write the folder of a run.

    files: the content of further files, by their names without ending: a dict is written as JSON, a
    list as JSON lines.
    """
    folder.mkdir()
    files["config"] = {"settings": SETTINGS | dict(settings)}
    files["metrics"] = log
    for name, content in files.items():
        if isinstance(content, list):
            lines = [json.dumps(line) + "\n" for line in content]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


class PageReader(HTMLParser):
    """Read a page, and check that every element is closed where it must be."""

    def __init__(self, page):
        super().__init__()
        self.open_elements = []
        self.elements = []  # (name, attributes)
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open_elements == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open_elements.append(tag)

    def handle_endtag(self, tag):
        assert self.open_elements.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open_elements:
            self.text += data
