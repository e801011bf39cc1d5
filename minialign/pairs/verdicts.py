"""What an MLLM is asked about two responses, and how the verdict is read from its answer.

A verdict is 0 if the first response is better, 1 if the second is better, and None for a tie or for
an answer that gives no verdict.
"""

import re

# What an MLLM is asked.
CRITERIA = (
    "Two responses were given to a question about the picture. Say which of them is better.\n"
    "First look for what is not in the picture: every object, attribute (such as a colour), "
    "number and relation in a response must be as the picture shows it; what the picture leaves "
    "unclear is better left out. The response with fewer such mistakes is better.\n"
    "If neither has fewer, the more helpful one is better: practical, to the point.\n"
    "Question: {question}\n"
    "Response 1: {first}\n"
    "Response 2: {second}\n"
    'Begin your answer with "Response 1" or "Response 2"; then give the reason.'
)

# "Response 1 is better", "response 2 is clearly the best".
CLEAR_PREFERENCE = re.compile(
    r"\bresponse\s*([12]) is (the |much |far |clearly |slightly )*(better|best)\b"
)
# "neither", "equally", "not any better", "isn't the worst".
NO_PREFERENCE = re.compile(
    r"\b(neither|equal|equally|tied|is a tie)\b"
    r"|(\b(not|no|never)|n['’]t) (any |much |the )?(better|best|worse|worst)\b"
)
# "Response 1 or Response 2" (from the request), "both Response 1 and 2".
NAMED_TOGETHER = re.compile(r"\bresponse\s*1 (and|or) (response\s*)?2\b")
# The first response that is named, with all that is said before the next one is named.
FIRST_NAMED = re.compile(r"(.*?\bresponse\s*([12])\b.*?)(\bresponse\s*[12]\b|$)")
# A fault that a response is said not to have: "fewer mistakes", "does not name a wrong color".
NO_FAULT = re.compile(
    r"(\b(no|not|never|without|few|fewer|less|avoids|free of)|n['’]t) (\w+ ){0,3}?"
    r"(errors?|mistakes?|hallucinat\w+|wrong|incorrect|inaccurate|false)\b"
)
# "right" is praise of a response only directly behind its name: things are on the right, too.
PRAISE = re.compile(
    r"\b(better|best|correct|correctly|accurate|accurately|precise|truthful|preferred|rightly"
    r"|response\s*[12] is right)\b"
)
BLAME = re.compile(
    r"\b(worse|worst|inferior|less|wrong|wrongly|incorrect|incorrectly|inaccurate|false"
    r"|falsely|mistakenly|hallucinat\w+)\b"
    # "not as good", "isn't right", "does not name the correct color".
    r"|(\bnot|n['’]t) (as|right|(\w+ ){0,3}?(good|correct|correctly|accurate|accurately|precise))\b"
    # "has errors", "contains a factual error", "more mistakes".
    r"|\b(has|contains|makes|more|some|several|an?|one) (\w+ )?(errors?|mistakes?)\b"
)
# Marks around or in the name of a response: **Response 1**, "Response 1", Response #1.
MARKS = re.compile(r"[\"“”*_`#]")


def higher_score(first_score, second_score) -> int | None:
    """Return the verdict for the response with the higher score. Equal scores are a tie."""
    if first_score == second_score:
        return None
    return int(second_score > first_score)


def swap_verdict(verdict: int | None) -> int | None:
    """Return the verdict on the same two responses in the other order."""
    if verdict is None:
        return None
    return 1 - verdict


def parse_verdict(answer: str) -> int | None:
    """Return the verdict that an MLLM's answer gives: 0, 1, or None if it gives none.

    The first sentence that names a response, or says that neither is better, decides. A sentence
    that names both at once decides only if it prefers one.
    """
    # A sentence ends with a full stop, an exclamation mark, a question mark or the line.
    for sentence in re.split(r"[.!?\n]", MARKS.sub("", answer.lower())):
        # 1. It says in so many words which one is better.
        preference = CLEAR_PREFERENCE.search(sentence)
        if preference:
            return int(preference[1]) - 1

        # 2. It says that neither is better.
        if NO_PREFERENCE.search(sentence):
            return None

        # 3. It names both at once, and prefers neither.
        if NAMED_TOGETHER.search(sentence):
            continue

        # 4. The response that it names first is the better one, unless it is blamed.
        named = FIRST_NAMED.match(sentence)
        if named:
            verdict = int(named[2]) - 1
            is_blamed = blames(NO_FAULT.sub("", named[1]))
            return swap_verdict(verdict) if is_blamed else verdict
    return None


def blames(text) -> bool:
    """Return whether a text blames the response that it names.

    Behind praise, blame is for the other one: "Response 1 is accurate, and the other is wrong".
    """
    blame = BLAME.search(text)
    return blame is not None and PRAISE.search(text[: blame.start()]) is None
