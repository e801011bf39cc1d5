"""The tokenizer: equal to the package `tokenizers` on thousands of lines; what is refused."""

import copy
import json
import re
import unicodedata

import pytest
from golden_tokenizers import (
    NAMES,
    golden_results,
    golden_tokenizer,
    read_spec,
    write_checkpoint,
)

from minialign.data.pre_tokenizer import WHOLE_TEXT
from minialign.data.tokenizer import Tokenizer
from minialign.utils.files import InputError

# --- equal to `tokenizers` ---


def is_known(line):
    """Return whether this Python's Unicode tables know all characters of a line."""
    return all(unicodedata.category(character) != "Cn" for character in line)


def test_golden_lines_cover_unicode():
    """There are at least 2,000 lines, with characters of every category but surrogates."""
    lines = golden_results()["lines"]
    covered = {unicodedata.category(character) for line in lines for character in line}
    every_category = {unicodedata.category(chr(code_point)) for code_point in range(0x110000)}

    assert len(lines) >= 2000
    assert covered >= every_category - {"Cn", "Cs"}


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_those_of_tokenizers(name):
    tokenizer = golden_tokenizer(name)
    num_compared = 0
    differing_lines = []
    for line, ids in zip(
        golden_results()["lines"], golden_results()["kinds"][name]["ids"], strict=True
    ):
        if is_known(line):
            num_compared += 1
            if tokenizer.encode(line) != ids:
                differing_lines.append(line)

    assert num_compared > 2000
    assert differing_lines == []


@pytest.mark.parametrize("name", NAMES)
def test_text_equals_that_of_tokenizers(name):
    """This holds for the ids of every line, and for random ids, some of them out of range."""
    tokenizer = golden_tokenizer(name)
    results = golden_results()["kinds"][name]

    for line, ids, text in zip(
        golden_results()["lines"], results["ids"], results["decoded"], strict=True
    ):
        # None stands for the line itself. False marks lines with a token that `tokenizers` prints
        # wrongly, see test_normalized_end_token_is_skipped.
        if text is False:
            continue
        expected = line if text is None else text
        assert tokenizer.decode(ids, skip_special=False) == expected

    for ids, text_without_special, text_with_special in results["random"]:
        assert tokenizer.decode(ids) == text_without_special
        assert tokenizer.decode(ids, skip_special=False) == text_with_special


@pytest.mark.parametrize("name", ["yi", "never", "llama3"])
def test_text_comes_back_from_its_ids(name):
    """This holds for tokenizers that put no "▁" of their own into the text.

    Lines with a "▁" of their own, or with tokens that take spaces along, are left out.
    """
    tokenizer = golden_tokenizer(name)
    for line in golden_results()["lines"]:
        if any(text in line for text in ("▁", "<mask>", "<sep>")):
            continue
        assert tokenizer.decode(tokenizer.encode(line), skip_special=False) == line


def test_normalized_end_token_is_skipped():
    """Older Vicuna files call </s> normalized, so it is only found after a space.

    Decoding skips it all the same. tokenizers 0.23 prints it.
    """
    tokenizer = golden_tokenizer("odd_added")
    end_id = 2

    assert end_id not in tokenizer.encode("end.</s>")
    assert end_id in tokenizer.encode("end. </s>")
    assert tokenizer.decode([*tokenizer.encode("end."), end_id]) == "end."


def test_encoding_word_by_word_equals_merging_the_whole_text():
    """Words can be cached. They are only used where no merge joins two of them."""
    tokenizer = golden_tokenizer("llama")
    without_words = copy.copy(tokenizer)
    without_words.pre_tokenizer = copy.copy(tokenizer.pre_tokenizer)
    without_words.pre_tokenizer.splitters = [re.compile(f"({WHOLE_TEXT})")]
    without_words.word_cache = {}
    splitters = without_words.pre_tokenizer.splitters

    assert tokenizer.pre_tokenizer.splitters != splitters
    assert golden_tokenizer("across").pre_tokenizer.splitters == splitters
    for line in golden_results()["lines"]:
        assert tokenizer.encode(line) == without_words.encode(line)


# --- special tokens ---


def test_special_ids(tmp_path):
    """The tokenizer's files name the special tokens, or else the model's files give their ids."""
    # 1. Names in tokenizer_config.json, and a BOS in the post-processor.
    tokenizer = Tokenizer.load(write_checkpoint(tmp_path / "a", read_spec("llama")))
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert tokenizer.pad == tokenizer.id_of("<pad>")
    assert tokenizer.size == 1 + max(tokenizer.tokens)
    assert tokenizer.encode("a", bos=True) == [1, *tokenizer.encode("a")]

    # 2. As in transformers, add_bos_token does not count: tokenizer.json decides. The first of
    # several end ids is the one that training scores, every one ends an answer.
    directory = write_checkpoint(
        tmp_path / "b",
        read_spec("llama"),
        tokenizer_config={"add_bos_token": False},
        generation_config={"eos_token_id": [7, 8]},
    )
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 7, None)
    assert tokenizer.end_ids == {7, 8}

    # 3. Nor does it switch a BOS on. An end id in text_config counts, too. Llama's -1 is no pad id.
    directory = write_checkpoint(
        tmp_path / "c",
        read_spec("yi"),
        tokenizer_config={"add_bos_token": True, "bos_token": "<s>"},
        config={"pad_token_id": -1, "text_config": {"eos_token_id": 2}},
    )
    tokenizer = Tokenizer.load(directory)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, 2, None)
    assert tokenizer.encode("a", bos=True) == tokenizer.encode("a")

    # 4. Without an end token there is no tokenizer.
    directory = write_checkpoint(tmp_path / "d", read_spec("llama"), tokenizer_config={})
    with pytest.raises(InputError, match="tokenizer.json: no end token"):
        Tokenizer.load(directory)


def test_text_of_one_token():
    """Here "▁" and "Ġ" are a space, byte tokens are their byte, and special tokens their name."""
    llama = golden_tokenizer("llama")
    qwen2 = golden_tokenizer("qwen2")

    assert llama.token_text(llama.id_of("▁the")) == " the"
    assert qwen2.token_text(qwen2.id_of("Ġthe")) == " the"
    assert llama.token_text(llama.id_of("<0x0A>")) == "\n"
    assert qwen2.token_text(qwen2.id_of("Ċ")) == "\n"
    assert llama.token_text(llama.id_of("<0xE2>")) == "\ufffd"
    assert llama.token_text(2) == "</s>"
    assert llama.token_text(99_999) == ""
    assert llama.id_of("no such token") is None


# --- refusals ---


def set_model_type(spec):
    spec["model"]["type"] = "WordPiece"


def remove_merges(spec):
    del spec["model"]["merges"]


def set_dropout(spec):
    spec["model"]["dropout"] = 0.1


def add_merge_of_unknown_token(spec):
    spec["model"]["merges"].append(["▁", "no such token"])


def remove_byte_token(spec):
    del spec["model"]["vocab"]["<0x41>"]


def set_normalizer(spec):
    spec["normalizer"] = {"type": "Lowercase"}


def set_pre_tokenizer(spec):
    spec["pre_tokenizer"] = {"type": "Whitespace"}


def set_metaspace_replacement(spec):
    spec["pre_tokenizer"]["replacement"] = "_"


def remove_decoder(spec):
    spec["decoder"] = None


def remove_model(spec):
    del spec["model"]


def set_post_processor(spec):
    spec["post_processor"] = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}


