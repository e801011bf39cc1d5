"""Show a dozen pictures with what each variant said of them, chosen by a rule that is printed."""

import random
from pathlib import Path

from minialign.report.markup import Markup, element, join
from minialign.report.measures import count_absent, missed_objects
from minialign.report.number_texts import counted
from minialign.report.reliance_words import EXPLANATION, reliance_of, reliance_words
from minialign.report.run_files import VARIANTS, RunFiles
from minialign.report.thumbnails import picture

PICTURES_PER_GROUP = 4
SEED = 0

RULE = (
    f"Up to {PICTURES_PER_GROUP} pictures are chosen where wrong mentions fell most from base to "
    f"aligned, and up to {PICTURES_PER_GROUP} where they rose most. Equal changes are ordered by "
    f"missed objects. Up to {PICTURES_PER_GROUP} of all others are drawn at random (seed {SEED})."
)
GROUPS = ("Most improved", "Most harmed", "Drawn at random from the rest")


def pictures_section(run: RunFiles, per_group: int = PICTURES_PER_GROUP) -> Markup:
    """Return the pictures of a run with the answers of its variants."""
    parts = [element("h2", "What the models say")]
    if not run.captions:
        sentence = (
            "No answers were kept (captions.jsonl): the run measured no captions, or an earlier "
            "version made it."
        )
        return join(*parts, element("p", sentence, class_="muted"))
    compared = [line for line in run.captions if {"base", "aligned"} <= line["answers"].keys()]
    if not compared:
        sentence = "The aligned model has not described any picture yet."
        return join(*parts, element("p", sentence, class_="muted"))

    chosen = choose_pictures(compared, per_group)
    parts.append(element("p", describe_rule(run.captions, compared, per_group)))
    parts.append(legend())
    if run.reliance:
        parts.append(element("p", EXPLANATION, class_="small"))
    for group, lines in chosen.items():
        parts.append(element("h3", group))
        if not lines:
            parts.append(element("p", "There is no such picture.", class_="muted"))
        cards = [picture_card(run, line) for line in lines]
        parts.append(element("div", *cards, class_="grid wide"))
    return join(*parts)


def choose_pictures(lines: list[dict], per_group: int = PICTURES_PER_GROUP) -> dict:
    """Return {group: lines of captions.jsonl}: the most improved, the most harmed, a sample.

    Each group is chosen with PICTURES_PER_GROUP pictures, and its first `per_group` are returned.
    The run computed the words' reliance for the first ones, so smaller pages show those.
    """
    # 1. From both ends of the order.
    ordered = sorted(lines, key=change_of)
    improved = [line for line in ordered if change_of(line) < (0, 0)][:PICTURES_PER_GROUP]
    harmed = [line for line in reversed(ordered) if change_of(line) > (0, 0)][:PICTURES_PER_GROUP]

    # 2. A sample of all others, in their order.
    chosen = [*improved, *harmed]
    others = [line for line in lines if line not in chosen]
    sample_size = min(PICTURES_PER_GROUP, len(others))
    indices = random.Random(SEED).sample(range(len(others)), sample_size)
    sample = [others[i] for i in sorted(indices)]
    groups = [group[:per_group] for group in (improved, harmed, sample)]
    return dict(zip(GROUPS, groups, strict=True))


def change_of(line) -> tuple[int, int]:
    """Return how many more wrong mentions, and missed objects, the aligned model has."""
    num_absent = {}
    num_missed = {}
    for variant in ("base", "aligned"):
        num_absent[variant], _ = count_absent(line, variant)
        num_missed[variant] = len(missed_objects(line, variant))
    return (
        num_absent["aligned"] - num_absent["base"],
        num_missed["aligned"] - num_missed["base"],
    )


def describe_rule(lines, compared, per_group) -> str:
    """Say how the pictures were chosen, and of how many."""
    changes = [change_of(line)[0] for line in compared]
    num_fewer = sum(change < 0 for change in changes)
    num_more = sum(change > 0 for change in changes)
    num_same = len(compared) - num_fewer - num_more
    changes_text = (
        f"Of {counted(len(compared), 'picture')}, the aligned model has fewer wrong mentions than "
        f"the base on {num_fewer}, as many on {num_same}, and more on {num_more}."
    )
    sentences = [changes_text, RULE]
    if per_group < PICTURES_PER_GROUP:
        shown = counted(per_group, "picture")
        sentences.append(f"With several runs on the page, each group shows at most {shown}.")
    num_left_out = len(lines) - len(compared)
    if num_left_out > 0:
        left_out = counted(num_left_out, "picture")
        sentences.append(f"An answer of base or aligned is missing for {left_out}.")
    return " ".join(sentences)


def legend() -> Markup:
    """Explain the marks."""
    return element(
        "p",
        element("mark", "A thin green line", class_="right"),
        ": the object is in the picture. ",
        element("mark", "A wavy red line, bold", class_="wrong"),
        ": it is not. Objects that an answer does not mention are listed below it as missed. "
        "The lines judge the name of the object alone. A wrong color is listed below the answer, "
        "where colors are known. Places, repeats and grammar are not checked.",
        class_="small",
    )


def picture_card(run: RunFiles, line) -> Markup:
    """Return a picture beside the answers of all variants."""
    name = f"{line['set']}, {line['image']}"
    image = picture(image_path(run, line), f"picture {name}")
    parts = [element("p", name, class_="muted small")]
    prompt = element("span", line["prompt"], class_="said")
    parts.append(element("p", element("span", "asked: ", class_="name"), prompt, class_="small"))
    if not line["objects"]:
        parts.append(element("p", "No object is annotated.", class_="muted small"))
    for variant in VARIANTS:
        if variant in line["answers"]:
            parts.append(marked_answer(line, variant))
    words = reliance_of(run, line)
    if words:
        parts.append(reliance_words(words))
    return element("div", image, element("div", *parts), class_="card beside")


def image_path(run: RunFiles, line) -> Path:
    """Return where the image of a line is: in its folder, or in that of its evaluation set."""
    if "folder" in line:
        return Path(line["folder"], line["image"])
    for folder in run.settings.get("eval") or []:
        if Path(folder).name == line["set"]:
            return Path(folder, "images", line["image"])
    return Path(line["image"])


def marked_answer(line, variant) -> Markup:
    """Return the answer of a variant with its mentions marked, and what is wrong in words."""
    answer = line["answers"][variant]
    said = element("span", "(an empty answer)", class_="muted")
    if answer["text"]:
        said = element("span", *marked_text(answer["text"], answer["mentions"]), class_="said")
    return element(
        "div",
        element("span", f"{variant} ", class_="name"),
        said,
        element("div", describe_mistakes(line, variant), class_="muted small"),
        class_=f"answer answer-{variant}",
    )


def describe_mistakes(line, variant) -> str:
    """Return what is wrong in the answer of a variant: objects, colors, and what it misses."""
    absent = []
    wrong_colors = []
    for mention in line["answers"][variant]["mentions"]:
        if not mention["present"]:
            absent.append(mention["object"])
        if mention.get("right_colour") is False:
            wrong_colors.append(f"{mention['colour']} {mention['object']}")
    mistakes = {
        "not in the picture": absent,
        "wrong color": wrong_colors,
        "missed": missed_objects(line, variant),
    }
    remarks = [f"{kind}: {', '.join(names)}" for kind, names in mistakes.items() if names]
    return "; ".join(remarks) or "no object is missed, and no mention is wrong"


def marked_text(text: str, mentions) -> list:
    """Return the pieces of a text, each mention as an element that tells its verdict."""
    pieces = []
    position = 0
    for mention in mentions:
        start = mention["start"]
        end = mention["end"]
        if not position <= start < end <= len(text):
            continue  # it overlaps the one before
        verdict = "is in the picture" if mention["present"] else "is not in the picture"
        style = "right" if mention["present"] else "wrong"
        title = f"{mention['object']} {verdict}"
        pieces.append(text[position:start])
        pieces.append(element("mark", text[start:end], class_=style, title=title))
        position = end
    pieces.append(text[position:])
    return pieces
