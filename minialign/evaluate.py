"""Hallucination measured: POPE, CHAIR with recall, colours, length and repeats, on a folder of pictures with annotations."""

import json
import re
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .adapters import load_adapter
from .subject import load_subject
from .cli import Parser, add_model_options, fresh, number, run
from .files import read_json, read_jsonl, require, write_json
from .images import check_pictures
from .parallel import spread
from .prompts import decode_response, encode_prompt, end_id
from .sampling import respond, share_prefix

SPLITS = ("random", "popular", "adversarial")


def says_yes(answer):
    """POPE's reading of an answer: before the first full stop, a word "No", "not" or "no" means no, anything else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def pope_scores(answers, labels):
    """POPE of booleans (said yes, is yes): accuracy, precision, recall, F1 of "yes", share of yes, and n."""
    hit = sum(a and b for a, b in zip(answers, labels))
    said, true, n = sum(answers), sum(labels), len(labels)
    precision, recall = hit / said if said else 0.0, hit / true if true else 0.0
    return {
        "accuracy": sum(a == b for a, b in zip(answers, labels)) / n,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hit else 0.0,
        "yes": said / n,
        "n": n,
    }


def _texts(value):
    return isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)


class Vocabulary:
    """The names to look for in a caption: each object's synonyms (up to several words) and the colours."""

    def __init__(self, raw, where):
        objects, colours = (
            (raw.get("objects"), raw.get("colours", [])) if isinstance(raw, dict) else (None, None)
        )
        whole = (
            isinstance(objects, dict)
            and objects
            and all(_texts(synonyms) and synonyms for synonyms in objects.values())
            and _texts(colours)
        )
        require(
            whole,
            f'{where}: no "vocabulary" with "objects": {{name: [synonyms]}} and, if any, "colours": [names]',
        )
        self.names = {
            tuple(synonym.lower().split()): name
            for name, synonyms in objects.items()
            for synonym in synonyms
        }
        self.colours, self.longest = set(map(str.lower, colours)), max(map(len, self.names))

    def mentions(self, caption):
        """[(object, colour or None)] in order; of overlapping names the longest counts, a colour stands just before the name."""
        words, found, place = re.findall(r"[\w'-]+", caption.lower()), [], 0
        while place < len(words):
            runs = (tuple(words[place : place + length]) for length in range(self.longest, 0, -1))
            known = next((run for run in runs if run in self.names), None)
            if known:
                found.append(
                    (
                        self.names[known],
                        words[place - 1] if place and words[place - 1] in self.colours else None,
                    )
                )
            place += len(known) if known else 1
        return found


COUNTS = (
    "mentions",
    "absent",
    "wrong",
    "found",
    "annotated",
    "coloured",
    "right",
    "words",
    "repeats",
)


def caption_counts(caption, objects, vocabulary):
    """What CHAIR and its companions count in one caption beside the annotated objects of its picture, in the order of COUNTS.

    Mentions and how many are of absent objects, whether there is one; annotated objects that are mentioned, and their number; colours said
    of annotated objects and how many are right; words; mentions of an object already mentioned.
    """
    colours = {
        thing["name"]: {
            other["colour"].lower() if other.get("colour") else None
            for other in objects
            if other["name"] == thing["name"]
        }
        for thing in objects
    }
    said = vocabulary.mentions(caption)
    names = [name for name, _ in said]
    absent = sum(name not in colours for name in names)
    of_colour = [
        colour in colours[name]
        for name, colour in said
        if colour and name in colours and colours[name] != {None}
    ]
    return (
        len(names),
        absent,
        absent > 0,
        len(set(names) & set(colours)),
        len(colours),
        len(of_colour),
        sum(of_colour),
        len(caption.split()),
        len(names) - len(set(names)),
    )


def rates(counts):
    """CHAIR_i, CHAIR_s, recall, colour accuracy, words and repeats from the `caption_counts` of captions.

    chair_i: absent mentions / mentions; chair_s: captions with an absent mention / captions; recall: distinct annotated
    objects mentioned / annotated; colour: right colours / colours said of annotated objects; words: mean a caption;
    repeats: mentions of an object already mentioned in the same caption / mentions.
    """
    c, n = dict(zip(COUNTS, map(sum, zip(*counts)))), len(counts)
    return {
        "chair_i": c["absent"] / max(1, c["mentions"]),
        "chair_s": c["wrong"] / n,
        "recall": c["found"] / max(1, c["annotated"]),
        "colour": c["right"] / max(1, c["coloured"]),
        "words": c["words"] / n,
        "repeats": c["repeats"] / max(1, c["mentions"]),
    }


def read_folder(folder):
    """An evaluation set (see `read_set`) from a folder with captions.json, pope_*.jsonl or both, and images/."""
    folder = Path(folder)
    captions = folder / "captions.json"
    pope = [
        folder / f"pope_{split}.jsonl"
        for split in SPLITS
        if (folder / f"pope_{split}.jsonl").exists()
    ]
    require(
        captions.exists() or pope,
        f"{folder}: neither captions.json nor pope_*.jsonl is in this folder",
    )
    return read_set(captions if captions.exists() else None, pope, folder / "images")


def _checked(rows, path, images, form, fits):
    """`rows` of a file, each of the given form and with its picture in the folder `images` (None: not looked for)."""
    require(isinstance(rows, list) and rows, f"{path}: no records; each is {form}")
    for number, row in enumerate(rows, 1):
        require(
            isinstance(row, dict) and isinstance(row.get("image"), str) and fits(row),
            f"{path}, record {number}: not of the form {form}; mend or remove it",
        )
        picture = Path(images or "", row["image"])
        require(
            images is None or picture.is_file(),
            f"{path}, record {number}: no picture {picture}; give its folder with --images",
        )
    return rows


def read_captions(path, images=None, *needed):
    """(Vocabulary, rows) of a captions.json; each row has an image, objects and the texts `needed`; an object a name, and perhaps colour and
    place. Raises BadInput."""
    raw, form = (
        read_json(path),
        ", ".join(f'"{name}": text' for name in ("image", *needed))
        + ', "objects": [{"name": text, and perhaps "colour": text, "place": text}]',
    )
    require(
        isinstance(raw, dict), f'{path}: not {{"vocabulary": ..., "captions": [{{{form}}}, ...]}}'
    )

    def fits(row):
        """Whether a row says what it must."""
        objects = row["objects"] if isinstance(row.get("objects"), list) else [None]
        named = all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in objects)
        told = named and all(
            isinstance(one.get(key), str | None) for one in objects for key in ("colour", "place")
        )
        return told and all(isinstance(row.get(name), str) for name in needed)

    return Vocabulary(raw.get("vocabulary"), path), _checked(
        raw.get("captions"), path, images, f"{{{form}}}", fits
    )


def read_set(captions, pope, images):
    """An evaluation set from its files, its pictures looked at: {"captions", "vocabulary", "pope": {split: rows}, "images"}. Raises BadInput."""

    def asked(row):
        """Whether a row is a question of POPE's."""
        return isinstance(row.get("text"), str) and row.get("label") in ("yes", "no")

    vocabulary, captioned = (
        (None, []) if captions is None else read_captions(captions, images, "prompt")
    )
    form = '{"image": text, "text": text, "label": "yes"|"no"}'
    splits = {
        path.stem.rpartition("pope_")[2]: _checked(read_jsonl(path), path, images, form, asked)
        for path in map(Path, pope)
    }
    require(
        len(splits) == len(pope),
        f"{', '.join(map(str, pope))}: two files of one split (what stands after pope_ in a name); give one of each",
    )
    check_pictures(
        Path(images, row["image"]) for rows in (captioned, *splits.values()) for row in rows
    )
    return {"captions": captioned, "vocabulary": vocabulary, "images": Path(images), "pope": splits}


