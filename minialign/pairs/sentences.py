"""The sentences of a response: BDHS cuts them, and joins what the model makes of them (Alg. 1)."""

import re
from dataclasses import dataclass

import torch

# The paper's pattern with a word boundary, since "Nothing" and "North" are no answers.
YES_NO = re.compile(r"\s*(Yes|yes|No|no)\b")
OPPOSITE = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}
# Up to the stops that end a word, or to the end of the text. "3.5" holds no such stop.
SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|$)", re.DOTALL)
INNER_WORD_START = re.compile(r"(?<=\s)\S")


@dataclass
class CutSentence:
    """A sentence of the chosen response and its cut. Positions count characters of the response."""

    start: int
    end: int
    cut: int
    kept: str  # the text before the cut, in which yes or no may have been swapped


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each sentence in characters, without the white space between."""
    return [match.span() for match in SENTENCE.finditer(text)]


def choose_cut(text: str, start: int, end: int, *, generator: torch.Generator) -> CutSentence:
    """Cut the sentence text[start:end] before a random word other than its first.

    A sentence of one word is cut before that word, or behind it if it answers yes or no. An answer
    at the front is swapped for its opposite with probability 1/2.
    """
    coin, position = torch.rand(2, generator=generator).tolist()
    answer = YES_NO.match(text, start, end)
    # 1. Choose one of the possible cuts.
    cuts = [start + match.start() for match in INNER_WORD_START.finditer(text[start:end])]
    if not cuts:
        cuts = [answer.end(1) if answer else start]
    cut = cuts[int(position * len(cuts))]
    # 2. Keep what stands before it, with the answer or its opposite.
    kept = text[start:cut]
    if answer and coin < 0.5:
        kept = OPPOSITE[answer[1]] + text[answer.end(1) : cut]
    return CutSentence(
        start=start,
        end=end,
        cut=cut,
        kept=kept.rstrip(),
    )


def join_sentences(chosen: str, sentences: list[CutSentence], completions: list[str]) -> str:
    """Join kept parts and completions to the rejected response, as in Algorithm 1.

    A completion ends at its first full stop. The white space between the sentences is that of
    `chosen`.
    """
    joined = ""
    previous_end = 0
    for sentence, completion in zip(sentences, completions, strict=True):
        # 1. The last token of a completion may hold more than the full stop.
        if "." in completion:
            completion = completion[: completion.index(".") + 1]
        # 2. Without a kept part, the white space before the sentence is enough.
        if not sentence.kept:
            completion = completion.lstrip()
        joined += chosen[previous_end : sentence.start] + sentence.kept + completion
        previous_end = sentence.end
    return joined.strip()
