"""Explain how BDHS samples one pair: the steps of Algorithm 1, round by round, as text."""

import json
import textwrap

from minialign.data.records import Record
from minialign.pairs.bdhs import BdhsSampler, RoundResult
from minialign.pairs.contact_sheet import differing_words
from minialign.pairs.sentences import YES_NO
from minialign.pairs.similarity import ModelEmbeddings
from minialign.utils.files import check
from minialign.utils.messages import printable

INDENT = 3 * " "  # of the text below the title of a step
MAX_LISTED = 12  # indices of visible image tokens
MAX_PATCHES_PER_SIDE = 32  # of a grid of image tokens that is drawn


def find_group(records: list[Record], record_id: str, group_size: int) -> tuple[list[Record], int]:
    """Return the group of records that a record is sampled in, and its index in this group.

    In its group, the record gets exactly the pair that `sample.py pairs` writes. Alone it would get
    the same pair up to rounding. Of several records with this id, the first one is taken.
    """
    ids = [record.id for record in records]
    check(
        record_id in ids,
        f"--explain {record_id}: none of the {len(ids)} records has this id; "
        f"give the id of one of them, such as {ids[0]}",
    )
    index = ids.index(record_id)
    index_in_group = index % group_size
    first = index - index_in_group
    return records[first : first + group_size], index_in_group


def explain_record(sampler: BdhsSampler, record: Record, width: int) -> list[str]:
    """Return the lines above the first round: the record, and what BDHS is going to do.

    width: the most characters of a line.
    """
    # 1. The record.
    images = ", ".join(str(path) for path in record.paths)
    lines = wrap(f"Record {record.id}, image {images}", width)
    if record.system is not None:
        lines += ["", *wrap(record.system, width, label="System:   ")]
    lines += ["", *wrap(record.question, width, label="Question: ")]
    lines += ["", *wrap(record.chosen, width, label="Chosen:   "), ""]

    # 2. The algorithm.
    config = sampler.config
    rounds = "1 round" if config.rounds == 1 else f"{config.rounds} rounds"
    lines += wrap(
        "BDHS (Algorithm 1 of arXiv 2407.02477) looks for a rejected answer: written like the "
        "chosen one, but with the mistakes of a model that hardly sees the image. It takes at most "
        f"{rounds} (N_BDHS). It ends with the first answer that differs enough: the "
        f"cosine similarity with the chosen answer must be below eps_s = {config.epsilon:g}. All "
        f"random numbers depend on the seed ({sampler.seed}), the record and the round alone.",
        width,
    )

    # 3. The similarity.
    similarity = f"The similarity is measured by {sampler.similarity.name}."
    if isinstance(sampler.similarity, ModelEmbeddings):
        similarity = (
            "The similarity is that of the model's own token embeddings. --similarity DIR takes a "
            "sentence encoder, as the paper does."
        )
    lines += ["", *wrap(similarity, width)]
    return lines


def explain_round(
    sampler: BdhsSampler, record: Record, result: RoundResult, width: int
) -> list[str]:
    """Return the lines that explain one round of Algorithm 1 for a record."""
    title = f"Round {result.round_number} of at most {sampler.config.rounds}"
    lines = ["", title, "-" * len(title), ""]
    lines += explain_mask(sampler, record, result, width)
    if sampler.completes_sentences(result.round_number):
        lines += explain_cuts(record, result, width)
        lines += explain_completions(sampler, result, width)
    else:
        lines += explain_whole_response(sampler, result, width)
    lines += explain_verdict(sampler, record, result, width)
    return lines


def explain_mask(sampler, record, result, width) -> list[str]:
    """Explain step 1: which image tokens the model sees, or how much noise is on the image."""
    # 1. BDHS-noise has no mask.
    config = sampler.config
    if config.noise:
        text = (
            f"Noise (Eq. 8 and 9). The image gets {config.noise} of 1,000 steps of forward "
            "diffusion. All image tokens stay visible (rho_th = 0)."
        )
        return [*wrap(text, width, label="1. "), ""]

    # 2. The visible tokens by their indices.
    visible = result.choices.visible
    num_tokens = sampler.vlm.total_image_tokens(record.paths)
    text = (
        "Mask (Eq. 6). Each image token gets a random number rho_i from 0 to 1, and stays visible "
        f"if rho_i >= rho_th = {config.rho:g}. Visible: {len(visible)} of {num_tokens}"
        f"{list_tokens(visible)}."
    )
    lines = wrap(text, width, label="1. ")

    # 3. The same as a picture, if there is a token for each patch of one whole image.
    model_config = sampler.vlm.model.config
    per_side = model_config.vision.patches_per_side
    has_grid = num_tokens == per_side**2 + model_config.extra_image_tokens
    if has_grid and len(record.paths) == 1 and per_side <= MAX_PATCHES_PER_SIDE:
        caption = "The image tokens as patches (# is visible, . is masked):"
        lines += ["", *wrap(caption, width, label=INDENT), ""]
        first_patch = model_config.extra_image_tokens
        patches = {token - first_patch for token in visible}
        lines += draw_grid(patches, per_side)
    return [*lines, ""]


def list_tokens(visible) -> str:
    """Return what follows the number of visible tokens in a sentence: the first of their indices.

    Nothing follows if no token is visible.
    """
    if not visible:
        return ""
    indices = ", ".join(str(token) for token in visible[:MAX_LISTED])
    if len(visible) > MAX_LISTED:
        indices += f" and {len(visible) - MAX_LISTED} more"
    return f", namely {indices}"


