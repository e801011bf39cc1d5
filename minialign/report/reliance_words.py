"""Show how much the picture adds to each word of an answer, in shades of color and in numbers."""

from minialign.report.markup import Markup, element
from minialign.report.number_texts import signed
from minialign.report.run_files import RunFiles

# From how many nats on a word has the next shade. At 0.7 the picture makes it twice as likely.
SHADES = (0.7, 1.5, 3.0, 6.0)

EXPLANATION = (
    "The first cards of each group end with the aligned model's answer word by word. The run "
    "computes this for no other card. The number below a word is what the picture adds to it, in "
    "nats: log p(word | picture) − log p(word | no picture), with the whole picture hidden. Only "
    f"words with {SHADES[0]} nats or more carry a number, or with −{SHADES[0]} or less. At 0.7 the "
    "picture makes the word twice as likely, and at 3 it makes it 20 times as likely. On blue the "
    "picture makes a word likelier, and on orange less likely. Blue does not mean right: the model "
    "can see the wrong thing. The word in italics is what the model would say here without the "
    "picture, where that is another word."
)


def reliance_of(run: RunFiles, line) -> list[dict]:
    """Return the words of the aligned model's answer to a line with their nats, if known."""
    for row in run.reliance:
        if is_about(row, line):
            return row["words"]
    return []


def is_about(row, line) -> bool:
    """Return whether a row of reliance.jsonl is about a line of captions.jsonl.

    An image may have several prompts. A row of an earlier version does not tell its prompt, so its
    words must be those of the answer.
    """
    if row["set"] != line["set"] or row["image"] != line["image"]:
        return False
    if "prompt" in row:
        return row["prompt"] == line["prompt"]
    words = "".join(word["text"] for word in row["words"])
    return words.strip() == line["answers"]["aligned"]["text"].strip()


def reliance_words(words: list[dict]) -> Markup:
    """Return the words of an answer, each in its shade, above its nats and its alternative."""
    # 1. Group what has no white space between, such as a word and its full stop.
    groups = []
    for word in words:
        text = word["text"]
        if not text.strip():
            continue  # the end of the answer has no text to show
        if text[0].isspace() or not groups:
            groups.append([])
        groups[-1].append(shaded_word(text.strip(), word["nats"], word["instead"].strip()))

    # 2. No line is broken inside a group.
    shown = [element("div", "word by word:", class_="name small")]
    for group in groups:
        shown += [element("span", *group, class_="group"), " "]
    return element("div", *shown, class_="answer answer-aligned")


def shaded_word(text, nats, instead) -> Markup:
    """Return one word in its shade. A word that does not depend on the picture has no note."""
    notes = []
    strength = sum(abs(nats) >= border for border in SHADES)
    if strength > 0:
        notes.append(element("small", signed(nats)))
    if instead and instead != text:
        notes.append(element("small", instead, class_="instead"))
    direction = "adds" if nats > 0 else "takes"
    style = f"word {direction}-{strength}" if notes else None
    title = f"{nats:+.2f} nats; without the picture: {instead or 'the end of the answer'}"
    return element("span", text, *notes, class_=style, title=title)
