"""Tokenizer and prompts: equal to `tokenizers` on thousands of lines, exact round trips, streaming, templates token for token, refusals."""

import copy
import functools
import json
import lzma
import random
import unicodedata
from pathlib import Path

import pytest

from minialign.data.chat_templates import (
    TEMPLATES,
    decode_response,
    default_template,
    encode_prompt,
    encode_response,
    end_token_id,
    render_turns,
)
from minialign.data.bpe import apply_merges
from minialign.data.stream_decoder import StreamDecoder
from minialign.data.tokenizer import Tokenizer
from minialign.utils.files import InputError

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
KINDS = (
    "llama",
    "odd_added",
    "yi",
    "first",
    "always",
    "never",
    "across",
    "unknown",
    "qwen2",
    "llama3",
)
CHAT_KINDS = tuple(
    kind for kind in KINDS if kind not in ("across", "unknown")
)  # those with <image> and the chat tokens


@functools.cache
def golden():
    return json.loads(lzma.decompress((GOLDEN / "expected.json.xz").read_bytes()))


def spec(kind):
    return json.loads((GOLDEN / f"{kind}.json").read_text(encoding="utf-8"))


def write(directory, kind_or_spec, **files):
    """A checkpoint directory with this tokenizer.json and the JSON files given by name."""
    directory.mkdir(exist_ok=True)
    made = spec(kind_or_spec) if isinstance(kind_or_spec, str) else kind_or_spec
    for name, value in (
        {
            "tokenizer": made,
            "tokenizer_config": {"eos_token": "</s>", "pad_token": {"content": "<pad>"}},
        }
        | files
    ).items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {kind: Tokenizer.load(write(tmp_path_factory.mktemp(kind), kind)) for kind in KINDS}


def test_samples_cover_unicode():
    """The golden lines number at least 2,000 and hold every category of assigned code points."""
    lines = golden()["lines"]
    assert len(lines) >= 2000
    held = {unicodedata.category(character) for line in lines for character in line}
    assert held >= {unicodedata.category(chr(code)) for code in range(0x110000)} - {"Cn", "Cs"}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_tokenizers(tokenizers, kind):
    """Every golden line gets exactly the ids of `tokenizers` (lines with characters this Python's Unicode does not know are left out)."""
    lines = [
        (line, ids)
        for line, ids in zip(golden()["lines"], golden()["kinds"][kind]["ids"], strict=True)
        if not any(unicodedata.category(character) == "Cn" for character in line)
    ]
    assert len(lines) > 2000
    assert [line for line, ids in lines if tokenizers[kind].encode(line) != ids] == []


