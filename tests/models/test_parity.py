"""The same numbers as transformers: logits, greedy ids, then the string (tests/golden/make_tiny.py, make_models.py)."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.models import cases

from minialign.data.chat_templates import decode_response, encode_prompt, end_token_id
from minialign.data.anyres import grid_shape
from minialign.data.packing import PackedExample, expand_image_placeholders, pack
from minialign.data.records import read_records
from minialign.generation.decoding import SamplingParams, generate, share_prefix
from minialign.logprobs import response_logps
from minialign.methods.base import encode_example, pack_examples
from minialign.models.checkpoint import load_model
from minialign.models.config_json import parse_config
from minialign.models.llava import hidden_states
from minialign.models.loading import load_vlm

GOLDEN = Path(__file__).parent / "golden"
TINY = Path(__file__).parent.parent / "data" / "tiny"


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(
        torch.as_tensor(ours), torch.as_tensor(theirs), rtol=0, atol=tolerance
    )


@torch.no_grad()
def logits(model, prompts, pictures):
    """For each prompt with its pictures (Features), the logits (T, V) of its whole expanded sequence, all run as one batch."""
    batch = pack(
        model,
        [PackedExample(prompt, own, []) for prompt, own in zip(prompts, pictures, strict=True)],
    )
    return [
        out[:length]
        for out, length in zip(
            hidden_states(model, batch) @ model.vocab_head.T, batch.prefix_lengths, strict=True
        )
    ]


@pytest.fixture(scope="module")
def tiny():
    """(subject, golden records, golden arrays, prompts' ids, pictures' Features) of the shipped model."""
    about = json.loads((GOLDEN / "tiny.json").read_text())
    weights = (TINY / "model" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == about["sha256"], (
        "the shipped weights are not the golden's: run tests/golden/make_tiny.py"
    )
    vlm, records = load_vlm(TINY / "model"), about["records"]
    prompts = [
        encode_prompt(vlm.tokenizer, "vicuna", [f"<image>\n{record['question']}"])
        for record in records
    ]
    return (
        vlm,
        records,
        np.load(GOLDEN / "tiny.npz"),
        prompts,
        vlm.encode_images([TINY / record["image"] for record in records]),
    )


def test_tiny_prompts_are_the_processors_ids(tiny):
    vlm, records, _, prompts, _ = tiny
    for prompt, record in zip(prompts, records, strict=True):
        assert [id for id in prompt if id != vlm.model.config.image_token_id] == record["text_ids"]


@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "one batch"])
def test_tiny_logits(tiny, one_by_one):
    vlm, _, golden, prompts, pictures = tiny
    groups = [[i] for i in range(len(prompts))] if one_by_one else [range(len(prompts))]
    ours = [
        out
        for group in groups
        for out in logits(vlm.model, [prompts[i] for i in group], [[pictures[i]] for i in group])
    ]
    close(torch.stack([out[-1] for out in ours]), golden["last"])
    for number in range(sum(name.startswith("whole") for name in golden)):
        place = prompts[number].index(vlm.model.config.image_token_id)
        after = len(prompts[number]) - place - 1
        close(torch.cat([ours[number][:place], ours[number][-after:]]), golden[f"whole{number}"])


@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "one batch"])
def test_tiny_captions(tiny, one_by_one):
    vlm, records, _, prompts, pictures = tiny
    rows = [
        share_prefix([prompt], [picture]) for prompt, picture in zip(prompts, pictures, strict=True)
    ]
    stops = {end_token_id(vlm.tokenizer, "vicuna")}
    ours = [
        ids
        for group in ([[row] for row in rows] if one_by_one else [rows])
        for ids in generate(vlm.model, group, SamplingParams(64), stop_ids=stops)
    ]
    assert ours == [record["ids"] for record in records]
    assert [decode_response(vlm.tokenizer, "vicuna", ids) for ids in ours] == [
        record["text"] for record in records
    ]


def test_tiny_scores_are_the_librarys(tiny):
    """What `sample.py score` gives for POVID records: summed log-probs within max(1e-6 |x|, 1e-5 a token) of transformers'."""
    vlm, about = tiny[0], json.loads((GOLDEN / "tiny.json").read_text())
    records = {record.id: record for record in read_records([TINY / "train" / "povid.json"], None)}
    for score in about["scores"]:
        record = records[score["id"]]
        logps, counts = response_logps(
            vlm.model,
            pack_examples(vlm, [encode_example(vlm, record, [record.chosen, record.rejected])]),
        )
        for ours, theirs, tokens in zip(
            logps[0].tolist(), (score["logp_chosen"], score["logp_rejected"]), counts[0].tolist()
        ):
            assert abs(ours - theirs) <= max(1e-6 * abs(theirs), 1e-5 * tokens)