def add_token_behind_text(spec):
    spec["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})


def set_unknown_bos(spec):
    spec["post_processor"]["single"][0]["SpecialToken"]["id"] = "<bos>"


def set_empty_replacement(spec):
    spec["normalizer"]["normalizers"][1]["pattern"]["String"] = ""


def set_unknown_token(spec):
    spec["model"]["unk_token"] = "<nothing>"


def add_merge_of_three(spec):
    spec["model"]["merges"].append("a b c")


def add_empty_merge(spec):
    spec["model"]["merges"].append(["a", ""])


def empty_vocabulary(spec):
    spec["model"].update(vocab={}, merges=[], unk_token=None, byte_fallback=False)
    spec["added_tokens"] = []


def add_huge_id(spec):
    spec["added_tokens"].append(dict(spec["added_tokens"][0], content="<far>", id=10**12))


def add_empty_token(spec):
    spec["added_tokens"].append(dict(spec["added_tokens"][0], content="", id=900))


def set_id(token, token_id):
    """Return a change that gives a token of the vocabulary another id."""

    def change(spec):
        spec["model"]["vocab"][token] = token_id

    return change


def share_an_id(spec):
    spec["added_tokens"].append(dict(spec["added_tokens"][0], content="<twin>"))


def remove_a_flag(spec):
    del spec["added_tokens"][0]["rstrip"]


def contradict_an_id(spec):
    spec["added_tokens"].append(dict(spec["added_tokens"][0], content="a", id=900))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("llama", set_model_type, "model of type WordPiece"),
        ("llama", remove_merges, "model of type BPE"),
        ("llama", set_dropout, "dropout"),
        ("llama", add_merge_of_unknown_token, "no such token"),
        ("llama", remove_byte_token, "255 of the 256 byte tokens"),
        ("llama", set_normalizer, "normalizer Lowercase"),
        ("llama", set_pre_tokenizer, "pre-tokenizer .*Whitespace"),
        ("first", set_metaspace_replacement, "pre-tokenizer .*_"),
        ("llama", remove_decoder, "decoder null"),
        ("llama", remove_model, "not a complete tokenizer.json"),
        ("llama", set_post_processor, "post-processor RobertaProcessing"),
        ("llama", add_token_behind_text, "a token behind every text"),
        ("llama", set_unknown_bos, "begins a text with <bos>"),
        ("llama", set_empty_replacement, "normalizer Replace"),
        ("llama", set_unknown_token, "unk_token '<nothing>'"),
        ("llama", add_merge_of_three, "not a pair of tokens: 'a b c'"),
        ("llama", add_empty_merge, "not a pair of tokens"),
        ("llama", empty_vocabulary, "the vocabulary is empty"),
        ("llama", add_huge_id, "'<far>' has the id 1000000000000"),
        ("llama", add_empty_token, "added token 900 has no text"),
        ("llama", set_id("a", -1), "'a' has the id -1"),
        ("llama", set_id("a", 3.0), "'a' has the id 3.0"),
        ("llama", set_id("a", "3"), "'a' has the id '3'"),
        ("llama", set_id("a", None), "'a' has the id None"),
        ("llama", set_id("a", True), "'a' has the id True"),
        ("llama", set_id("a", 4), "have one id, 4"),
        ("llama", share_an_id, "'<unk>' and '<twin>' have one id, 0"),
        ("llama", contradict_an_id, "'a' has two ids"),
        ("llama", remove_a_flag, "added token '<unk>' needs 'rstrip', true or false"),
        (None, None, "not a complete tokenizer.json"),
    ],
)
def test_unsupported_tokenizers_are_refused(tmp_path, name, change, message):
    """One line names the file, what was found in it, and what is supported."""
    spec = []
    if name is not None:
        spec = read_spec(name)
        change(spec)
    directory = write_checkpoint(tmp_path, spec)

    with pytest.raises(InputError) as error:
        Tokenizer.load(directory)

    error.match(f"tokenizer.json: .*{message}.*; supported are BPE tokenizers")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("end_id", [-1, 2.0, "2", True, 10**12, [2, -1], [[2]], {"id": 2}])
def test_end_tokens_that_are_no_ids_are_refused(tmp_path, end_id):
    directory = write_checkpoint(
        tmp_path, read_spec("llama"), generation_config={"eos_token_id": end_id}
    )

    with pytest.raises(InputError, match="eos_token_id .* is no token id"):
        Tokenizer.load(directory)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="tokenizer.json: no such file"):
        Tokenizer.load(tmp_path)

    first_half = json.dumps(read_spec("llama"))[:5000]
    (tmp_path / "tokenizer.json").write_text(first_half, encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer.json: broken JSON"):
        Tokenizer.load(tmp_path)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InputError, match="surrogate"):
        golden_tokenizer("llama").encode("a\ud800")
