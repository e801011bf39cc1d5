"""The reward model: scores against the slow twin's last state, files that give the same scores again, and folders that are none."""

import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from minialign import reference
from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.methods.base import encode_example, pack_examples
from minialign.models.adapters import save_adapter
from minialign.models.checkpoint import save_model
from minialign.models.policy import Policy
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


def trained(vlm, rank=4):
    """A policy with a scalar head, everything pushed away from where it starts."""
    policy, generator = Policy(vlm.model, rank, 8), torch.Generator().manual_seed(3)
    policy.add_scalar_head()
    for name, p in policy.parameters().items():
        p.data += (0.3 if name.startswith("score.") else 0.02) * torch.randn(
            p.shape, generator=generator
        )
    return policy


def close(ours, theirs):
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_score_is_read_after_the_last_token(vlm, records):
    """Rows of two responses of unlike length against one whole sequence each, the end token read: head(states[-1])."""
    head = trained(vlm).scalar_head
    examples = [encode_example(vlm, record, texts) for record, texts in zip(records, TEXTS)]
    with torch.no_grad():
        found = score_responses(vlm.model, head, pack_examples(vlm, examples))
        slow = [
            [
                head(
                    reference.hidden_states(
                        vlm.model,
                        example.prompt_ids,
                        vlm.encode_images(example.record.paths),
                        response,
                    )[-1]
                )
                for response in example.responses
            ]
            for example in examples
        ]
    assert (
        found.shape == (3, 2) and found.dtype == torch.float32 and close(found, torch.tensor(slow))
    )
    assert found.std() > 0.1  # not all the same


def test_texts_are_scored_with_their_end_token_whatever_their_company(vlm, records):
    """Against the slow twin, together and one by one; a longer sibling and other records move nothing but rounding."""
    reward = RewardModel(vlm, trained(vlm).scalar_head)
    together = reward.score(records[:3], TEXTS)
    with torch.no_grad():
        for record, texts, found in zip(records, TEXTS, together):
            prompt = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
            slow = [
                reward.head(
                    reference.hidden_states(
                        vlm.model,
                        prompt,
                        vlm.encode_images(record.paths),
                        encode_response(vlm.tokenizer, vlm.template, text),
                    )[-1]
                )
                for text in texts
            ]
            assert close(found, torch.cat(slow))
    assert close(reward.score(records[:3], TEXTS, batch=1), together) and close(
        reward.score(records[1:2], TEXTS[1:2]), together[1:2]
    )
    alone = torch.cat(
        [reward.score(records[:3], [own[side : side + 1] for own in TEXTS]) for side in (0, 1)], 1
    )
    assert close(alone, together)


def test_a_response_that_fills_the_context_is_scored(vlm, records):
    """512 tokens with its end token, all of them read: no more than the model takes."""
    policy = trained(vlm)
    example = encode_example(vlm, records[0], ["cup " * 425, "No."])
    assert example.num_image_tokens + len(example.prompt_ids) - 1 + len(example.responses[0]) == 512
    with torch.no_grad():
        (found,) = score_responses(vlm.model, policy.scalar_head, pack_examples(vlm, [example]))
        slow = policy.scalar_head(
            reference.hidden_states(
                vlm.model,
                example.prompt_ids,
                vlm.encode_images(records[0].paths),
                example.responses[0],
            )[-1]
        )
    assert close(found[:1], slow)


def test_a_head_that_has_learnt_nothing_ties_everything(vlm, records):
    policy = Policy(vlm.model, 4, 8)
    policy.add_scalar_head()
    assert RewardAnnotator(RewardModel(vlm, policy.scalar_head)).compare(
        records[:2], ["A cup."] * 2, ["A dog."] * 2
    ) == [None, None]


def saved(policy, folder, base=TINY / "model"):
    save_reward_model(policy, "vicuna", folder)
    save_adapter(policy, folder / "adapter", base)
    return folder


def test_a_reward_saved_and_loaded_gives_the_same_scores(vlm, records, tmp_path):
    """Head, adapter and trained projector come back, onto the base that the adapter names; nothing of it learns any more."""
    policy = trained(vlm)
    before = RewardModel(vlm, policy.scalar_head).score(records[:3], TEXTS)
    loaded = load_reward_model(saved(policy, tmp_path / "reward"), tmp_path / "nowhere")
    assert torch.equal(loaded.score(records[:3], TEXTS), before)
    assert not any(p.requires_grad for p in loaded.vlm.model.parameters())


def test_a_base_that_is_gone_is_replaced_by_the_given_one(vlm, records, tmp_path):
    policy = trained(vlm)
    before = RewardModel(vlm, policy.scalar_head).score(records[:3], TEXTS)
    folder = saved(policy, tmp_path / "reward", tmp_path / "gone")
    assert torch.equal(load_reward_model(folder, TINY / "model").score(records[:3], TEXTS), before)


@pytest.mark.parametrize("base", ["gone too", None])
def test_a_reward_without_any_base_is_refused(vlm, tmp_path, base):
    """None: a command that was given no --model."""
    folder = saved(trained(vlm), tmp_path / "reward", tmp_path / "gone")
    with pytest.raises(InputError):
        load_reward_model(folder, base and tmp_path / base)


def test_a_reward_of_all_weights_is_loaded_from_its_model(vlm, records, tmp_path):
    policy = trained(vlm, rank=0)
    save_reward_model(policy, "vicuna", tmp_path)
    policy.merge()
    save_model(vlm.model, TINY / "model", tmp_path / "model")
    before = RewardModel(vlm, policy.scalar_head).score(records[:3], TEXTS)
    assert torch.equal(
        load_reward_model(tmp_path, tmp_path / "nowhere").score(records[:3], TEXTS), before
    )


@pytest.fixture()
def folder(vlm, tmp_path):
    return saved(trained(vlm), tmp_path / "reward")


def refused(folder):
    """What is said of a folder that is no reward."""
    with pytest.raises(InputError) as error:
        load_reward_model(folder, TINY / "model")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_head_of_another_width_is_refused(folder):
    """With what it holds and what it should."""
    file = folder / "score.safetensors"
    state = load_file(file)
    save_file(
        {
            name: tensor[..., :64].contiguous() if name == "weight" else tensor
            for name, tensor in state.items()
        },
        file,
    )
    said = refused(folder)
    assert str(file) in said and "(1, 64)" in said and "128" in said
    save_file({"weight": state["weight"]}, file)
    assert str(file) in refused(folder)


def test_a_truncated_head_is_refused(folder):
    file = folder / "score.safetensors"
    for share in (0.9, 0.1, 0):
        file.write_bytes(file.read_bytes()[: int(len(file.read_bytes()) * share)])
        assert str(file) in refused(folder)


def test_a_folder_without_head_or_adapter_is_refused(folder, tmp_path):
    assert "score.safetensors" in refused(tmp_path) and "score.safetensors" in refused(
        tmp_path / "none"
    )
    shutil.rmtree(folder / "adapter")
    assert "adapter_config.json" in refused(folder)
