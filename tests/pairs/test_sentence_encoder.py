"""Sentence encoders from a directory: ids of `tokenizers`, embeddings of transformers, and what is refused."""

import json

import numpy as np
import pytest
import torch
from golden.encoder import cases
from safetensors.torch import load_file, save_file

from minialign.pairs import similarity
from minialign.pairs.sentence_encoder import SentenceEncoder
from minialign.utils.files import InputError

GOLDEN = cases.golden()
FAMILIES = ("bert", "mpnet")
TEXTS = ["A red cup.", "", "Two dogs near the window, " * 40, "中文 Café!"]


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request, tmp_path_factory):
    encoder = SentenceEncoder(
        cases.write(tmp_path_factory.mktemp("some") / "encoder", request.param)
    )
    encoder.family = request.param
    return encoder


@pytest.fixture()
def directory(tmp_path):
    """A small sound MPNet directory, to be spoilt."""
    return cases.write(tmp_path / "encoder", "mpnet")


def change(path, **changes):
    """Change entries of a JSON object's file; None removes."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not None}))


def close(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=1e-6, rtol=0)


# --- parity ---


@pytest.mark.parametrize("family", FAMILIES)
def test_ids(family, tmp_path):
    """Case, accents, CJK, punctuation, control characters, special tokens within the text, long words, long texts."""
    encoder = SentenceEncoder(cases.write(tmp_path, family))
    ours = [encoder.tokenizer.encode(text, encoder.max_length) for text in GOLDEN["texts"]]
    assert len(ours) > 200 and ours == GOLDEN["ids"][family]
    assert max(map(len, ours)) == encoder.max_length == cases.LONGEST[family]


def test_embeddings_and_cosines(encoder):
    """transformers' means over tokens, made of length 1."""
    theirs = torch.nn.functional.normalize(
        torch.from_numpy(np.load(cases.HERE / "golden.npz")[encoder.family]), dim=-1
    )
    ours = encoder.embed(GOLDEN["texts"])
    close(ours, theirs)
    close(ours @ ours.T, theirs @ theirs.T)
    assert (theirs @ theirs.T).quantile(0.1) < 0.98  # the texts are told apart


def test_a_batch_is_what_its_texts_are_alone(encoder):
    close(encoder.embed(TEXTS), torch.cat([encoder.embed([text]) for text in TEXTS]))
    close(encoder.embed(TEXTS * 40), encoder.embed(TEXTS).repeat(40, 1))
    assert encoder.cosine(TEXTS[0], TEXTS[3]) == pytest.approx(
        float((encoder.embed([TEXTS[0]]) @ encoder.embed([TEXTS[3]]).T)), abs=1e-6
    )
    assert encoder.cosine(TEXTS[2], TEXTS[2]) == pytest.approx(1, abs=1e-6)


# --- forms of a directory ---


@pytest.mark.parametrize("form", ["prefix", "old names", "no pooler", "half", "bare", "shards"])
def test_every_form_of_a_directory_is_the_same_encoder(form, tmp_path):
    whole = SentenceEncoder(cases.write(tmp_path / "whole", "bert"))
    directory, tensors = (
        cases.write(tmp_path / "other", "bert"),
        load_file(tmp_path / "whole" / "model.safetensors"),
    )
    if form == "prefix":  # saved with the heads of pre-training
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()} | {
            "cls.predictions.bias": torch.zeros(9)
        }
    elif form == "old names":  # bert-base's own file
        tensors = {
            f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): tensor
            for name, tensor in tensors.items()
        } | {"bert.embeddings.position_ids": torch.arange(200)[None]}
    elif form == "no pooler":
        tensors = {
            name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")
        }
    elif form == "half":
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    elif form == "bare":  # plain transformers' kind
        for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
            (directory / name).unlink()
    save_file(tensors, directory / "model.safetensors")
    if form == "shards":
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")})
        )
    other, texts = SentenceEncoder(directory), TEXTS[:2]
    assert other.embed(texts).dtype == torch.float32 and other.max_length == (
        200 if form == "bare" else 90
    )
    torch.testing.assert_close(
        other.embed(texts), whole.embed(texts), atol=2e-2 if form == "half" else 0, rtol=0
    )


def test_tokenizer_config_counts_over_tokenizer_json(directory):
    change(directory / "tokenizer_config.json", do_lower_case=False, tokenize_chinese_chars=False)
    tokenizer = SentenceEncoder(directory).tokenizer
    assert tokenizer.encode("The", 9) == [
        0,
        tokenizer.unknown_id,
        2,
    ]  # the vocabulary is in lower case
    assert tokenizer.encode("中文", 9) != SentenceEncoder(
        cases.write(directory, "mpnet")
    ).tokenizer.encode("中文", 9)


@pytest.mark.parametrize(
    "asked, config, limit",
    [(50, 99, 50), (None, 99, 99), (None, None, 200), (512, 99, 200), (None, 1e30, 200)],
)
def test_longest_text(directory, asked, config, limit):
    """MPNet's 202 positions begin at 2."""
    change(directory / "sentence_bert_config.json", max_seq_length=asked)
    change(directory / "tokenizer_config.json", model_max_length=config)
    encoder = SentenceEncoder(directory)
    assert encoder.max_length == limit and encoder.embed(["word " * 300]).shape == (1, 32)


def test_the_name_says_which_weights(directory, tmp_path):
    name = SentenceEncoder(directory).name
    assert (
        name.startswith("encoder (mpnet, 180 tokens, ")
        and str(tmp_path) not in name
        and SentenceEncoder(f"{directory}/").name == name
    )
    tensors = load_file(directory / "model.safetensors")
    tensors["encoder.relative_attention_bias.weight"][3, 1] += 1
    save_file(tensors, directory / "model.safetensors")
    assert SentenceEncoder(directory).name != name


def test_similarity_is_the_directory_or_the_policys_own(directory, vlm):
    """One interface: name, embed, cosine."""
    for where in (directory, None):
        found = similarity.load_similarity(where, vlm.model, vlm.tokenizer)
        assert found.name and found.cosine("A cup.", "A dog.") == pytest.approx(
            float(found.embed(["A cup."]) @ found.embed(["A dog."]).T), abs=1e-6
        )
        assert (where is None) == isinstance(found, similarity.PolicyEmbeddings)


# --- what is refused ---


def refused(directory, *words):
    with pytest.raises(InputError) as error:
        SentenceEncoder(directory)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize(
    "change_of, words",
    [
        (
            lambda t: t.pop("encoder.layer.1.attention.attn.k.bias"),
            ("tensor encoder.layer.1.attention.attn.k.bias is missing",),
        ),
        (
            lambda t: t.update({"encoder.layer.3.output.dense.bias": torch.zeros(32)}),
            ("model.safetensors", "encoder.layer.3.output.dense.bias has no place"),
        ),
        (
            lambda t: t.update({"mpnet.embeddings.LayerNorm.bias": torch.zeros(32)}),
            ("tensor mpnet.e", "is missing"),
        ),
        (
            lambda t: t.update({"embeddings.word_embeddings.weight": torch.zeros(9, 32)}),
            ("model.safetensors", "embeddings.word_embeddings.weight has shape (9, 32)"),
        ),
    ],
)
def test_tensors_are_read_strictly(directory, change_of, words):
    tensors = load_file(directory / "model.safetensors")
    change_of(tensors)
    save_file(tensors, directory / "model.safetensors")
    refused(directory, *words)


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("config.json", {"model_type": "roberta"}, ("model_type 'roberta'", "bert, mpnet")),
        ("config.json", {"model_type": ["bert"]}, ("model_type ['bert']",)),
        ("config.json", {"hidden_size": None}, ("hidden_size None",)),
        ("config.json", {"num_attention_heads": 5}, ("num_attention_heads 5",)),
        ("config.json", {"hidden_act": "relu6"}, ("hidden_act 'relu6'",)),
        ("config.json", {"position_embedding_type": "relative_key"}, ("position_embedding_type",)),
        (
            "config.json",
            {"relative_attention_num_buckets": 64},
            ("relative_attention_num_buckets 64",),
        ),
        ("config.json", {"vocab_size": 100}, ("vocab_size of 100",)),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True},
            ("pooling_mode_cls_token", "mean"),
        ),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, ("pooling_mode 'lasttoken'",)),
        ("sentence_bert_config.json", {"do_lower_case": True}, ("do_lower_case",)),
        ("sentence_bert_config.json", {"max_seq_length": 2}, ("max_seq_length 2",)),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}}}, ("BPE", "WordPiece")),
        ("tokenizer.json", {"model": {"type": "WordPiece"}}, ("not a complete",)),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, ("Lowercase",)),
        (
            "tokenizer.json",
            {"post_processor": {"type": "ByteLevel"}},
            ("post-processor ByteLevel",),
        ),
    ],
)
def test_what_is_not_supported_is_refused(directory, name, changes, words):
    change(directory / name, **changes)
    refused(directory, name if "vocab_size" not in changes else "encoder", *words)


def test_broken_directories(directory, tmp_path):
    (directory / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Dense"}])
    )
    refused(directory, "modules.json", "Dense")
    (directory / "modules.json").write_text("{}")
    refused(directory, "modules.json", "not a JSON list")
    (directory / "modules.json").unlink()
    (directory / "tokenizer.json").unlink()
    refused(directory, "tokenizer.json", "no such file")
    (directory / "tokenizer.json").write_bytes(b"<s>\n\xff\n")
    refused(directory, "tokenizer.json", "UTF-8")
    (directory / "tokenizer.json").write_text("[]")
    refused(directory, "tokenizer.json", "not a complete")
    (cases.write(directory, "mpnet") / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(directory, "pytorch_model.bin", "convert it with transformers")
    refused(tmp_path / "nowhere", "config.json", "no such file")
