"""Tiny random sentence encoders, which transformers and minialign both load.

Weights are drawn from a hash of their names, so that both get the same ones and none is stored.
"""

import hashlib
import json
import lzma
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "gelu",
}
CONFIGS = {
    "bert": {
        "model_type": "bert",
        "max_position_embeddings": 200,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        **SHAPE,
    },
    "mpnet": {
        "model_type": "mpnet",
        "max_position_embeddings": 202,
        "layer_norm_eps": 1e-5,
        "relative_attention_num_buckets": 32,
        **SHAPE,
    },
}
# Texts are cut at so many tokens. MPNet's go beyond 128, from where on all distances are alike.
LONGEST = {"bert": 90, "mpnet": 180}
SPECIALS = {
    "bert": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "mpnet": {
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "unk_token": "[UNK]",
        "mask_token": "<mask>",
    },
}
NORMALIZER = {
    "type": "BertNormalizer",
    "clean_text": True,
    "handle_chinese_chars": True,
    "strip_accents": None,
    "lowercase": True,
}


def golden():
    """Return the content of golden.json.xz: versions, tensor shapes, texts and ids."""
    compressed = (HERE / "golden.json.xz").read_bytes()
    return json.loads(lzma.decompress(compressed))


def vocabulary(family):
    """Return the tokens in order. Special tokens are in front, but MPNet's mask is at the end."""
    text = (HERE / "vocab.txt").read_text(encoding="utf-8")
    words = text.split("\n")[:-1]
    *other_specials, mask = SPECIALS[family].values()
    if family == "mpnet":
        return [*other_specials, *words, mask]
    return [*other_specials, mask, *words]


def weight(name, shape):
    """Return uniform random numbers that depend on name and shape alone.

    They are scaled so that every part of the model has an effect on its output.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    numbers = np.random.Generator(np.random.PCG64(seed)).random(shape)
    values = (numbers - 0.5) * 12**0.5  # mean 0 and variance 1
    if len(shape) == 1:
        values = 0.3 * values
        if name.endswith("LayerNorm.weight"):
            values = values + 1
    elif "embedding" not in name:
        # Queries and keys are larger, so that attention differs from a mean.
        scale = 1.0
        for attention_name in ("query", "key", ".q.", ".k."):
            if attention_name in name:
                scale = 1.5
        values = values * (scale / shape[1] ** 0.5)
    return values.astype(np.float32)


def tensors(family):
    """Return a model's weights under the names of its file, without a prefix, with the pooler."""
    shapes = golden()["shapes"][family]
    return {name: weight(name, shape) for name, shape in shapes.items()}


def tokenizer_json(family):
    """Return tokenizer.json as public models have it, with a shorter longest word."""
    vocab = {token: token_id for token_id, token in enumerate(vocabulary(family))}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(family, vocab),
        "normalizer": NORMALIZER,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _post_processor(family, vocab),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 40,
            "vocab": vocab,
        },
    }


def _added_tokens(family, vocab):
    """Return the special tokens as tokenizer.json lists them, by their ids."""
    added_tokens = []
    for name, token in SPECIALS[family].items():
        added_tokens.append(
            {
                "id": vocab[token],
                "content": token,
                "single_word": False,
                "lstrip": token == "<mask>",
                "rstrip": False,
                "normalized": family == "mpnet" and name != "unk_token",
                "special": True,
            }
        )
    return sorted(added_tokens, key=lambda added_token: added_token["id"])


def _post_processor(family, vocab):
    """Return the rule that puts a CLS token in front of a text and a SEP token behind it."""
    cls = SPECIALS[family]["cls_token"]
    sep = SPECIALS[family]["sep_token"]
    if family == "mpnet":
        return {
            "type": "RobertaProcessing",
            "sep": [sep, vocab[sep]],
            "cls": [cls, vocab[cls]],
            "trim_offsets": True,
            "add_prefix_space": False,
        }
    template = [
        {"SpecialToken": {"id": cls, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": sep, "type_id": 0}},
    ]
    special_tokens = {}
    for token in (cls, sep):
        special_tokens[token] = {"id": token, "ids": [vocab[token]], "tokens": [token]}
    return {
        "type": "TemplateProcessing",
        "single": template,
        "pair": template,
        "special_tokens": special_tokens,
    }


def write(directory, family, weights=None, **config):
    """Write a folder as sentence-transformers saves it. `config` changes config.json."""
    (directory / "1_Pooling").mkdir(parents=True, exist_ok=True)
    modules = []
    for i, name in enumerate(("Transformer", "Pooling", "Normalize")):
        module_type = f"sentence_transformers.models.{name}"
        modules.append({"idx": i, "name": str(i), "path": "", "type": module_type})
    files = {
        "tokenizer.json": tokenizer_json(family),
        "config.json": {**CONFIGS[family], "vocab_size": len(vocabulary(family)), **config},
        "tokenizer_config.json": {
            "do_lower_case": True,
            "model_max_length": 512,
            **SPECIALS[family],
        },
        "sentence_bert_config.json": {"max_seq_length": LONGEST[family], "do_lower_case": False},
        "modules.json": modules,
        "1_Pooling/config.json": {
            "word_embedding_dimension": 32,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    if weights is None:
        weights = tensors(family)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
