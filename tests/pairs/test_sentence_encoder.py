"""Sentence encoders: ids of `tokenizers`, embeddings of transformers, and what is refused."""

import json

import numpy as np
import pytest
import torch
from golden.encoder import cases
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from minialign.pairs.sentence_encoder import SentenceEncoder
from minialign.pairs.similarity import ModelEmbeddings, load_similarity
from minialign.utils.files import InputError

GOLDEN = cases.golden()
GOLDEN_EMBEDDINGS = np.load(cases.HERE / "golden.npz")
FAMILIES = ("bert", "mpnet")
TEXTS = ["A red cup.", "", "Two dogs near the window, " * 40, "中文 Café!"]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", params=FAMILIES)
def encoder(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("encoders") / request.param
    return SentenceEncoder(cases.write(directory, request.param))


@pytest.fixture()
def directory(tmp_path):
    """Write a small MPNet encoder for a test to change."""
    return cases.write(tmp_path / "encoder", "mpnet")


def change_json(path, **changes):
    """Change fields of a JSON object in a file. None removes a field."""
    fields = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in fields.items() if value is not None}
    path.write_text(json.dumps(kept))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


# --- the numbers of tokenizers and transformers ---


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_those_of_tokenizers(family, tmp_path):
    """The texts have capitals, accents, Chinese, punctuation, control characters and added tokens.

    Some words and some texts are too long.
    """
    encoder = SentenceEncoder(cases.write(tmp_path, family))

    ids = [encoder.tokenizer.encode(text, encoder.max_length) for text in GOLDEN["texts"]]

    assert len(ids) > 200
    assert ids == GOLDEN["ids"][family]
    longest = max(len(text_ids) for text_ids in ids)
    assert longest == encoder.max_length == cases.LONGEST[family]


def test_embeddings_equal_those_of_transformers(encoder):
    """The golden numbers are the means over tokens, before they are normalized."""
    family = "mpnet" if encoder.network.is_mpnet else "bert"
    expected = F.normalize(torch.from_numpy(GOLDEN_EMBEDDINGS[family]), dim=-1)

    embeddings = encoder.embed(GOLDEN["texts"])

    assert_close(embeddings, expected)
    assert_close(embeddings @ embeddings.T, expected @ expected.T)
    # The random weights must tell the texts apart, or the test would show nothing.
    assert (expected @ expected.T).quantile(0.1) < 0.98


def test_embedding_does_not_depend_on_the_batch(encoder):
    alone = torch.cat([encoder.embed([text]) for text in TEXTS])

    assert_close(encoder.embed(TEXTS), alone)
    assert_close(encoder.embed(TEXTS * 40), alone.repeat(40, 1))


def test_cosine_is_the_product_of_the_embeddings(encoder):
    first, other = encoder.embed([TEXTS[0], TEXTS[3]])

    assert encoder.cosine(TEXTS[0], TEXTS[3]) == pytest.approx(float(first @ other), abs=1e-6)
    assert encoder.cosine(TEXTS[2], TEXTS[2]) == pytest.approx(1, abs=1e-6)


# --- the forms of a directory ---


def add_family_prefix(directory, tensors):
    """Name the tensors as in a file that also holds the heads of pre-training."""
    prefixed = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    prefixed["cls.predictions.bias"] = torch.zeros(9)
    return prefixed


def use_old_names(directory, tensors):
    """Name the tensors as in the file of bert-base, and add its buffer."""
    renamed = {"bert.embeddings.position_ids": torch.arange(200)[None]}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        renamed[f"bert.{name}"] = tensor
    return renamed


def remove_pooler(directory, tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}


def use_bfloat16(directory, tensors):
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def remove_files_of_sentence_transformers(directory, tensors):
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (directory / name).unlink()
    return tensors