# The random models of tests/golden/models/cases.py.
MODELS = np.load(GOLDEN / "models" / "golden.npz")
SAVED_CONFIGS = json.loads((GOLDEN / "models" / "golden.json").read_text())["configs"]


def looked(model):
    """Features of the pictures of each prompt of cases.py, all seen in one batch."""
    c, tiles = model.config, {}
    for size in itertools.chain(*(sizes for _, sizes in cases.PROMPTS)):
        count = (
            1 + np.prod(grid_shape(size, c.image_grid_pinpoints, c.vision.image_size))
            if c.image_grid_pinpoints
            else 1
        )
        tiles[size] = torch.from_numpy(cases.pixels(size, count, c.vision.image_size))
    features = dict(
        zip(tiles, model.encode_images([(tiles[size], size) for size in tiles]), strict=True)
    )
    return [[features[size] for size in sizes] for _, sizes in cases.PROMPTS]


@pytest.fixture(scope="module", params=cases.CONFIGS)
def random_model(request, tmp_path_factory):
    """(model, its golden arrays, Features of each prompt's pictures), loaded from a directory as a user's would be."""
    name = request.param
    model = load_model(cases.write(tmp_path_factory.mktemp(name), name))
    return (
        model,
        {
            what.removeprefix(f"{name}: "): MODELS[what]
            for what in MODELS
            if what.startswith(f"{name}: ")
        },
        looked(model),
    )


@pytest.mark.parametrize("name", cases.CONFIGS | cases.PUBLIC)
def test_configs_of_transformers_4_and_5_say_the_same(name):
    raw = (cases.CONFIGS | cases.PUBLIC)[name]
    config = parse_config(raw, "config.json")
    assert config == parse_config(SAVED_CONFIGS[name], "config.json")
    assert config.text.rope_theta == raw["text_config"].get("rope_theta", 10000)
    assert (config.text.rope_scaling is not None) == (name == "next_llama3")


def test_vision_features(random_model):
    _, golden, pictures = random_model
    for picture in itertools.chain(*pictures):
        close(picture.tiles, golden[f"features {picture.size}"])


def test_projector(random_model):
    model, golden, pictures = random_model
    for picture in itertools.chain(*pictures):
        close(model.multi_modal_projector(picture.tiles), golden[f"projected {picture.size}"])


def test_packed_vectors(random_model):
    model, golden, pictures = random_model
    every = list(itertools.chain(*pictures))
    for picture, vectors in zip(every, model.project_image_features(every), strict=True):
        close(vectors, golden[f"vectors {picture.size}"])


@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "one batch"])
def test_logits(random_model, one_by_one):
    model, golden, pictures = random_model
    prompts = [prompt for prompt, _ in cases.PROMPTS]
    groups = [[i] for i in range(len(prompts))] if one_by_one else [range(len(prompts))]
    ours = [
        out
        for group in groups
        for out in logits(model, [prompts[i] for i in group], [pictures[i] for i in group])
    ]
    for number, prompt in enumerate(prompts):
        expanded = expand_image_placeholders(
            prompt,
            [len(golden[f"vectors {picture.size}"]) for picture in pictures[number]],
            cases.IMAGE,
        )
        close(ours[number][~torch.tensor(expanded.is_image)], golden[f"logits {number}"])


@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "one batch"])
def test_greedy_ids(random_model, one_by_one):
    model, golden, pictures = random_model
    rows = [
        share_prefix([prompt], own)
        for (prompt, _), own in zip(cases.PROMPTS, pictures, strict=True)
    ]
    ours = [
        ids
        for group in ([[row] for row in rows] if one_by_one else [rows])
        for ids in generate(model, group, SamplingParams(64), stop_ids=set())
    ]
    assert ours == [golden[f"greedy {number}"].tolist() for number in range(len(rows))]