def draw_grid(visible_patches, per_side) -> list[str]:
    """Draw the patches of an image, from top left to bottom right: # is visible, . is masked."""
    lines = []
    for row in range(per_side):
        first = row * per_side
        marks = []
        for patch in range(first, first + per_side):
            marks.append("#" if patch in visible_patches else ".")
        lines.append(2 * INDENT + " ".join(marks))
    return lines


def explain_cuts(record, result, width) -> list[str]:
    """Explain step 2: where each sentence of the chosen response is cut, and what is kept."""
    lines = wrap(
        "Cut (Eq. 7). Each sentence of the chosen answer is cut before a random word, here at the "
        "bar. The part before the bar is kept.",
        width,
        label="2. ",
    )
    lines.append("")
    for i, sentence in enumerate(result.choices.sentences, start=1):
        before = record.chosen[sentence.start : sentence.cut].rstrip()
        after = record.chosen[sentence.cut : sentence.end]
        lines += wrap(f"{before} | {after}", width, label=f"{INDENT}({i}) ")
        # What is kept differs from the chosen answer only where yes became no, or no yes.
        yes_or_no = YES_NO.match(record.chosen, sentence.start, sentence.end)
        if yes_or_no:
            is_swapped = sentence.kept != before
            lines += explain_coin(yes_or_no[1], is_swapped, width)
    return [*lines, ""]


def explain_coin(word, is_swapped, width) -> list[str]:
    """Explain the yes/no rule for a sentence that begins with such a word."""
    outcome = "stays"
    if is_swapped:
        outcome = "is swapped for its opposite this time"
    text = f'"{word}" is swapped with probability 1/2 (Alg. 1, the yes/no rule). It {outcome}.'
    return wrap(text, width, label=7 * " ")


def explain_completions(sampler, result, width) -> list[str]:
    """Explain step 3: what the model writes in the place of each sentence's end."""
    lines = wrap(
        f"Complete (Eq. 7). The model reads {seen_image(sampler)}, the question and the chosen "
        "answer up to the cut, never its completions of earlier sentences. It writes on up to a "
        "full stop, here in brackets.",
        width,
        label="3. ",
    )
    lines.append("")
    rows = zip(result.choices.sentences, result.response.completions, strict=True)
    for i, (sentence, completion) in enumerate(rows, start=1):
        text = f"{sentence.kept} [{completion.strip()}]"
        lines += wrap(text, width, label=f"{INDENT}({i}) ")
    return [*lines, ""]


def explain_whole_response(sampler, result, width) -> list[str]:
    """Explain steps 2 and 3 of a round that writes a whole response."""
    reason = "The last of several rounds keeps nothing of the chosen answer (Alg. 1)."
    if not sampler.config.guided:
        reason = "Nothing of the chosen answer is kept (--unguided)."
    lines = wrap(f"No cut. {reason}", width, label="2. ")
    lines.append("")
    lines += wrap(
        f"Write a whole answer. The model reads {seen_image(sampler)} and the question.",
        width,
        label="3. ",
    )
    (text,) = result.response.completions
    return [*lines, "", *wrap(f"[{text.strip()}]", width, label=INDENT), ""]


def seen_image(sampler) -> str:
    """Return what the model sees of the image."""
    return "the noisy image" if sampler.config.noise else "the visible image tokens"


def explain_verdict(sampler, record, result, width) -> list[str]:
    """Explain step 4: how similar the new response is to the chosen one, and what follows."""
    # 1. The verdict, and what follows.
    bound = f"below eps_s = {sampler.config.epsilon:g}"
    if result.cosine < sampler.config.epsilon:
        verdict = f"This is {bound}: different enough. It becomes the rejected answer."
    elif result.is_taken:
        verdict = (
            f"This is not {bound}: too similar. But the last round is taken as it is. "
            "Its answer becomes the rejected answer."
        )
    else:
        next_round = result.round_number + 1
        verdict = f"This is not {bound}: too similar. Round {next_round} draws again."

    # 2. The new response, its similarity and the verdict.
    lines = wrap("Compare (Sec. 3.4.3). The answer of this round is", width, label="4. ")
    lines += ["", *wrap(result.response.text, width, label=INDENT), ""]
    cosine = f"Its cosine similarity with the chosen answer is {result.cosine:.6f}."
    lines += wrap(f"{cosine} {verdict}", width, label=INDENT)
    if result.is_taken and result.response.text == record.chosen:
        note = "It equals the chosen answer: DPO learns nothing from it."
        lines += wrap(note, width, label=INDENT)
    return lines


def explain_pair(pair: dict, width: int) -> list[str]:
    """Return the lines below the last round: both responses, with stars at words that differ."""
    chosen_words = pair["chosen"].split()
    rejected_words = pair["rejected"].split()
    chosen_differs, rejected_differs = differing_words(chosen_words, rejected_words)
    title = "The pair, with stars at words that differ"
    lines = ["", title, "-" * len(title), ""]
    lines += wrap(star_words(chosen_words, chosen_differs), width, label="Chosen:   ")
    lines += ["", *wrap(star_words(rejected_words, rejected_differs), width, label="Rejected: ")]
    lines += ["", *wrap("As a line of the file that `sample.py pairs` writes:", width), ""]
    lines.append(json.dumps(pair, ensure_ascii=False))
    return lines


def star_words(words, starred) -> str:
    """Join words to a text, with stars around those with these indices."""
    texts = list(words)
    for i in starred:
        texts[i] = f"*{words[i]}*"
    return " ".join(texts)


def wrap(text, width, label="") -> list[str]:
    """Break a text into lines. The label stands before the first, and spaces before the others."""
    wrapped = textwrap.wrap(
        printable(text, max_characters=len(text)),
        width,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_on_hyphens=False,
    )
    return wrapped or [label.rstrip()]
