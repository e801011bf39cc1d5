"""The ids of tokenizer.json, of config.json and of the embedding table must agree."""

import json
import shutil

import pytest
from conftest import TINY

from minialign.models.loading import load_vlm
from minialign.utils.files import InputError

VOCAB_SIZE = 640
IMAGE_TOKEN_ID = 638
PAD_TOKEN_ID = 639


@pytest.fixture()
def directory(tmp_path):
    """Copy the tiny model for a test to change."""
    return shutil.copytree(TINY / "model", tmp_path / "model")


def change_json(path, change):
    """Apply a function to the value in a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def error_of(directory):
    """Return the message with which a checkpoint is refused."""
    with pytest.raises(InputError) as error:
        load_vlm(directory)
    message = str(error.value)
    assert "\n" not in message
    assert str(directory / "tokenizer.json") in message
    assert str(directory / "config.json") in message
    return message


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, VOCAB_SIZE + 5, 10**6])
def test_added_tokens_need_an_embedding(token_id, directory):
    def add_token(tokenizer):
        token = {**tokenizer["added_tokens"][0], "content": "<new>", "id": token_id}
        tokenizer["added_tokens"].append(token)

    change_json(directory / "tokenizer.json", add_token)

    message = error_of(directory)

    assert "<new>" in message
    assert str(token_id) in message
    assert str(VOCAB_SIZE) in message


@pytest.mark.parametrize("image_token_id", [0, 637, 32000, 10**9])
def test_config_json_must_have_the_id_of_the_image_token(image_token_id, directory):
    def change_id(config):
        config["image_token_index"] = image_token_id

    change_json(directory / "config.json", change_id)

    message = error_of(directory)

    assert f"<image> has the id {IMAGE_TOKEN_ID}" in message
    assert str(image_token_id) in message


def test_tokenizer_json_must_have_the_id_of_config_json(directory):
    other_id = {IMAGE_TOKEN_ID: PAD_TOKEN_ID, PAD_TOKEN_ID: IMAGE_TOKEN_ID}

    def swap_ids(tokenizer):
        for token in tokenizer["added_tokens"]:
            token["id"] = other_id.get(token["id"], token["id"])

    change_json(directory / "tokenizer.json", swap_ids)

    message = error_of(directory)

    assert f"<image> has the id {PAD_TOKEN_ID}" in message
    assert str(IMAGE_TOKEN_ID) in message


def test_a_tokenizer_without_image_token_is_refused(directory):
    def rename(tokenizer):
        for token in tokenizer["added_tokens"]:
            if token["content"] == "<image>":
                token["content"] = "<IMG>"

    change_json(directory / "tokenizer.json", rename)

    assert "<image> has the id None" in error_of(directory)
