"""Show how BDHS made the rejected answers: what the model still saw, and what it wrote."""

import functools
from collections import Counter
from pathlib import Path

from minialign.data.fields import as_list
from minialign.data.image_processor import ImageProcessor
from minialign.models.config_json import read_config
from minialign.pairs.contact_sheet import describe_sampling, draw_seen_image
from minialign.pairs.sentences import split_sentences
from minialign.report.charts import Bar, bar_chart, figure
from minialign.report.markup import Markup, element, join
from minialign.report.method_words import describe_hidden_image
from minialign.report.number_texts import counted
from minialign.report.run_files import RunFiles, is_tiny_file
from minialign.report.thumbnails import image_element, missing_picture
from minialign.utils.files import InputError, check

NUM_SHOWN = 6

MEANING = (
    "BDHS (Bias-Driven Hallucination Sampling) lets the model write its own bad answers, with "
    "{hidden_image}. {task} The less the model sees, the more it writes what language alone makes "
    "likely: fluent, and often not in the picture. Training then prefers the chosen answer (from "
    "the data) to this rejected one, so the model learns to look."
)
TINY_CAPTIONS = (
    "A chosen answer is not always true: the captions of the tiny world are wrong on purpose, at a "
    "known rate (data/README.md)."
)
GUIDED = "Every sentence of the chosen answer is cut at a random word, and the model completes it."
UNGUIDED = "The model then answers the question anew."
ROUNDS = (
    "An answer that says nearly the same as the chosen one teaches nothing. It is drawn again, in "
    "up to {rounds} rounds."
)
LAST_ROUND = " The last round writes a whole answer freely."


def pairs_section(run: RunFiles, num_shown: int = NUM_SHOWN) -> Markup:
    """Return the first pairs that BDHS sampled. The section is empty for a run without them."""
    if not run.pairs:
        return join()
    parts = [element("h2", "Where the rejected answers come from"), *explanation(run)]
    parts.append(rounds_figure(run))
    parts.append(element("h3", "The first pairs"))
    parts.append(legend(run.pairs[0]))
    cards = [pair_card(run, pair) for pair in run.pairs[:num_shown]]
    parts.append(element("div", *cards, class_="grid wide"))
    return join(*parts)


def explanation(run: RunFiles) -> list[Markup]:
    """Explain BDHS, as the run used it."""
    settings = run.settings
    hidden_image = describe_hidden_image(settings)
    task = UNGUIDED if settings.get("unguided") else GUIDED
    paragraphs = [element("p", MEANING.format(hidden_image=hidden_image, task=task))]
    num_rounds = settings.get("rounds", 1)
    if num_rounds > 1:
        rounds = ROUNDS.format(rounds=num_rounds)
        if find_free_round(settings) is not None:
            rounds += LAST_ROUND
        paragraphs.append(element("p", rounds))
    if any(is_tiny_file(path) for path in settings.get("data") or []):
        paragraphs.append(element("p", TINY_CAPTIONS))
    return paragraphs


def find_free_round(settings) -> int | None:
    """Return which round writes a whole answer freely, where the others complete sentences."""
    num_rounds = settings.get("rounds", 1)
    if num_rounds == 1 or settings.get("unguided"):
        return None
    return num_rounds


def rounds_figure(run) -> Markup:
    """Return how many records settled in which round, and how many have nothing to learn from.

    Each record counts once: in its round, or as left out.
    """
    used = [pair for pair in run.pairs if pair["rejected"] not in ("", pair["chosen"])]
    records_of_round = Counter(pair["rounds"] for pair in used if "rounds" in pair)
    num_left_out = len(run.pairs) - len(used)
    title = "Rounds until an answer differed"
    words = rounds_text(records_of_round, len(used), num_left_out)
    if not records_of_round:
        return figure(title, words)
    bars = rounds_bars(records_of_round, num_left_out, find_free_round(run.settings))
    return figure(title, words, bar_chart([("", bars)], "%", highest=100))


def rounds_bars(records_of_round, num_left_out, free_round) -> list[Bar]:
    """Return a bar for each round, and one for the records that are left out, if there are any."""
    num_records = records_of_round.total() + num_left_out
    bars = []
    for number in sorted(records_of_round):
        name = f"round {number} (free)" if number == free_round else f"round {number}"
        bars.append(Bar(name, 100 * records_of_round[number] / num_records, "color-first"))
    if num_left_out > 0:
        bars.append(Bar("left out", 100 * num_left_out / num_records, "color-second"))
    return bars


