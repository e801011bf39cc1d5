"""Compute what the picture adds to each word of a few answers, while the model is loaded."""

from pathlib import Path

from minialign.data.chat_templates import encode_response
from minialign.data.templates import IMAGE_PLACEHOLDER
from minialign.evaluation.kept_answers import CAPTIONS_FILE, read_captions
from minialign.evaluation.reliance import token_reliance
from minialign.models.loading import VLM
from minialign.report.pictures import choose_pictures
from minialign.report.run_files import RELIANCE_FILE
from minialign.utils.distributed import broadcast_from_main
from minialign.utils.files import write_jsonl

PER_GROUP = 2  # pictures of each group that the report shows


def write_reliance(folder, vlm: VLM):
    """Write reliance.jsonl about the first pictures of each group that the report will show.

    vlm: the aligned model. Without kept captions there is nothing to write.
    """
    captions_path = Path(folder, CAPTIONS_FILE)
    # The main process has written the captions. All processes compute the same, since each may hold
    # a part of the model only.
    has_captions = broadcast_from_main(captions_path.exists())
    if not has_captions:
        return
    rows = []
    for lines in choose_pictures(read_captions(captions_path)).values():
        for line in lines[:PER_GROUP]:
            row = {"set": line["set"], "image": line["image"], "prompt": line["prompt"]}
            rows.append(row | {"words": words_of(vlm, line)})
    write_jsonl(Path(folder, RELIANCE_FILE), rows)


def words_of(vlm, line) -> list[dict]:
    """Return the words of the aligned model's answer to the picture of a line, with their nats."""
    text = line["answers"]["aligned"]["text"]
    if IMAGE_PLACEHOLDER in text:
        return []  # such an answer cannot be read by a model
    response_ids = encode_response(vlm.tokenizer, vlm.template, text)
    path = str(Path(line["folder"], line["image"]))
    reliances = token_reliance(vlm, [path], line["prompt"], response_ids)
    words = []
    for reliance in reliances:
        nats = round(reliance.nats, 4)
        words.append({"text": reliance.text, "nats": nats, "instead": reliance.instead})
    return words
