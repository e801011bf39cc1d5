"""Tiny random sentence encoders: what make_encoder.py gives to transformers, and the tests to ours. Weights are drawn by name; none is stored."""

import hashlib
import json
import lzma
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
COMMON = {
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
    }
    | COMMON,
    "mpnet": {
        "model_type": "mpnet",
        "max_position_embeddings": 202,
        "layer_norm_eps": 1e-5,
        "relative_attention_num_buckets": 32,
    }
    | COMMON,
}
LONGEST = {
    "bert": 90,
    "mpnet": 180,
}  # beyond the 128 tokens at which MPNet's distances all become alike
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


def golden():
    """golden.json.xz: versions, tensor shapes, texts and ids."""
    return json.loads(lzma.decompress((HERE / "golden.json.xz").read_bytes()))


def vocabulary(family):
    """The entries in order: special tokens in front, MPNet's mask at the end, vocab.txt's between them."""
    words = (HERE / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    *front, mask = SPECIALS[family].values()
    return [*front, *words, mask] if family == "mpnet" else [*front, mask, *words]


def weight(name, shape):
    """Uniform numbers that depend on name and shape alone, scaled so that every part of the model has its say."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    values = (np.random.Generator(np.random.PCG64(seed)).random(shape) - 0.5) * 12**0.5
    if len(shape) == 1:
        values = 0.3 * values + name.endswith("LayerNorm.weight")
    elif "embedding" not in name:
        values *= (
            1.5 if any(part in name for part in ("query", "key", ".q.", ".k.")) else 1.0
        ) / shape[1] ** 0.5
    return values.astype(np.float32)


def tensors(family):
    """The weights of a model as its file would hold them, without a prefix, the pooler included."""
    return {name: weight(name, shape) for name, shape in golden()["shapes"][family].items()}


def tokenizer_json(family):
    """tokenizer.json as the public models have it, but for a shorter longest word."""
    vocab = {token: id for id, token in enumerate(vocabulary(family))}
    cls, sep = (SPECIALS[family][name] for name in ("cls_token", "sep_token"))
    post = {
        "type": "RobertaProcessing",
        "sep": [sep, vocab[sep]],
        "cls": [cls, vocab[cls]],
        "trim_offsets": True,
        "add_prefix_space": False,
    }
    if family == "bert":
        single = [
            {"SpecialToken": {"id": cls, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": sep, "type_id": 0}},
        ]
        post = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": single,
            "special_tokens": {
                token: {"id": token, "ids": [vocab[token]], "tokens": [token]}
                for token in (cls, sep)
            },
        }
    added = [
        {
            "id": vocab[token],
            "content": token,
            "single_word": False,
            "lstrip": token == "<mask>",
            "rstrip": False,
            "normalized": family == "mpnet" and kind != "unk_token",
            "special": True,
        }
        for kind, token in SPECIALS[family].items()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda one: one["id"]),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": post,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 40,
            "vocab": vocab,
        },
    }


def write(directory, family, weights=None, **config):
    """A directory of sentence-transformers' kind; `config` changes config.json."""
    (directory / "1_Pooling").mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": tokenizer_json(family),
        "config.json": CONFIGS[family] | {"vocab_size": len(vocabulary(family))} | config,
        "tokenizer_config.json": {"do_lower_case": True, "model_max_length": 512}
        | SPECIALS[family],
        "sentence_bert_config.json": {"max_seq_length": LONGEST[family], "do_lower_case": False},
        "modules.json": [
            {"idx": i, "name": str(i), "path": "", "type": f"sentence_transformers.models.{name}"}
            for i, name in enumerate(("Transformer", "Pooling", "Normalize"))
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": 32,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    save_file(
        tensors(family) if weights is None else weights,
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory
