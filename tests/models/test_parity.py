"""Models compute what transformers computes: features, logits, greedy ids, and then the text.

tests/golden/make_tiny.py and make_models.py made the golden numbers.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from golden.models import cases
from golden_cases import PROMPTS, assert_close, encode_golden_images, prompt_logits

from minialign.data.chat_templates import decode_response, encode_prompt, end_token_id
from minialign.data.packing import expand_image_placeholders
from minialign.data.records import read_records
from minialign.generation.decoding import SamplingParams, generate, share_prefix
from minialign.logprobs import response_logps
from minialign.methods.base import encode_example, pack_examples
from minialign.models.checkpoint import load_model
from minialign.models.config_json import parse_config
from minialign.models.llava import Llava
from minialign.models.loading import VLM, load_vlm

GOLDEN = Path(__file__).parent.parent / "golden"
SAMPLING = SamplingParams(max_new_tokens=64)
BATCH_SIZES = pytest.mark.parametrize("batch_size", [1, 100], ids=["one by one", "one batch"])


def batches(items, batch_size):
    """Cut a list into lists of at most `batch_size` items."""
    return [items[start : start + batch_size] for start in range(0, len(items), batch_size)]


def logits_in_batches(model, prompts, image_features, batch_size):
    """Return the logits (T, V) of each prompt, computed in batches of that size."""
    all_logits = []
    for some_prompts, some_features in zip(
        batches(prompts, batch_size), batches(image_features, batch_size), strict=True
    ):
        all_logits += prompt_logits(model, some_prompts, some_features)
    return all_logits


def generate_in_batches(model, prompts, image_features, batch_size, stop_ids):
    """Return the greedy response (ids) to each prompt, generated in batches of that size."""
    examples = []
    for prompt_ids, features in zip(prompts, image_features, strict=True):
        examples.append(share_prefix([prompt_ids], features))
    responses = []
    for some_examples in batches(examples, batch_size):
        responses += generate(model, some_examples, SAMPLING, stop_ids=stop_ids)
    return responses


# --- the shipped model ---


@dataclass
class TinyGolden:
    """The shipped model, and what transformers computes with it."""

    vlm: VLM
    records: list  # image, question, ids and text of the greedy answer
    scores: list  # summed log-probs of POVID records
    arrays: dict  # "last": logits behind each prompt; "whole0", ...: all text logits of a prompt
    prompts: list
    image_features: list


@pytest.fixture(scope="module")
def tiny():
    results = json.loads((GOLDEN / "tiny.json").read_text())
    weights = (TINY / "model" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == results["sha256"], (
        "the golden numbers are those of other weights: run tests/golden/make_tiny.py"
    )
    vlm = load_vlm(TINY / "model")
    prompts = []
    image_features = []
    for record in results["records"]:
        turns = [f"<image>\n{record['question']}"]
        prompts.append(encode_prompt(vlm.tokenizer, "vicuna", turns))
        image_features.append(vlm.encode_images([TINY / record["image"]]))
    return TinyGolden(
        vlm=vlm,
        records=results["records"],
        scores=results["scores"],
        arrays=np.load(GOLDEN / "tiny.npz"),
        prompts=prompts,
        image_features=image_features,
    )


def test_tiny_prompts_have_the_ids_of_the_processor(tiny):
    image_token_id = tiny.vlm.model.config.image_token_id
    for prompt_ids, record in zip(tiny.prompts, tiny.records, strict=True):
        text_ids = [token_id for token_id in prompt_ids if token_id != image_token_id]
        assert text_ids == record["text_ids"]


@BATCH_SIZES
def test_tiny_logits(tiny, batch_size):
    all_logits = logits_in_batches(
        tiny.vlm.model, tiny.prompts, tiny.image_features, batch_size=batch_size
    )

    # 1. The logits behind every prompt.
    assert_close(torch.stack([logits[-1] for logits in all_logits]), tiny.arrays["last"])

    # 2. Of some prompts all logits of the text, before and after the image.
    num_whole = len([name for name in tiny.arrays if name.startswith("whole")])
    assert num_whole > 0
    for i in range(num_whole):
        prompt_ids = tiny.prompts[i]
        length_before = prompt_ids.index(tiny.vlm.model.config.image_token_id)
        length_after = len(prompt_ids) - length_before - 1
        text_logits = torch.cat([all_logits[i][:length_before], all_logits[i][-length_after:]])
        assert_close(text_logits, tiny.arrays[f"whole{i}"])


@BATCH_SIZES
def test_tiny_captions(tiny, batch_size):
    tokenizer = tiny.vlm.tokenizer
    stop_ids = {end_token_id(tokenizer, "vicuna")}

    responses = generate_in_batches(
        tiny.vlm.model, tiny.prompts, tiny.image_features, batch_size, stop_ids
    )

    for response_ids, record in zip(responses, tiny.records, strict=True):
        assert response_ids == record["ids"]
        assert decode_response(tokenizer, "vicuna", response_ids) == record["text"]


def test_tiny_scores_of_povid_records(tiny):
    """These are the numbers of `sample.py score`, within max(1e-6 of the value, 1e-5 a token)."""
    records = read_records([TINY / "train" / "povid.json"], None)
    record_of = {record.id: record for record in records}
    for score in tiny.scores:
        record = record_of[score["id"]]
        example = encode_example(tiny.vlm, record, [record.chosen, record.rejected])

        logps, token_counts = response_logps(tiny.vlm.model, pack_examples(tiny.vlm, [example]))

        expected = torch.tensor([score["logp_chosen"], score["logp_rejected"]]).double()
        tolerance = torch.maximum(1e-6 * expected.abs(), 1e-5 * token_counts[0])
        assert ((logps[0] - expected).abs() <= tolerance).all()


# --- random models over all supported families ---

GOLDEN_ARRAYS = np.load(GOLDEN / "models" / "golden.npz")
CONFIGS_OF_TRANSFORMERS_5 = json.loads((GOLDEN / "models" / "golden.json").read_text())["configs"]


@dataclass
class RandomModel:
    """A model with random weights, and what transformers computes with it."""

    model: Llava
    image_features: list  # for each golden prompt the ImageFeatures of its images
    arrays: dict

    def every_image(self):
        """Return the ImageFeatures of the images of all prompts in one list."""
        return [image for images in self.image_features for image in images]


@pytest.fixture(scope="module", params=cases.CONFIGS)
def random_model(request, tmp_path_factory):
    """Load a random model from a directory as a user's would be."""
    name = request.param
    model = load_model(cases.write(tmp_path_factory.mktemp(name), name))
    prefix = f"{name}: "
    arrays = {}
    for key in GOLDEN_ARRAYS:
        if key.startswith(prefix):
            arrays[key.removeprefix(prefix)] = GOLDEN_ARRAYS[key]
    return RandomModel(model, encode_golden_images(model), arrays)


@pytest.mark.parametrize("name", cases.CONFIGS | cases.PUBLIC)
def test_configs_of_transformers_4_and_5_say_the_same(name):
    raw_config = (cases.CONFIGS | cases.PUBLIC)[name]

    config = parse_config(raw_config, "config.json")

    assert config == parse_config(CONFIGS_OF_TRANSFORMERS_5[name], "config.json")
    assert config.text.rope_theta == raw_config["text_config"].get("rope_theta", 10000)
    assert (config.text.rope_scaling is not None) == (name == "next_llama3")


def test_vision_features(random_model):
    for image in random_model.every_image():
        assert_close(image.tiles, random_model.arrays[f"features {image.size}"])


def test_projector(random_model):
    for image in random_model.every_image():
        projected = random_model.model.multi_modal_projector(image.tiles)
        assert_close(projected, random_model.arrays[f"projected {image.size}"])


def test_image_tokens(random_model):
    images = random_model.every_image()
    all_tokens = random_model.model.project_image_features(images)
    for image, image_tokens in zip(images, all_tokens, strict=True):
        assert_close(image_tokens, random_model.arrays[f"vectors {image.size}"])


@BATCH_SIZES
def test_logits(random_model, batch_size):
    """The golden numbers are the logits of all text tokens."""
    all_logits = logits_in_batches(
        random_model.model, PROMPTS, random_model.image_features, batch_size
    )

    for i, prompt_ids in enumerate(PROMPTS):
        token_counts = []
        for image in random_model.image_features[i]:
            token_counts.append(len(random_model.arrays[f"vectors {image.size}"]))
        expanded = expand_image_placeholders(prompt_ids, token_counts, cases.IMAGE)
        is_text = ~torch.tensor(expanded.is_image)
        assert_close(all_logits[i][is_text], random_model.arrays[f"logits {i}"])


@BATCH_SIZES
def test_greedy_ids(random_model, batch_size):
    responses = generate_in_batches(
        random_model.model, PROMPTS, random_model.image_features, batch_size, stop_ids=set()
    )

    for i, response_ids in enumerate(responses):
        assert response_ids == random_model.arrays[f"greedy {i}"].tolist()
