"""Test the reward model: scores against the slow ones, saving and loading, and broken folders."""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from minialign import reference
from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.logprobs import batches_that_fit
from minialign.methods.base import encode_example, pack_examples
from minialign.models.adapters import save_adapter
from minialign.models.checkpoint import save_model
from minialign.models.policy import Policy
from minialign.pairs import image_batches
from minialign.pairs import reward_model as reward_model_module
from minialign.pairs.annotators import RewardAnnotator
from minialign.pairs.reward_model import (
    RewardModel,
    load_reward_model,
    save_reward_model,
    score_responses,
)
from minialign.utils.files import InputError

TEXTS = [
    ["A red cup is here.", "No."],
    ["Yes.", "There is a dog. " * 4],
    ["A cup. A red cup at the top left.", "A cup."],
]


def train_a_little(vlm, rank=4):
    """Return a policy with a scalar head whose weights have all moved from where they start."""
    policy = Policy(vlm.model, rank, 8)
    policy.add_scalar_head()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.parameters().items():
        scale = 0.3 if name.startswith("score.") else 0.02
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return policy


def are_close(scores, expected_scores):
    """Return whether scores agree up to rounding."""
    return torch.allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)


def score_slowly(vlm, head, record, texts):
    """Return the scores (k,) of responses given as texts, each read as one whole sequence."""
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
    image_features = vlm.encode_images(record.paths)
    scores = []
    for text in texts:
        response = encode_response(vlm.tokenizer, vlm.template, text)
        scores.append(
            reference.score_response(vlm.model, head, prompt_ids, image_features, response)
        )
    return torch.stack(scores)


@torch.no_grad()
def test_a_score_is_read_after_the_last_token(vlm, records):
    """Packed rows of two responses of different lengths, against one sequence each."""
    head = train_a_little(vlm).scalar_head
    examples = []
    slow_scores = []
    for record, texts in zip(records, TEXTS, strict=False):
        examples.append(encode_example(vlm, record, texts))
        slow_scores.append(score_slowly(vlm, head, record, texts))

    scores = score_responses(vlm.model, head, pack_examples(vlm, examples))

    assert scores.shape == (3, 2)
    assert scores.dtype == torch.float32
    assert scores.std() > 0.1  # not all the same
    assert are_close(scores, torch.stack(slow_scores))


@torch.no_grad()
def test_scores_of_texts_are_independent_of_batch_composition(vlm, records):
    """A longer response beside it, other records or another batch size change only the rounding."""
    reward_model = RewardModel(vlm, train_a_little(vlm).scalar_head)

    together = reward_model.score(records[:3], TEXTS)

    for record, texts, scores in zip(records, TEXTS, together, strict=False):
        assert are_close(scores, score_slowly(vlm, reward_model.head, record, texts))
    assert are_close(reward_model.score(records[:3], TEXTS, batch_size=1), together)
    assert are_close(reward_model.score(records[1:2], TEXTS[1:2]), together[1:2])
    first_texts = [[first] for first, _ in TEXTS]
    second_texts = [[second] for _, second in TEXTS]
    assert are_close(reward_model.score(records[:3], first_texts), together[:, :1])
    assert are_close(reward_model.score(records[:3], second_texts), together[:, 1:])


@torch.no_grad()
def test_a_response_that_fills_the_context_is_scored(vlm, records):
    """512 tokens with the end token, and all of them are read."""
    head = train_a_little(vlm).scalar_head
    long_text = "cup " * 425
    example = encode_example(vlm, records[0], [long_text, "No."])
    prompt_length = example.num_image_tokens + len(example.prompt_ids) - 1
    assert prompt_length + len(example.responses[0]) == 512

    (scores,) = score_responses(vlm.model, head, pack_examples(vlm, [example]))

    assert are_close(scores[:1], score_slowly(vlm, head, records[0], [long_text]))


def test_responses_are_scored_in_batches_that_fit(vlm, records, monkeypatch):
    """Where two rows do not fit, each is a batch, and the scores change by rounding alone."""
    reward_model = RewardModel(vlm, train_a_little(vlm).scalar_head)
    together = reward_model.score(records[:3], TEXTS)
    batch_sizes = []

    def score_batch(model, head, rows):
        batch_sizes.append(len(rows))
        return score_responses(model, head, rows)

    monkeypatch.setattr(reward_model_module, "score_responses", score_batch)
    one_row = partial(batches_that_fit, max_tokens=1)
    monkeypatch.setattr(image_batches, "batches_that_fit", one_row)
    apart = reward_model.score(records[:3], TEXTS)

    assert batch_sizes == [1, 1, 1]
    assert are_close(apart, together)


def test_a_prompt_that_fills_the_context_is_refused_before_the_work(vlm, records):
    """Responses are cut to the room that the prompt leaves, and of none nothing would be left."""
    long_record = replace(records[0], turns=("<image>\n" + "Is there a cup? " * 99,))
    reward_model = RewardModel(vlm, None)

    reward_model.check_records(records[1:3])

    with pytest.raises(InputError, match="record 1 .*the reward model's context of 512"):
        reward_model.check_records([records[1], long_record])


def test_an_image_that_cannot_be_read_names_its_record(vlm, records, tmp_path):
    (tmp_path / "image.png").write_text("hello")
    record = replace(records[1], paths=(str(tmp_path / "image.png"),))

    with pytest.raises(InputError, match="record 2 .*image.png: not an image"):
        RewardModel(vlm, None).check_records([records[0], record])


def test_an_untrained_head_gives_ties(vlm, records):
    """It starts at zero, so all scores are equal."""
    policy = Policy(vlm.model, 4, 8)
    policy.add_scalar_head()
    annotator = RewardAnnotator(RewardModel(vlm, policy.scalar_head))

    verdicts = annotator.compare(records[:2], ["A cup."] * 2, ["A dog."] * 2)

    assert verdicts == [None, None]


