"""Show how much the image adds to each word of an answer."""

from minialign.report.markup import Markup, element
from minialign.report.run_files import RunFiles

STRONG_NATS = 3.0  # from here on a word has the full color: the image makes it 20 times as likely


def reliance_of(run: RunFiles, line) -> list[dict]:
    """Return the words of the aligned model's answer to an image with their nats, if known."""
    for row in run.reliance:
        if row.get("set") == line["set"] and row.get("image") == line["image"]:
            return row["words"]
    return []


def reliance_words(words: list[dict]) -> Markup:
    """Return words with a line below each, the stronger the more the image adds to the word.

    The number of nats stands below the word, so that no color has to be read.
    """
    shown = []
    for word in words:
        text = word["text"].strip()
        if not text:
            continue
        nats = word["nats"]
        strength = round(100 * min(1, abs(nats) / STRONG_NATS))
        color = "var(--aligned)" if nats > 0 else "var(--wrong)"
        title = f"{nats:+.2f} nats; without the picture: {word['instead'].strip() or 'the end'}"
        shown.append(
            element(
                "span",
                text,
                element("small", f"{nats:+.1f}".replace("-", "−")),
                class_="word",
                title=title,
                style=f"border-color: color-mix(in srgb, {color} {strength}%, transparent)",
            )
        )
        shown.append(" ")
    heading = "What the picture adds to each word of the aligned model, in nats: "
    return element("div", element("span", heading, class_="muted small"), *shown, class_="answer")