@torch.no_grad()
def ask(subject, questions, title, max_new_tokens=256, contrast=0.0, slots=1 << 14):
    """{(paths, question): greedy answer}; the questions about the same pictures share a row, so the pictures are read once.

    `contrast`: see `sampling.respond`. At most 50 rows are read together, with about so many `slots` of picture vectors.
    """
    by_pictures, stops = {}, {end_id(subject.tokenizer, subject.template)}
    for paths, question in dict.fromkeys(questions):
        by_pictures.setdefault(paths, []).append(question)

    def answers(everything):
        """For each of the pictures the answers to its questions."""
        batch = max(
            1, min(50, slots // max(1, *(sum(map(subject.count, paths)) for paths in everything)))
        )
        for first in tqdm(range(0, len(everything), batch), title, leave=False):
            some = everything[first : first + batch]
            prompts = [
                [
                    encode_prompt(
                        subject.tokenizer, subject.template, ["<image>\n" * len(paths) + question]
                    )
                    for question in by_pictures[paths]
                ]
                for paths in some
            ]
            looked = iter(subject.look([path for paths in some for path in paths], batch=32))
            rows = [
                share_prefix(own, [next(looked) for _ in paths])
                for paths, own in zip(some, prompts)
            ]
            written = iter(respond(subject.model, rows, max_new_tokens, stops, contrast=contrast))
            yield from (
                [decode_response(subject.tokenizer, subject.template, next(written)) for _ in own]
                for own in prompts
            )

    found = spread(list(by_pictures), lambda own: list(answers(own)))
    return {
        (paths, question): text
        for (paths, asked), texts in zip(by_pictures.items(), found)
        for question, text in zip(asked, texts)
    }


def evaluate_set(subject, held, title="evaluate", contrast=0.0):
    """Scores of one evaluation set, in the form that evaluation.json has for it, and for each caption its `caption_counts`."""

    def asked(rows, field):
        """Pictures and question of each row."""
        return [((str(held["images"] / row["image"]),), row[field]) for row in rows]

    captions, pope = held["captions"], held["pope"]
    answers = ask(
        subject,
        [
            *asked(captions, "prompt"),
            *(key for rows in pope.values() for key in asked(rows, "text")),
        ],
        title,
        contrast=contrast,
    )
    counts = [
        caption_counts(answers[key], row["objects"], held["vocabulary"])
        for key, row in zip(asked(captions, "prompt"), captions)
    ]
    scores = rates(counts) if counts else {}
    scores["pope"] = {
        split: pope_scores(
            [says_yes(answers[key]) for key in asked(rows, "text")],
            [row["label"] == "yes" for row in rows],
        )
        for split, rows in pope.items()
    }
    return scores, counts


COLUMNS = (
    ("CHAIR_i", "chair_i"),
    ("CHAIR_s", "chair_s"),
    ("recall", "recall"),
    ("colour", "colour"),
    ("words", "words"),
    ("repeats", "repeats"),
)


def table(results):
    """The Markdown table of {arm: {set: scores}}: shares in per cent, POPE as accuracy (yes-ratio) by split."""
    sets = list(dict.fromkeys(name for arm in results.values() for name in arm))
    lines = [
        "| set | model | "
        + " | ".join(title for title, _ in COLUMNS)
        + " | POPE random (yes) | popular (yes) | adversarial (yes) |",
        "|" + "---|" * (len(COLUMNS) + 5),
    ]
    for name in sets:
        for arm, scores in (
            (arm, sets_of[name]) for arm, sets_of in results.items() if name in sets_of
        ):
            cells = [
                (f"{scores[key]:.1f}" if key == "words" else f"{100 * scores[key]:.1f}")
                if key in scores
                else ""
                for _, key in COLUMNS
            ]
            pope = [scores["pope"].get(split) for split in SPLITS]
            cells += [
                f"{100 * one['accuracy']:.1f} ({100 * one['yes']:.0f})" if one else ""
                for one in pope
            ]
            lines.append(f"| {name} | {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """The command line: a table on standard error, the JSON on standard output or in --out."""
    parser = Parser(prog="python -m minialign.evaluate", description=__doc__)
    add_model_options(parser, required=True)
    parser.add_argument("--adapter", metavar="DIR", help="adapter to put on the model")
    parser.add_argument(
        "--pope",
        nargs="+",
        default=[],
        metavar="FILE",
        help="POPE files, JSONL, named pope_SPLIT.jsonl",
    )
    parser.add_argument(
        "--captions",
        metavar="FILE",
        help="annotated objects, in the form of data/tiny/final/*/captions.json",
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument(
        "--contrast",
        type=number(float, 0),
        default=0.0,
        metavar="A",
        help="decode from (1 + A) log p(.|picture) - A log p(.|picture hidden)",
    )
    parser.add_argument("--out", metavar="FILE", help="where the JSON goes; none: standard output")
    options = parser.parse_args()
    held = read_set(options.captions, options.pope, options.images)
    if not held["captions"] and not held["pope"]:
        parser.error("nothing to measure: give --pope FILE... or --captions FILE")
    if options.out:
        fresh(options.out)
    subject = load_subject(options.model, options.template, options.dtype, options.device)
    if options.adapter:
        load_adapter(subject.model, options.adapter)
    scores, _ = evaluate_set(subject, held, contrast=options.contrast)
    print(table({"model": {Path(options.images).parent.name or "set": scores}}), file=sys.stderr)
    if options.out:
        write_json(options.out, scores)
    else:
        print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    sys.exit(run(main))