# --- Saving and loading


def save_with_adapter(policy, folder, base=TINY / "model"):
    """Write what `train.py --method reward` writes: scalar head and adapter."""
    save_reward_model(policy, "vicuna", folder)
    save_adapter(policy, folder / "adapter", base)


def test_a_loaded_reward_model_gives_the_same_scores(vlm, records, tmp_path):
    """Head, adapter and projector come back, on the base that the adapter names, and are frozen."""
    policy = train_a_little(vlm)
    scores = RewardModel(vlm, policy.scalar_head).score(records[:3], TEXTS)
    save_with_adapter(policy, tmp_path / "reward")

    loaded = load_reward_model(tmp_path / "reward", tmp_path / "nowhere")

    assert torch.equal(loaded.score(records[:3], TEXTS), scores)
    assert not any(parameter.requires_grad for parameter in loaded.vlm.model.parameters())


def test_a_missing_base_is_replaced_by_the_given_one(vlm, records, tmp_path):
    """The adapter names a folder that is not there."""
    policy = train_a_little(vlm)
    scores = RewardModel(vlm, policy.scalar_head).score(records[:3], TEXTS)
    save_with_adapter(policy, tmp_path / "reward", base=tmp_path / "missing")

    loaded = load_reward_model(tmp_path / "reward", TINY / "model")

    assert torch.equal(loaded.score(records[:3], TEXTS), scores)


def test_another_base_is_reported(vlm, tmp_path, capsys):
    """The given base has the shapes of the missing one, but other weights."""
    save_with_adapter(train_a_little(vlm), tmp_path / "reward", base=tmp_path / "missing")
    other_base = shutil.copytree(TINY / "model", tmp_path / "other")
    weights = load_file(other_base / "model.safetensors")
    weights["language_model.model.norm.weight"] *= 1.5
    save_file(weights, other_base / "model.safetensors")

    load_reward_model(tmp_path / "reward", other_base)

    assert f"trained on other weights than those of {other_base}" in capsys.readouterr().err


@pytest.mark.parametrize("name_of_base", ["missing too", None])
def test_a_reward_model_without_a_base_is_refused(vlm, tmp_path, name_of_base):
    """The given base is missing as well, or none is given: a command without --model."""
    save_with_adapter(train_a_little(vlm), tmp_path / "reward", base=tmp_path / "missing")
    base = None
    if name_of_base is not None:
        base = tmp_path / name_of_base

    with pytest.raises(InputError):
        load_reward_model(tmp_path / "reward", base)


def test_a_reward_model_of_all_weights_is_loaded_from_its_model(vlm, records, tmp_path):
    """Rank 0 writes model/ instead of adapter/, and needs no base."""
    policy = train_a_little(vlm, rank=0)
    save_reward_model(policy, "vicuna", tmp_path)
    policy.merge()
    save_model(vlm.model, TINY / "model", tmp_path / "model")
    scores = RewardModel(vlm, policy.scalar_head).score(records[:3], TEXTS)

    loaded = load_reward_model(tmp_path, tmp_path / "nowhere")

    assert torch.equal(loaded.score(records[:3], TEXTS), scores)


# --- Folders that hold no reward model


@pytest.fixture()
def reward_folder(vlm, tmp_path):
    """Return a folder with a reward model, for a test to damage."""
    save_with_adapter(train_a_little(vlm), tmp_path / "reward")
    return tmp_path / "reward"


def error_of(folder):
    """Return the message of one line with which a folder is refused."""
    with pytest.raises(InputError) as error:
        load_reward_model(folder, TINY / "model")
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_head_of_another_width_is_refused(reward_folder):
    """The message names the file, the shape that it has and the one that it should have."""
    head_file = reward_folder / "score.safetensors"
    tensors = load_file(head_file)
    narrow_weight = tensors["weight"][:, :64].contiguous()
    save_file({"weight": narrow_weight, "bias": tensors["bias"]}, head_file)

    message = error_of(reward_folder)

    assert str(head_file) in message
    assert "(1, 64)" in message
    assert "128" in message


def test_a_head_without_a_bias_is_refused(reward_folder):
    """The message names the file."""
    head_file = reward_folder / "score.safetensors"
    save_file({"weight": load_file(head_file)["weight"]}, head_file)

    assert str(head_file) in error_of(reward_folder)


def test_a_head_for_an_unknown_template_is_refused(reward_folder):
    """The message names the file that names the template."""
    head_file = reward_folder / "score.safetensors"
    save_file(load_file(head_file), head_file, metadata={"template": "nothing"})

    message = error_of(reward_folder)

    assert str(head_file) in message
    assert "'nothing' is unknown" in message


def test_a_truncated_head_is_refused(reward_folder):
    """Whatever is left of the file, even nothing."""
    head_file = reward_folder / "score.safetensors"
    for share in (0.9, 0.1, 0):
        content = head_file.read_bytes()
        head_file.write_bytes(content[: int(len(content) * share)])
        assert str(head_file) in error_of(reward_folder)


def test_a_folder_without_a_head_is_refused(reward_folder, tmp_path):
    """Neither its parent nor a folder that is not there is a reward model."""
    assert "score.safetensors" in error_of(tmp_path)
    assert "score.safetensors" in error_of(tmp_path / "none")


def test_a_folder_without_an_adapter_is_refused(reward_folder):
    """The message names the file of the adapter that is missing."""
    shutil.rmtree(reward_folder / "adapter")

    assert "adapter_config.json" in error_of(reward_folder)
