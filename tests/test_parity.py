"""The same numbers as transformers: logits, greedy ids, then the string (tests/golden/make_tiny.py, make_models.py)."""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.models import cases

from minialign.checkpoint import load_model
from minialign.config import parse_config
from minialign.data import read_records
from minialign.images import grid_shape
from minialign.logprobs import response_logps
from minialign.methods import encode_example, rows_of
from minialign.prompts import decode_response, encode_prompt, end_id
from minialign.rows import Row, expand, hidden_states, pack
from minialign.sampling import respond, share_prefix
from minialign.subject import load_subject

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
        model, [Row(prompt, own, []) for prompt, own in zip(prompts, pictures, strict=True)]
    )
    return [
        out[:length]
        for out, length in zip(
            hidden_states(model, batch) @ model.head.T, batch.prefix, strict=True
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
    subject, records = load_subject(TINY / "model"), about["records"]
    prompts = [
        encode_prompt(subject.tokenizer, "vicuna", [f"<image>\n{record['question']}"])
        for record in records
    ]
    return (
        subject,
        records,
        np.load(GOLDEN / "tiny.npz"),
        prompts,
        subject.look([TINY / record["image"] for record in records]),
    )


def test_tiny_prompts_are_the_processors_ids(tiny):
    subject, records, _, prompts, _ = tiny
    for prompt, record in zip(prompts, records, strict=True):
        assert [id for id in prompt if id != subject.model.config.image_token] == record["text_ids"]


@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "one batch"])
def test_tiny_logits(tiny, one_by_one):
    subject, _, golden, prompts, pictures = tiny
    groups = [[i] for i in range(len(prompts))] if one_by_one else [range(len(prompts))]
    ours = [
        out
        for group in groups
        for out in logits(
            subject.model, [prompts[i] for i in group], [[pictures[i]] for i in group]
        )
    ]
    close(torch.stack([out[-1] for out in ours]), golden["last"])
    for number in range(sum(name.startswith("whole") for name in golden)):
        place = prompts[number].index(subject.model.config.image_token)
        after = len(prompts[number]) - place - 1
        close(torch.cat([ours[number][:place], ours[number][-after:]]), golden[f"whole{number}"])


@pytest.mark.parametrize("one_by_one", [True, False], ids=["one by one", "one batch"])
def test_tiny_captions(tiny, one_by_one):
    subject, records, _, prompts, pictures = tiny
    rows = [
        share_prefix([prompt], [picture]) for prompt, picture in zip(prompts, pictures, strict=True)
    ]
    stops = {end_id(subject.tokenizer, "vicuna")}
    ours = [
        ids
        for group in ([[row] for row in rows] if one_by_one else [rows])
        for ids in respond(subject.model, group, 64, stops)
    ]
    assert ours == [record["ids"] for record in records]
    assert [decode_response(subject.tokenizer, "vicuna", ids) for ids in ours] == [
        record["text"] for record in records
    ]


def test_tiny_scores_are_the_librarys(tiny):
    """What `sample.py score` gives for POVID records: summed log-probs within max(1e-6 |x|, 1e-5 a token) of transformers'."""
    subject, about = tiny[0], json.loads((GOLDEN / "tiny.json").read_text())
    records = {record.id: record for record in read_records([TINY / "train" / "povid.json"], None)}
    for score in about["scores"]:
        record = records[score["id"]]
        logps, counts = response_logps(
            subject.model,
            rows_of(subject, [encode_example(subject, record, [record.chosen, record.rejected])]),
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
            1 + np.prod(grid_shape(size, c.pinpoints, c.vision.image_size)) if c.pinpoints else 1
        )
        tiles[size] = torch.from_numpy(cases.pixels(size, count, c.vision.image_size))
    features = dict(zip(tiles, model.look([(tiles[size], size) for size in tiles]), strict=True))
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
    assert config.text.theta == raw["text_config"].get("rope_theta", 10000)
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
    for picture, vectors in zip(every, model.vectors(every), strict=True):
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
        _, _, is_vector, _ = expand(
            prompt,
            [len(golden[f"vectors {picture.size}"]) for picture in pictures[number]],
            cases.IMAGE,
        )
        close(ours[number][~torch.tensor(is_vector)], golden[f"logits {number}"])


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
        for ids in respond(model, group, 64, set())
    ]
    assert ours == [golden[f"greedy {number}"].tolist() for number in range(len(rows))]
