"""The normal form of a short answer, as the published scorer of TextVQA has it.

The scorer is that of Pythia and MMF. LLaVA's `m4c_evaluator.py` is a copy of it. Papers compare
its numbers, so each of its rules is kept on purpose. A rule that looks like a mistake is marked as
odd.
"""

import re

# Step 3 of `normalize_answer` removes these marks. Apostrophes and : $ % & # . * ~ | stay. The
# published list has the comma and the question mark too, but step 1 has removed those already.
MARKS = ';/[]"{}()=+\\_-><@`!'

# A full stop is removed unless a digit follows it: "3.5" stays a number. Odd: the scorer means to
# keep one after a digit too, but its look-behind is mistyped and never applies. So "7." is "7".
FULL_STOP = re.compile(r"\.(?!\d)")
# Odd: the scorer passes the flag re.UNICODE as the argument `count` of re.sub. Its value is 32, so
# no more than 32 full stops are removed.
MAX_FULL_STOPS = int(re.UNICODE)

NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = frozenset({"a", "an", "the"})

# The contractions of the published table: an ending, and the words before it. Some that one would
# expect are not in it, such as "it's" and "we'll".
CONTRACTION_ENDINGS = {
    "n't": """
        ai are ca could did does do had has have is might must need ought sha should was were wo
        would
    """,
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
}
OTHER_CONTRACTIONS = "ma'am o'clock 'twas y'all y'all'll y'all'd've 'ow's'at"


def _spellings_without_an_apostrophe() -> dict[str, str]:
    """Return {spelling: contraction}, where the spelling lacks an apostrophe: {"dont": "don't"}."""
    # 1. All contractions.
    contractions = OTHER_CONTRACTIONS.split()
    for ending, beginnings in CONTRACTION_ENDINGS.items():
        for beginning in beginnings.split():
            contractions.append(beginning + ending)

    # 2. Their spellings: "couldn't've" is also "couldnt've" and "couldn'tve".
    spellings = {}
    for contraction in contractions:
        for position, character in enumerate(contraction):
            if character == "'":
                spelling = contraction[:position] + contraction[position + 1 :]
                spellings[spelling] = contraction

    # 3. Odd: in the published table this line is the wrong way round.
    spellings["somebody'd"] = "somebodyd"
    return spellings


CONTRACTIONS = _spellings_without_an_apostrophe()


def normalize_answer(answer: str) -> str:
    """Return the normal form of an answer. Two answers agree if their normal forms are equal."""
    # 1. Odd: commas and question marks are removed without leaving a blank, so "one,two" is
    #    "onetwo". The "'s" becomes a word of its own, so "he's" is never found as a contraction.
    text = answer.lower()
    text = text.replace(",", "").replace("?", "")
    text = text.replace("'s", " 's")

    # 2. Line breaks and tabs are blanks. Those at the ends must go before the next step, in which
    #    a blank beside a mark counts.
    text = text.strip()
    text = text.replace("\n", " ").replace("\t", " ")

    # 3. and 4. Marks and full stops.
    text = _remove_marks(text)
    text = FULL_STOP.sub("", text, count=MAX_FULL_STOPS)

    # 5. Turn numbers into digits, remove articles, and add the missing apostrophe of contractions.
    words = []
    for word in text.split():
        word = NUMBERS.get(word, word)
        if word not in ARTICLES:
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


def _remove_marks(text):
    """Return a text in which each kind of mark is deleted, or replaced by blanks.

    Odd: a single mark beside a blank decides for all marks of its kind, so "ab-cd - ef" becomes
    "abcd  ef", but "ab-cd" becomes "ab cd". What counts is the text before any mark was replaced.
    """
    result = text
    for mark in MARKS:
        stands_beside_blank = f"{mark} " in text or f" {mark}" in text
        replacement = "" if stands_beside_blank else " "
        result = result.replace(mark, replacement)
    return result