def rounds_text(records_of_round, num_used, num_left_out) -> str:
    """Say in numbers of records what the bars show in percent."""
    records = counted(num_used + num_left_out, "record")
    numbers = [f"{records_of_round[i]:,} from round {i}" for i in sorted(records_of_round)]
    rounds = ", ".join(numbers) or "their rounds are not known"
    sentences = [f"Training uses {num_used:,} of {records}: {rounds}."]
    if num_left_out > 0:
        sentences.append(
            f"It leaves out {num_left_out:,}, whose last answer was empty or equal to the chosen "
            "one."
        )
    if numbers:
        sentences.append("The bars show this in percent of all.")
    return " ".join(sentences)


def legend(pair) -> Markup:
    """Explain the picture and the marks of a pair."""
    seen = "The picture is as the model saw it. "
    if "visible" in pair:
        seen = "The picture is as the model saw it: only the framed patches were visible. "
    return element(
        "p",
        seen,
        element("span", "✂", class_="cut"),
        " is where a sentence was cut. ",
        element("span", "Dashed and italic", class_="written"),
        " is what the model wrote. Similarity is the cosine of both answers, 1 if they say the "
        "same.",
        class_="small",
    )


def pair_card(run: RunFiles, pair) -> Markup:
    """Return one pair: the picture as the model saw it, the question, and the two answers."""
    *_, last_turn = as_list(pair["prompt"])
    question = last_turn.replace("<image>", "").strip()
    parts = [
        element("p", describe_sampling(pair), class_="muted small"),
        *system_text(pair),
        element("p", element("span", "asked: ", class_="name"), question, class_="small said"),
        answer_row("chosen (from the data)", chosen_pieces(pair)),
        answer_row("rejected (sampled)", rejected_pieces(pair)),
    ]
    image = seen_picture(run, pair)
    return element("div", image, element("div", *parts), class_="card beside")


def system_text(pair) -> list[Markup]:
    """Return the system text under which a pair was sampled, as a paragraph if it has one."""
    if pair.get("system") is None:
        return []
    name = element("span", "system text: ", class_="name")
    return [element("p", name, str(pair["system"]), class_="small said")]


def answer_row(name, pieces) -> Markup:
    """Return one of the two answers with its name."""
    said = element("span", *pieces, class_="said")
    return element("div", element("span", f"{name}: ", class_="name"), said, class_="answer")


def chosen_pieces(pair) -> list:
    """Return the chosen answer in pieces, with scissors where its sentences were cut."""
    pieces = []
    position = 0
    for cut in pair.get("cuts", []):
        pieces.append(pair["chosen"][position:cut])
        pieces.append(element("span", "✂", class_="cut"))
        position = cut
    pieces.append(pair["chosen"][position:])
    return pieces


def rejected_pieces(pair) -> list:
    """Return the rejected answer in pieces, with what the model wrote marked.

    The completions stand in it in their order, each behind what was kept of its sentence. A
    completion that is not found as it was written stays unmarked.
    """
    text = pair["rejected"]
    if not pair.get("cuts"):  # the last round writes the whole answer
        return [element("span", text, class_="written")] if text else ["(empty)"]
    pieces = []
    position = 0
    sentences = split_sentences(pair["chosen"])
    for (start, _), cut, completed in zip(sentences, pair["cuts"], pair["completed"], strict=False):
        # A sentence keeps what stood before its cut. That is shorter where a Yes became a No.
        num_kept = max(0, cut - start - len("Yes"))
        written = completed.strip()
        found = text.find(written, position + num_kept)
        if not written or found < 0:
            continue
        pieces.append(text[position:found])
        pieces.append(element("span", written, class_="written"))
        position = found + len(written)
    pieces.append(text[position:])
    return pieces


# --- the picture


def seen_picture(run: RunFiles, pair) -> Markup:
    """Return the picture of a pair as the model saw it, or a word if it cannot be drawn."""
    try:
        path = pair_image_path(run, pair)
        config, image_processor = read_image_settings(run.settings["model"])
        image = draw_seen_image(path, pair, image_processor, config=config)
    except InputError as error:
        return missing_picture(error)
    return image_element(image, f"picture of record {pair['id']} as the model saw it")


def pair_image_path(run: RunFiles, pair) -> Path:
    """Return where the first image of a pair is. Raise InputError if it is nowhere, or in two."""
    name = str(as_list(pair["image"])[0])
    if run.settings.get("images"):
        folders = [Path(run.settings["images"])]
    else:
        folders = [Path(file).parent / "images" for file in run.settings.get("data") or []]
    paths = [folder / name for folder in dict.fromkeys(folders)]
    existing = [path for path in paths if path.is_file()]
    check(existing, f"{name} is not there any more")
    check(len(existing) == 1, f"{name} is in several folders of the data")
    return existing[0]


@functools.cache
def read_image_settings(model_folder):
    """Return the config of a checkpoint and its image processor. The weights are not read."""
    config, _ = read_config(model_folder)
    image_processor = ImageProcessor.load(
        model_folder,
        config.vision.image_size,
        config.vision.patch_size,
        config.image_grid_pinpoints,
    )
    return config, image_processor