@pytest.mark.parametrize("kind", KINDS)
def test_decode_equals_tokenizers(tokenizers, kind):
    """The ids of every golden line, and random ids with broken UTF-8 and ids out of range, decode to the text of `tokenizers`."""
    tokenizer, expected = tokenizers[kind], golden()["kinds"][kind]
    for line, ids, text in zip(
        golden()["lines"], expected["ids"], expected["decoded"], strict=True
    ):
        if text is not False:
            assert tokenizer.decode(ids, skip_special=False) == (line if text is None else text)
    for ids, skipped, kept in expected["random"]:
        assert (tokenizer.decode(ids), tokenizer.decode(ids, skip_special=False)) == (skipped, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_equals_decode(tokenizers, kind):
    """Pieces pushed one id at a time join to decode's text, and none ends in half a character."""
    tokenizer, rng = tokenizers[kind], random.Random(2)
    rows = rng.sample(golden()["kinds"][kind]["ids"], 300) + [
        row for row, _, _ in golden()["kinds"][kind]["random"]
    ]
    for ids in rows:
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(id) for id in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    emoji, stream = tokenizer.encode("x👍🏽y", after="text"), StreamDecoder(tokenizer)
    if kind != "unknown":
        assert (
            "".join(map(stream.push, emoji)) == "x👍🏽y" and len(emoji) > 8 and stream.flush() == ""
        )


def test_stream_holds_incomplete_characters(tokenizers):
    """The first bytes of a character are held back until it is whole, or given up as "\\ufffd" at the end."""
    tokenizer = tokenizers["llama3"]
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode("👍")
    assert [stream.push(id) for id in ids] == [""] * (len(ids) - 1) + ["👍"]
    assert stream.push(ids[0]) == "" and stream.flush() == "\ufffd"


@pytest.mark.parametrize("kind", ["yi", "never", "llama3"])
def test_round_trip(tokenizers, kind):
    """Kinds that put no ▁ of their own into the text give every line back (a ▁ in the text itself, and spaces taken by added tokens, apart)."""
    for line in golden()["lines"]:
        if "▁" not in line and "<mask>" not in line and "<sep>" not in line:
            assert (
                tokenizers[kind].decode(tokenizers[kind].encode(line), skip_special=False) == line
            )


def test_normalized_end_token_is_skipped(tokenizers):
    """Older Vicuna files call </s> normalized: it is found only after a space, yet decoding skips it (tokenizers 0.23 prints it)."""
    tokenizer = tokenizers["odd_added"]
    assert 2 not in tokenizer.encode("end.</s>") and 2 in tokenizer.encode("end. </s>")
    assert tokenizer.decode([*tokenizer.encode("end."), 2]) == "end."


def slow_merged(ids, merges):
    """The obvious twin of `merged`: scan for the lowest rank, join its leftmost pair, again."""
    ids = list(ids)
    while found := [
        (merges[pair][0], place)
        for place, pair in enumerate(zip(ids, ids[1:], strict=False))
        if pair in merges
    ]:
        place = min(found)[1]
        ids[place : place + 2] = [merges[ids[place], ids[place + 1]][1]]
    return ids


def test_merging_equals_its_slow_twin():
    """The queue over a linked list joins what a scan for the best pair joins, also where merges compete and overlap."""
    rng = random.Random(3)
    for _ in range(300):
        pairs = rng.sample([(left, right) for left in range(12) for right in range(12)], 30)
        merges = {
            pair: (rank, 12 + rank) for rank, pair in enumerate(pairs)
        }  # each joined symbol is new, as one text is one token
        merges |= {
            (12 + rank, right): (40 + rank, 60 + rank)
            for rank, right in enumerate(rng.choices(range(12), k=20))
        }
        ids = rng.choices(range(12), k=rng.randint(0, 40))
        assert apply_merges(ids, merges) == slow_merged(ids, merges)


@pytest.mark.parametrize("kind", ["llama", "across", "always", "qwen2"])
def test_long_lines_stay_linear(tokenizers, kind):
    """100,000 characters, repeated letters among them, encode with a few merge look-ups a byte (never their square) and round-trip."""
    for text in ("a" * 100_000, " " * 100_000, "ab" * 50_000, "é" * 50_000, "the cat " * 12_500):
        operations = 0

        class Counted(dict):
            def get(self, key, default=None):
                nonlocal operations
                operations += 1
                return dict.get(self, key, default)

        tokenizer = Tokenizer.__new__(Tokenizer)
        model = copy.copy(tokenizers[kind].bpe)
        model.merges = Counted(model.merges)
        vars(tokenizer).update(vars(tokenizers[kind]), word_cache={}, bpe=model)
        ids = tokenizer.encode(text, after="text")
        assert operations < 8 * len(text.encode())
        assert tokenizer.decode(ids, strip_prefix="") == text


def test_word_cache_changes_nothing(tokenizers):
    """Splitting at ▁ with a cache gives the ids of the whole chunk merged at once."""
    tokenizer = tokenizers["llama"]
    whole = Tokenizer.__new__(Tokenizer)
    vars(whole).update(vars(tokenizer), splitter=None, word_cache={})
    assert tokenizer.splitter is not None and tokenizers["across"].splitter is None
    assert [
        line for line in golden()["lines"] if tokenizer.encode(line) != whole.encode(line)
    ] == []


@pytest.mark.parametrize("kind", CHAT_KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_equal_the_literal_string(tokenizers, kind, template):
    """Prompt and answer, encoded apart, are the ids of the whole conversation written as one string, end tokens after every answer."""
    tokenizer, turns, answer = tokenizers[kind], golden()["turns"], golden()["answer"]
    ids = encode_prompt(tokenizer, template, turns) + encode_response(tokenizer, template, answer)
    if (
        kind == "odd_added" and TEMPLATES[template].end_token is None
    ):  # "bed.</s>" is not its end token in a string, see above; here it is
        assert ids.count(tokenizer.eos) == 2
    else:
        assert ids == golden()["kinds"][kind]["conversations"][template]
    assert ids.count(tokenizer.id_of("<image>")) == 1 and ids[-1] == end_token_id(
        tokenizer, template
    )


def test_one_turn_prompts_read_as_documented():
    """The prompts of the formats' documentation, letter for letter."""

    def text(template):
        return "".join(part for part, _ in render_turns(template, ["<image>\nWhy?"]))

    assert text("vicuna") == "USER: <image>\nWhy? ASSISTANT:"
    assert text("vicuna_v1") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
        "user's questions. USER: <image>\nWhy? ASSISTANT:"
    )
    assert text("chatml") == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhy?<|im_end|><|im_start|>assistant\n"
    )
    assert text("mistral") == "[INST] <image>\nWhy? [/INST]"
    assert text("qwen") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text("llama3") == (
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist the user "
        "with a variety of tasks using natural language.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(
    "kind", [kind for kind in CHAT_KINDS if kind != "odd_added"]
)  # its added "  " brings a ▁ with it
@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_come_back(tokenizers, kind, template):
    """decode_response undoes encode_response, also for answers that begin with spaces or line breaks; a stream gives the same text."""
    tokenizer = tokenizers[kind]
    for answer in ("Yes.", "", " two spaces  inside ", "\n- a list\n", "été 中文 👍🏽", "{braces}"):
        ids = encode_response(tokenizer, template, answer)
        stream = StreamDecoder(tokenizer, strip_prefix=TEMPLATES[template].response_prefix)
        expected = unicodedata.normalize("NFC", answer)
        assert (
            decode_response(tokenizer, template, ids)
            == expected
            == "".join(map(stream.push, ids)) + stream.flush()
        )


