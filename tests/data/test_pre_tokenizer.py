"""Words: the known patterns by example, and the refusal of every other one."""

import json

import pytest
from golden_tokenizers import read_spec, write_checkpoint

from minialign.data.bpe import BytePairModel
from minialign.data.pre_tokenizer import GPT2_WORDS, LLAMA3_WORDS, QWEN2_WORDS, PreTokenizer
from minialign.data.tokenizer import Tokenizer
from minialign.utils.files import InputError

NO_MERGES = BytePairModel({"vocab": {"a": 0}, "merges": []})


def byte_level(*, use_regex):
    """Return a ByteLevel step."""
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def split_by(pattern, **changes):
    """Return a Split step."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {**split, "invert": False, **changes}


def digits(*, individual):
    """Return a Digits step."""
    return {"type": "Digits", "individual_digits": individual}


def sequence(*steps):
    """Return a pre-tokenizer of several steps."""
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    "spec, words",
    [
        (
            sequence(split_by(QWEN2_WORDS), byte_level(use_regex=False)),
            ["It", "'s", " ", "2", "0", "2", "4", "!\n", "  ", " Yes"],
        ),
        (
            sequence(split_by(LLAMA3_WORDS), byte_level(use_regex=False)),
            ["It", "'s", " ", "202", "4", "!\n", "  ", " Yes"],
        ),
        (
            sequence(split_by(GPT2_WORDS), byte_level(use_regex=False)),
            ["It", "'s", " 2024", "!", "\n  ", " Yes"],
        ),
        (byte_level(use_regex=True), ["It", "'s", " 2024", "!", "\n  ", " Yes"]),
        (
            sequence(digits(individual=True), byte_level(use_regex=True)),
            ["It", "'s", " ", "2", "0", "2", "4", "!", "\n  ", " Yes"],
        ),
        (
            sequence(digits(individual=False), byte_level(use_regex=True)),
            ["It", "'s", " ", "2024", "!", "\n  ", " Yes"],
        ),
    ],
)
def test_words_by_hand(spec, words):
    assert PreTokenizer(spec, NO_MERGES).split("It's 2024!\n   Yes", None) == words


@pytest.mark.parametrize(
    "step",
    [
        split_by(r"(?:[A-Za-z ]+)+!"),  # takes forever on letters without a "!"
        split_by("(a)|(b)"),  # its groups would be words of their own
        split_by(QWEN2_WORDS + "|x"),
        split_by(QWEN2_WORDS.replace("?i:", "?:")),
        split_by("[^\\P{L}]"),
        split_by("a("),
        split_by(""),
        split_by(QWEN2_WORDS, invert=True),
        split_by(QWEN2_WORDS, behavior="Removed"),
        {**split_by(QWEN2_WORDS), "pattern": {"String": " "}},
        {**split_by(QWEN2_WORDS), "pattern": {"Regex": ["a"]}},
        {"type": "Whitespace"},
        {"type": "Punctuation", "behavior": "Isolated"},
    ],
)
def test_other_patterns_are_refused_by_name(tmp_path, step):
    """No pattern of a file is run, so none of them can take forever or mean something else."""
    spec = read_spec("qwen2")
    spec["pre_tokenizer"]["pretokenizers"][0] = step

    with pytest.raises(InputError) as error:
        Tokenizer.load(write_checkpoint(tmp_path, spec))

    assert "tokenizer.json: pre-tokenizer " in str(error.value)
    if step["type"] == "Split":
        assert json.dumps(step, ensure_ascii=False) in str(error.value)
        assert "known: GPT-2, Qwen2, Llama 3" in str(error.value)


@pytest.mark.parametrize(
    "spec",
    [
        sequence(split_by(QWEN2_WORDS), split_by(GPT2_WORDS), byte_level(use_regex=False)),
        sequence(byte_level(use_regex=True), digits(individual=True)),
        byte_level(use_regex=False),
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        digits(individual=True),
    ],
)
def test_other_orders_of_steps_are_refused(spec):
    with pytest.raises(ValueError, match="pre-tokenizer "):
        PreTokenizer(spec, NO_MERGES)
