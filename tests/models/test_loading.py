"""Loading a checkpoint: its chat template and its end tokens."""

import json
import shutil
from pathlib import Path

import pytest

from minialign.data.chat_templates import encode_prompt, stop_ids
from minialign.data.templates import read_template
from minialign.models.loading import load_vlm
from minialign.utils.files import InputError

TINY_MODEL = Path(__file__).parent.parent.parent / "data" / "tiny" / "model"


@pytest.fixture
def checkpoint(tmp_path):
    """Return a copy of the tiny model's directory."""
    directory = tmp_path / "model"
    shutil.copytree(TINY_MODEL, directory)
    return directory


def test_a_template_of_a_file_is_used(checkpoint, tmp_path):
    path = tmp_path / "format.json"
    path.write_text(json.dumps({"user_turn": "Q: {} A:", "system": "Hi. "}))

    vlm = load_vlm(checkpoint, read_template(str(path)))

    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, ["<image>\nWhy?"])
    text = vlm.tokenizer.decode(prompt_ids, skip_special=False)
    # The normalizer of Llama writes a space behind every added token.
    assert text == "<s> Hi. Q: <image> \nWhy? A:"


def test_a_missing_chat_template_is_said(checkpoint, capsys):
    (checkpoint / "chat_template.json").unlink()

    assert load_vlm(checkpoint).template == "vicuna"
    assert load_vlm(checkpoint).template == "vicuna"
    assert capsys.readouterr().err.count("has no chat template; ") == 1

    load_vlm(TINY_MODEL)
    assert capsys.readouterr().err == ""


def test_another_chat_template_is_refused_unless_one_is_named(checkpoint):
    path = checkpoint / "chat_template.json"
    path.write_text(path.read_text().replace("ASSISTANT:", "BOT:"))

    with pytest.raises(InputError, match="BOT:.*nearest, vicuna, .*--template FILE"):
        load_vlm(checkpoint)
    assert load_vlm(checkpoint, "vicuna").template == "vicuna"


def test_a_template_whose_end_token_is_missing_is_refused(checkpoint):
    with pytest.raises(InputError, match="chatml closes answers with <|im_end|>"):
        load_vlm(checkpoint, "chatml")


def test_every_end_token_of_generation_config_stops(checkpoint):
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    vlm = load_vlm(checkpoint)

    assert stop_ids(vlm.tokenizer, vlm.template) == {2, 7}


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json", "config.json"])
def test_a_changed_file_beside_the_weights_changes_its_digest(checkpoint, name):
    before = load_vlm(checkpoint).file_digests
    path = checkpoint / name
    path.write_text(path.read_text() + "\n")

    after = load_vlm(checkpoint).file_digests

    changed = [file for file, digest in after.items() if before[file] != digest]
    assert changed == [str(path)]
    assert after.keys() == before.keys()