@pytest.mark.parametrize(
    "change, tolerance, max_length",
    [
        (add_family_prefix, 0, 90),
        (use_old_names, 0, 90),
        (remove_pooler, 0, 90),
        (use_bfloat16, 2e-2, 90),
        (remove_files_of_sentence_transformers, 0, 200),
    ],
)
def test_every_form_of_a_directory_is_the_same_encoder(change, tolerance, max_length, tmp_path):
    """The embeddings are equal to the bit, unless the weights are rounded."""
    expected = SentenceEncoder(cases.write(tmp_path / "whole", "bert"))
    directory = cases.write(tmp_path / "changed", "bert")
    tensors = change(directory, load_file(directory / WEIGHTS))
    save_file(tensors, directory / WEIGHTS)

    encoder = SentenceEncoder(directory)

    embeddings = encoder.embed(TEXTS[:2])
    assert embeddings.dtype == torch.float32
    assert encoder.max_length == max_length
    torch.testing.assert_close(embeddings, expected.embed(TEXTS[:2]), atol=tolerance, rtol=0)


def test_shards_are_the_same_encoder(tmp_path):
    expected = SentenceEncoder(cases.write(tmp_path / "whole", "bert"))
    directory = cases.write(tmp_path / "sharded", "bert")
    shard = "model-00001-of-00001.safetensors"
    index = {"weight_map": dict.fromkeys(load_file(directory / WEIGHTS), shard)}
    (directory / WEIGHTS).rename(directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    encoder = SentenceEncoder(directory)

    assert encoder.max_length == 90
    assert torch.equal(encoder.embed(TEXTS[:2]), expected.embed(TEXTS[:2]))


def test_tokenizer_config_overrides_tokenizer_json(directory):
    chinese = "中文"
    separated_ids = SentenceEncoder(directory).tokenizer.encode(chinese, 9)
    change_json(
        directory / "tokenizer_config.json", do_lower_case=False, tokenize_chinese_chars=False
    )

    tokenizer = SentenceEncoder(directory).tokenizer

    # The vocabulary is in lower case, so "The" is unknown as it stands.
    assert tokenizer.encode("The", 9) == [0, tokenizer.unknown_id, 2]
    assert tokenizer.encode(chinese, 9) != separated_ids


@pytest.mark.parametrize(
    "max_seq_length, model_max_length, expected",
    [(50, 99, 50), (None, 99, 99), (None, None, 200), (512, 99, 200), (None, 1e30, 200)],
)
def test_max_length(directory, max_seq_length, model_max_length, expected):
    """MPNet has 202 position embeddings, of which texts use those from 2 on."""
    change_json(directory / "sentence_bert_config.json", max_seq_length=max_seq_length)
    change_json(directory / "tokenizer_config.json", model_max_length=model_max_length)

    encoder = SentenceEncoder(directory)

    assert encoder.max_length == expected
    assert encoder.embed(["word " * 300]).shape == (1, 32)


def test_name_depends_on_the_weights_and_not_on_the_path(directory, tmp_path):
    name = SentenceEncoder(directory).name
    assert name.startswith("encoder (mpnet, 180 tokens, ")
    assert str(tmp_path) not in name
    assert SentenceEncoder(f"{directory}/").name == name

    tensors = load_file(directory / WEIGHTS)
    tensors["encoder.relative_attention_bias.weight"][3, 1] += 1
    save_file(tensors, directory / WEIGHTS)
    assert SentenceEncoder(directory).name != name


def test_similarity_is_an_encoder_or_the_policys_embeddings(directory, vlm):
    """Both have a name, embeddings and their cosine."""
    for folder, expected_class in ((directory, SentenceEncoder), (None, ModelEmbeddings)):
        similarity = load_similarity(folder, vlm.model, vlm.tokenizer)

        assert isinstance(similarity, expected_class)
        assert similarity.name
        (cup,) = similarity.embed(["A cup."])
        (dog,) = similarity.embed(["A dog."])
        cosine = similarity.cosine("A cup.", "A dog.")
        assert cosine == pytest.approx(float(cup @ dog), abs=1e-6)


# --- what is refused ---


def assert_refused(directory, *words):
    """Fail unless the directory is refused in one line with these words."""
    with pytest.raises(InputError) as error:
        SentenceEncoder(directory)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


KEY_BIAS = "encoder.layer.1.attention.attn.k.bias"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({KEY_BIAS: None}, [f"tensor {KEY_BIAS} is missing"]),
        (
            {"encoder.layer.3.output.dense.bias": torch.zeros(32)},
            [WEIGHTS, "encoder.layer.3.output.dense.bias has no place"],
        ),
        (
            {"mpnet.embeddings.LayerNorm.bias": torch.zeros(32)},
            ["tensor mpnet.e", "is missing"],
        ),
        (
            {"embeddings.word_embeddings.weight": torch.zeros(9, 32)},
            [WEIGHTS, "embeddings.word_embeddings.weight has shape (9, 32)"],
        ),
        ({KEY_BIAS: torch.full((32,), float("nan"))}, [WEIGHTS, KEY_BIAS, "NaN"]),
        ({KEY_BIAS: torch.zeros(32, dtype=torch.int8)}, [WEIGHTS, KEY_BIAS, "I8"]),
    ],
)
def test_tensors_are_read_strictly(directory, changes, words):
    """A tensor that is missing, unused or of another shape is refused. None removes a tensor."""
    tensors = load_file(directory / WEIGHTS) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / WEIGHTS)

    assert_refused(directory, *words)


