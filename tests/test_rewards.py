"""The reward model: scores against the slow twin's last state, files that give the same scores again, and folders that are none."""

import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from minialign import plain
from minialign.adapters import save_adapter
from minialign.annotators import ByReward
from minialign.checkpoint import save_model
from minialign.files import BadInput
from minialign.lora import Policy
from minialign.methods import encode_example, rows_of
from minialign.prompts import encode_prompt, encode_response
from minialign.rewards import Reward, load_reward, save_reward, scores

TEXTS = [
    ["A red cup is here.", "No."],
    ["Yes.", "There is a dog. " * 4],
    ["A cup. A red cup at the top left.", "A cup."],
]


def trained(subject, rank=4):
    """A policy with a scalar head, everything pushed away from where it starts."""
    policy, generator = Policy(subject.model, rank, 8), torch.Generator().manual_seed(3)
    policy.add_score()
    for name, p in policy.parameters().items():
        p.data += (0.3 if name.startswith("score.") else 0.02) * torch.randn(
            p.shape, generator=generator
        )
    return policy


def close(ours, theirs):
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_score_is_read_after_the_last_token(subject, records):
    """Rows of two responses of unlike length against one whole sequence each, the end token read: head(states[-1])."""
    head = trained(subject).score
    examples = [encode_example(subject, record, texts) for record, texts in zip(records, TEXTS)]
    with torch.no_grad():
        found = scores(subject.model, head, rows_of(subject, examples))
        slow = [
            [
                head(
                    plain.states(
                        subject.model, example.prompt, subject.look(example.record.paths), response
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


def test_texts_are_scored_with_their_end_token_whatever_their_company(subject, records):
    """Against the slow twin, together and one by one; a longer sibling and other records move nothing but rounding."""
    reward = Reward(subject, trained(subject).score)
    together = reward.score(records[:3], TEXTS)
    with torch.no_grad():
        for record, texts, found in zip(records, TEXTS, together):
            prompt = encode_prompt(subject.tokenizer, subject.template, record.turns)
            slow = [
                reward.head(
                    plain.states(
                        subject.model,
                        prompt,
                        subject.look(record.paths),
                        encode_response(subject.tokenizer, subject.template, text),
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


def test_a_response_that_fills_the_context_is_scored(subject, records):
    """512 tokens with its end token, all of them read: no more than the model takes."""
    policy = trained(subject)
    example = encode_example(subject, records[0], ["cup " * 425, "No."])
    assert example.vectors + len(example.prompt) - 1 + len(example.responses[0]) == 512
    with torch.no_grad():
        (found,) = scores(subject.model, policy.score, rows_of(subject, [example]))
        slow = policy.score(
            plain.states(
                subject.model, example.prompt, subject.look(records[0].paths), example.responses[0]
            )[-1]
        )
    assert close(found[:1], slow)


def test_a_head_that_has_learnt_nothing_ties_everything(subject, records):
    policy = Policy(subject.model, 4, 8)
    policy.add_score()
    assert ByReward(Reward(subject, policy.score)).better(
        records[:2], ["A cup."] * 2, ["A dog."] * 2
    ) == [None, None]


def saved(policy, folder, base=TINY / "model"):
    save_reward(policy, "vicuna", folder)
    save_adapter(policy, folder / "adapter", base)
    return folder


def test_a_reward_saved_and_loaded_gives_the_same_scores(subject, records, tmp_path):
    """Head, adapter and trained projector come back, onto the base that the adapter names; nothing of it learns any more."""
    policy = trained(subject)
    before = Reward(subject, policy.score).score(records[:3], TEXTS)
    loaded = load_reward(saved(policy, tmp_path / "reward"), tmp_path / "nowhere")
    assert torch.equal(loaded.score(records[:3], TEXTS), before)
    assert not any(p.requires_grad for p in loaded.subject.model.parameters())


def test_a_base_that_is_gone_is_replaced_by_the_given_one(subject, records, tmp_path):
    policy = trained(subject)
    before = Reward(subject, policy.score).score(records[:3], TEXTS)
    folder = saved(policy, tmp_path / "reward", tmp_path / "gone")
    assert torch.equal(load_reward(folder, TINY / "model").score(records[:3], TEXTS), before)


@pytest.mark.parametrize("base", ["gone too", None])
def test_a_reward_without_any_base_is_refused(subject, tmp_path, base):
    """None: a command that was given no --model."""
    folder = saved(trained(subject), tmp_path / "reward", tmp_path / "gone")
    with pytest.raises(BadInput):
        load_reward(folder, base and tmp_path / base)


def test_a_reward_of_all_weights_is_loaded_from_its_model(subject, records, tmp_path):
    policy = trained(subject, rank=0)
    save_reward(policy, "vicuna", tmp_path)
    policy.merge()
    save_model(subject.model, TINY / "model", tmp_path / "model")
    before = Reward(subject, policy.score).score(records[:3], TEXTS)
    assert torch.equal(
        load_reward(tmp_path, tmp_path / "nowhere").score(records[:3], TEXTS), before
    )


@pytest.fixture()
def folder(subject, tmp_path):
    return saved(trained(subject), tmp_path / "reward")


def refused(folder):
    """What is said of a folder that is no reward."""
    with pytest.raises(BadInput) as error:
        load_reward(folder, TINY / "model")
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
