"""Tokenizers of every supported family, with what the package `tokenizers` computes with them.

tests/golden/make_tokenizer.py made the files: a tokenizer.json for each name, and one of results.
"""

import functools
import json
import lzma
import tempfile
from pathlib import Path

from minialign.data.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenizer"
# The tokenizers that have <image> and the tokens of the chat formats.
CHAT_NAMES = ("llama", "odd_added", "yi", "first", "always", "never", "qwen2", "llama3")
# The others: in "across" a merge joins two words, "unknown" has no byte tokens, "smollm2" cuts out
# digits and has its special tokens in front.
NAMES = (*CHAT_NAMES, "across", "unknown", "smollm2")


@functools.cache
def golden_results() -> dict:
    """Return the results of `tokenizers`: sample lines, and their ids and text for each name."""
    return json.loads(lzma.decompress((GOLDEN / "expected.json.xz").read_bytes()))


def read_spec(name) -> dict:
    """Return the tokenizer.json of a golden tokenizer, parsed anew for each caller."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def write_checkpoint(directory, spec, **files) -> Path:
    """Write `spec` as tokenizer.json, and other JSON files by their names without ".json"."""
    contents = {
        "tokenizer": spec,
        "tokenizer_config": {"eos_token": "</s>", "pad_token": {"content": "<pad>"}},
    }
    contents |= files
    directory.mkdir(exist_ok=True)
    for name, value in contents.items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return directory


@functools.cache
def golden_tokenizer(name) -> Tokenizer:
    """Return a golden tokenizer, loaded from a directory as a user's would be."""
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer.load(write_checkpoint(Path(directory), read_spec(name)))