def test_answers_carry_the_space_of_their_template(tokenizers):
    """After "ASSISTANT:" an answer begins with a space token in every kind; after ChatML's line break with none, Llama's ▁ notwithstanding."""
    for kind in CHAT_KINDS:
        first = {
            template: tokenizers[kind].token_text(
                encode_response(tokenizers[kind], template, "Zoo")[0]
            )
            for template in TEMPLATES
        }
        assert all(
            first[template].startswith(" ") for template in ("vicuna", "vicuna_v1", "mistral")
        )
        assert all(first[template] == "Z" for template in ("chatml", "qwen", "llama3"))


def test_earlier_turns_are_what_was_scored(tokenizers):
    """An earlier answer stands in a later prompt with exactly the ids it was scored with, end token included."""
    for kind in CHAT_KINDS:
        for template in TEMPLATES:
            first = encode_prompt(tokenizers[kind], template, ["Q?"]) + encode_response(
                tokenizers[kind], template, "A b."
            )
            assert (
                encode_prompt(tokenizers[kind], template, ["Q?", "A b.", "R?"])[: len(first)]
                == first
            )


def test_special_ids(tmp_path):
    """BOS by add_bos_token, else by the post-processor; eos and pad by name, else by number, else refused (eos) or None (pad)."""
    tokenizer = Tokenizer.load(write(tmp_path / "a", "llama"))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.size) == (
        1,
        2,
        tokenizer.id_of("<pad>"),
        1 + max(tokenizer.tokens),
    )
    assert tokenizer.encode("a", bos=True) == [1, *tokenizer.encode("a")]
    tokenizer = Tokenizer.load(
        write(
            tmp_path / "b",
            "llama",
            tokenizer_config={"add_bos_token": False},
            generation_config={"eos_token_id": [7, 8]},
        )
    )
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (None, 7, None)
    assert tokenizer.encode("a", bos=True) == tokenizer.encode("a")
    tokenizer = Tokenizer.load(
        write(
            tmp_path / "c",
            "yi",
            tokenizer_config={"add_bos_token": True, "bos_token": "<s>"},
            config={"text_config": {"eos_token_id": 2}},
        )
    )
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    with pytest.raises(InputError, match="tokenizer.json: no end token"):
        Tokenizer.load(write(tmp_path / "d", "llama", tokenizer_config={}))


def test_token_text(tokenizers):
    """token_text shows ▁ and Ġ as a space, byte tokens as their byte, special tokens by name."""
    llama, qwen = tokenizers["llama"], tokenizers["qwen2"]
    assert llama.token_text(llama.id_of("▁the")) == " the" == qwen.token_text(qwen.id_of("Ġthe"))
    assert llama.token_text(llama.id_of("<0x0A>")) == "\n" == qwen.token_text(qwen.id_of("Ċ"))
    assert (
        llama.token_text(llama.id_of("<0xE2>")) == "\ufffd"
        and llama.token_text(2) == "</s>"
        and llama.token_text(99_999) == ""
    )
    assert llama.id_of("no such token") is None


def broken(kind, change):
    made = spec(kind)
    change(made)
    return made


@pytest.mark.parametrize(
    "made, said",
    [
        (
            broken("llama", lambda made: made["model"].update(type="WordPiece")),
            "model of type WordPiece",
        ),
        (broken("llama", lambda made: made["model"].pop("merges")), "model of type BPE"),
        (broken("llama", lambda made: made["model"].update(dropout=0.1)), "dropout"),
        (
            broken("llama", lambda made: made["model"]["merges"].append(["▁", "no such token"])),
            "no such token",
        ),
        (
            broken("llama", lambda made: made["model"]["vocab"].pop("<0x41>")),
            "255 of the 256 byte tokens",
        ),
        (
            broken("llama", lambda made: made.update(normalizer={"type": "Lowercase"})),
            "normalizer Lowercase",
        ),
        (
            broken("llama", lambda made: made.update(pre_tokenizer={"type": "Whitespace"})),
            "pre-tokenizer .*Whitespace",
        ),
        (
            broken("first", lambda made: made["pre_tokenizer"].update(replacement="_")),
            "pre-tokenizer .*_",
        ),
        (
            broken(
                "qwen2",
                lambda made: made["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
                    Regex="[^\\P{L}]"
                ),
            ),
            r"regex with \\P\{L\}",
        ),
        (
            broken(
                "qwen2",
                lambda made: made["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
                    Regex="a("
                ),
            ),
            "missing \\)",
        ),
        (broken("llama", lambda made: made.update(decoder=None)), "decoder null"),
        (broken("llama", lambda made: made.pop("model")), "not a complete tokenizer.json"),
        ([], "not a complete tokenizer.json"),
    ],
)
def test_unsupported_tokenizers_are_refused(tmp_path, made, said):
    """What is not supported, or not a tokenizer, is refused in one line with the file, what was found and what is supported."""
    with pytest.raises(
        InputError, match=f"tokenizer.json: .*{said}.*; supported are BPE tokenizers"
    ) as raised:
        Tokenizer.load(write(tmp_path, made))
    assert "\n" not in str(raised.value)


def test_missing_and_cut_files_are_refused(tmp_path, tokenizers):
    """A missing or truncated tokenizer.json is an error that names it; text with half a surrogate pair is one, too."""
    with pytest.raises(InputError, match="tokenizer.json: no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec("llama"))[:5000], encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer.json: broken JSON"):
        Tokenizer.load(tmp_path)
    with pytest.raises(InputError, match="surrogate"):
        tokenizers["llama"].encode("a\ud800")


def test_bad_conversations_are_refused(tokenizers):
    """Turns that end with an answer, <image> in an answer or without a token for it, a missing end token."""
    llama, across = tokenizers["llama"], tokenizers["across"]
    for call in (
        lambda: encode_prompt(llama, "vicuna", ["Q", "A"]),
        lambda: encode_prompt(llama, "vicuna", []),
        lambda: encode_response(llama, "vicuna", "An <image>."),
        lambda: encode_prompt(across, "vicuna", ["<image>\nQ"]),
    ):
        with pytest.raises(InputError):
            call()
    with pytest.raises(InputError, match="--template"):
        end_token_id(across, "qwen")


def test_default_template(tmp_path):
    """The template follows the checkpoint's chat template, else its vocabulary, else its model types, else it is asked for."""

    def chosen(kind, config, drop=(), **files):
        made = spec(kind)
        made["added_tokens"] = [
            token for token in made["added_tokens"] if token["content"] not in drop
        ]
        return default_template(write(tmp_path, made, **files), config)

    chat = ("<|im_start|>", "<|eot_id|>")
    llava = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    assert (
        chosen("llama", llava, chat)
        == "vicuna"
        == chosen("llama", {"model_type": "llava_next", "text_config": {}}, chat)
    )
    assert (
        chosen(
            "llama", {"model_type": "llava_next", "text_config": {"model_type": "mistral"}}, chat
        )
        == "mistral"
    )
    assert chosen("llama", llava) == "llama3"
    assert chosen("llama", llava, ("<|eot_id|>",)) == "chatml"
    assert (
        chosen(
            "qwen2",
            {"model_type": "llava_onevision", "text_config": {"model_type": "qwen2"}},
            ("<|eot_id|>",),
        )
        == "qwen"
    )
    for config in (
        {"model_type": "llava", "text_config": {"model_type": "mistral"}},
        {"model_type": "gpt2"},
        {},
    ):
        with pytest.raises(InputError, match="--template"):
            chosen("llama", config, chat)
    hub = "{{ message['role'].upper() + ': '}}{{ '<image>\n' }}{{ 'ASSISTANT:' }}"
    assert chosen("llama", llava, chat, chat_template={"chat_template": hub}) == "vicuna"
    assert (
        chosen(
            "llama",
            llava,
            chat,
            chat_template={"chat_template": "A chat between a curious user and" + hub},
        )
        == "vicuna_v1"
    )
    (tmp_path / "chat_template.jinja").write_text("[INST]")
    assert chosen("llama", llava, chat) == "mistral"
    (tmp_path / "chat_template.jinja").write_text("Human: Bot:")
    with pytest.raises(InputError, match="--template"):
        chosen("llama", llava, chat)