@pytest.mark.parametrize(
    "file, changes, words",
    [
        ("config.json", {"model_type": "roberta"}, ["model_type 'roberta'", "bert, mpnet"]),
        ("config.json", {"model_type": ["bert"]}, ["model_type ['bert']"]),
        ("config.json", {"hidden_size": None}, ["hidden_size None"]),
        ("config.json", {"hidden_size": 32 * 10**30}, ["hidden_size 32000"]),
        ("config.json", {"vocab_size": 10**9}, ["vocab_size is 1000000000"]),
        ("config.json", {"num_hidden_layers": 10**9}, ["num_hidden_layers is 1000000000"]),
        ("config.json", {"layer_norm_eps": "x"}, ["layer_norm_eps 'x'"]),
        ("config.json", {"layer_norm_eps": float("nan")}, ["layer_norm_eps nan"]),
        ("config.json", {"num_attention_heads": 5}, ["num_attention_heads 5"]),
        ("config.json", {"hidden_act": "relu6"}, ["hidden_act 'relu6'"]),
        ("config.json", {"position_embedding_type": "relative_key"}, ["position_embedding_type"]),
        (
            "config.json",
            {"relative_attention_num_buckets": 64},
            ["relative_attention_num_buckets 64"],
        ),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True},
            ["pooling_mode_cls_token", "mean"],
        ),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, ["pooling_mode 'lasttoken'"]),
        ("sentence_bert_config.json", {"do_lower_case": True}, ["do_lower_case"]),
        ("sentence_bert_config.json", {"max_seq_length": 2}, ["max_seq_length 2"]),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}}}, ["BPE", "WordPiece"]),
        ("tokenizer.json", {"model": {"type": "WordPiece"}}, ["not a complete"]),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, ["Lowercase"]),
        ("tokenizer.json", {"post_processor": {"type": "ByteLevel"}}, ["post-processor ByteLevel"]),
    ],
)
def test_unsupported_fields_are_refused(directory, file, changes, words):
    """The message names the file and the field."""
    change_json(directory / file, **changes)

    assert_refused(directory, file, *words)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(directory):
    change_json(directory / "config.json", vocab_size=100)

    assert_refused(directory, "encoder", "vocab_size of 100")


def test_broken_modules_json_is_refused(directory):
    path = directory / "modules.json"
    path.write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    assert_refused(directory, "modules.json", "Dense")

    path.write_text("{}")
    assert_refused(directory, "modules.json", "not a JSON list")


def test_broken_tokenizer_json_is_refused(directory):
    path = directory / "tokenizer.json"
    path.unlink()
    assert_refused(directory, "tokenizer.json", "no such file")

    path.write_bytes(b"<s>\n\xff\n")
    assert_refused(directory, "tokenizer.json", "UTF-8")

    path.write_text("[]")
    assert_refused(directory, "tokenizer.json", "not a complete")


def test_pickled_weights_are_refused(directory):
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")

    assert_refused(directory, "pytorch_model.bin", "convert it with transformers")


def test_missing_directory_is_refused(tmp_path):
    """The name of an encoder on the hub is no folder here."""
    nothing = "no such folder; give the folder of a sentence encoder, nothing is downloaded"
    assert_refused(tmp_path / "all-MiniLM-L6-v2", nothing)
    assert_refused(tmp_path, "config.json: no such file; give the folder of a sentence encoder")
