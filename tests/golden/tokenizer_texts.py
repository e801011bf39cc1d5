"""The texts of the golden tokenizers: what they learn, what they encode, and two conversations.

They come from a fixed seed, Python's own documentation and its Unicode tables. So a run repeats
itself on one version of Python.
"""

import collections
import sys
import unicodedata
from pydoc_data import topics

# The same two-turn conversation as one string for each template. minialign must give the same ids
# for the turns, the answer and the template.
QUESTION_1 = "<image>\nWhat is this?"
ANSWER_1 = "A cat's  bed."
QUESTION_2 = "And {now}?\n"
ANSWER_2 = "Two dogs, 12345 birds."
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA3_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
CONVERSATIONS = {
    "vicuna": (
        f"USER: {QUESTION_1} ASSISTANT: {ANSWER_1}</s>USER: {QUESTION_2} ASSISTANT: {ANSWER_2}</s>"
    ),
    "vicuna_v1": (
        f"{VICUNA_SYSTEM} USER: {QUESTION_1} ASSISTANT: {ANSWER_1}</s>"
        f"USER: {QUESTION_2} ASSISTANT: {ANSWER_2}</s>"
    ),
    "mistral": (
        f"[INST] {QUESTION_1} [/INST] {ANSWER_1}</s>[INST] {QUESTION_2} [/INST] {ANSWER_2}</s>"
    ),
    "chatml": (
        "<|im_start|>system\nAnswer the questions.<|im_end|>"
        f"<|im_start|>user\n{QUESTION_1}<|im_end|>"
        f"<|im_start|>assistant\n{ANSWER_1}<|im_end|>"
        f"<|im_start|>user\n{QUESTION_2}<|im_end|>"
        f"<|im_start|>assistant\n{ANSWER_2}<|im_end|>"
    ),
    "qwen": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION_1}<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER_1}<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION_2}<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER_2}<|im_end|>"
    ),
    "llama3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA3_SYSTEM}<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION_1}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{ANSWER_1}<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION_2}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{ANSWER_2}<|eot_id|>"
    ),
}
# What goes wrong between words, tokens and images.
PIECES = [
    "cat",
    " cat",
    "cats",
    "big dog",
    " the",
    "The",
    "'s",
    "'S",
    "'ll",
    "'\u017f",
    "naïve",
    "e\u0301",
    "ﬁ",
    "Å",
    "한국어",
    "각",
    "中文",
    "。",
    "日本",
    "العربية",
    "עִבְרִית",
    "हिन्दी",
    "👩‍👩‍👧‍👦",
    "🇩🇪",
    "👍🏽",
    "☕️",
    "123",
    "4567890",
    "½",
    "Ⅷ",
    "٣",
    " ",
    "  ",
    "    ",
    "\t",
    "\n",
    "\n\n",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\u200b",
    "\x1c",
    "\x85",
    "\x00",
    "\x7f",
    "<image>",
    "<image>\n",
    "\n<image>",
    " <image> ",
    "<s>",
    "</s>",
    " </s>",
    "<unk>",
    "<pad>",
    "<mask>",
    " <mask> ",
    "<sep>",
    "<sep>  ",
    "<|im_start|>",
    "<|im_end|>\n",
    "<|eot_id|>",
    "<imag",
    "<0x41>",
    "▁",
    "▁▁",
    "▁a",
    "a▁b",
    "Ġ",
    "Ċ",
    ".",
    "...",
    "!?",
    "_",
    "-",
    "def f(x):",
    "https://a.b/c?d=e",
    "aaaaaaa",
    "https",
    "antidisestablishmentarianism",
    "ſ",
    "İ",
    "ǅ",
    "\ufeff",
    "\ufffd",
]


def training_text():
    """Return lines to learn tokens on: English, and a little of other scripts.

    Rare characters are left out here, because the trainer's own limit breaks ties at random.
    """
    lines = []
    for name in sorted(topics.topics):
        lines += topics.topics[name].splitlines()
    lines = lines[:6000]
    lines += [
        "What is in the picture? The assistant answers the user's question. "
        "Die Straße, el niño, 中文的图片 和 日本語のテキスト."
    ] * 40
    counts = collections.Counter("".join(lines))
    common_lines = []
    for line in lines:
        common_lines.append("".join(letter for letter in line if counts[letter] >= 30))
    return common_lines


def characters_by_category():
    """Return the assigned characters of each Unicode category, in the order of their names."""
    by_category = {}
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category not in ("Cn", "Cs", "Co"):
            by_category.setdefault(category, []).append(chr(code))
    by_category["Co"] = ["\ue000", "\uf8ff", "\U000f0000"]  # some for private use
    return {category: by_category[category] for category in sorted(by_category)}


def sample_lines(rng):
    """Return at least 2,000 lines: characters of every category, and mixtures of PIECES."""
    # 1. Characters of one category, alone and with something between them.
    by_category = characters_by_category()
    lines = []
    for characters in by_category.values():
        for _ in range(24):
            letters = rng.sample(characters, min(6, len(characters)))
            separator = rng.choice(["a", " ", "1", "ß ", "中"])
            lines.append("".join(letters))
            lines.append(separator.join(letters[:4]))

    # 2. Characters of all categories.
    all_characters = []
    for characters in by_category.values():
        all_characters += characters
    for _ in range(150):
        lines.append("".join(rng.choices(all_characters, k=8)))

    # 3. Pieces, together and alone.
    for _ in range(900):
        count = rng.randint(1, 7)
        lines.append("".join(rng.choices(PIECES, k=count)))
    lines += PIECES

    # 4. Nothing, and much of the same.
    lines += ["", "a" * 300, " " * 100 + "x", "ab" * 100, "é" * 50]
    lines += ["<image>" * 20, "\n" * 30, "  \n  \n\t x"]
    return list(dict.fromkeys(lines))  # each once
