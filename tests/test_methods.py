"""Methods: their gradients against the slow twins, step 0, a reference that never moves, and what each of them collects."""

import copy
import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, each_token
from safetensors.torch import load_file

from minialign import reference
from minialign.data.chat_templates import decode_response, encode_response
from minialign.data.diffusion import diffuse
from minialign.data.image_processor import preprocess
from minialign.data.images import open_image
from minialign.generation.decoding import SamplingParams, prefill
from minialign.logprobs import response_logps
from minialign.methods import base as methods_base
from minialign.methods.base import add_reference_logps, encode_example, microbatches, pack_examples
from minialign.methods.online import collect_distortion, collect_online, collect_online_bdhs
from minialign.methods.policy_gradient import ppo_method, reward_statistics, rloo_method
from minialign.methods.preference import preference_method, reward_model_method, sft_method
from minialign.methods.responses import generate_responses
from minialign.models.loading import load_vlm
from minialign.models.policy import Policy, scalar_head
from minialign.pairs import reward_model as reward_models
from minialign.pairs.annotators import RewardAnnotator
from minialign.training.loop import Schedule, train
from minialign.utils.seeding import seeded_generator

BETA, LN2 = 0.3, float(torch.tensor(2.0).log())


@pytest.fixture()
def vlm(vlm):
    """The shipped model with its vocabulary head turned down: as it is, it is too sure of itself for two draws to differ."""
    vlm.model.lm_head.weight.data *= 0.4
    return vlm


@pytest.fixture()
def short(records):
    """Records of short pairs of unequal length: the twins run a sequence for every token."""
    texts = (
        ("A cup.", "No red dog."),
        ("Yes, a dog.", "No."),
        ("There is a lamp.", "Two pens."),
        ("No cat.", "A white cat."),
    )
    return [
        replace(record, chosen=chosen, rejected=rejected)
        for record, (chosen, rejected) in zip(records, texts)
    ]


class First:
    """An annotator: what comes first in the alphabet is better."""

    def compare(self, records, firsts, seconds):
        return [int(second < first) for first, second in zip(firsts, seconds)]


class Verdicts:
    """An annotator whose verdicts are known, by record; it notes what it was asked."""

    def __init__(self, verdicts):
        self.verdicts, self.asked = verdicts, []

    def compare(self, records, firsts, seconds):
        self.asked += zip([record.id for record in records], firsts, seconds)
        return [self.verdicts[record.id] for record in records]


class Letters:
    """A reward: how many vowels a response has."""

    def score(self, records, texts):
        return torch.tensor(
            [[float(sum(text.count(vowel) for vowel in "aeiou")) for text in own] for own in texts]
        )


class Denials:
    """A sampler of rejected responses, another one each step."""

    def pairs(self, records, step):
        return [
            {"chosen": record.chosen, "rejected": f"A {step}.", "rounds": 1 + i}
            for i, record in enumerate(records)
        ]


OFFLINE = ("sft", "dpo", "ipo", "ipo-mean", "slic", "slic-calibration", "reward")
METHODS = (
    *OFFLINE,
    "online-dpo",
    "mixed-dpo",
    "online-bdhs",
    "averaged-bdhs",
    "distortion",
    "rloo",
    "ppo",
)
GAMMA = 0.4


def ready(name, vlm, records, rank=4, reward=Letters(), scale=(2.0, 1.5)):
    """(policy, method, examples) of the method called `name`; offline pairs have their references."""
    policy = Policy(vlm.model, rank, 8, seed=1)
    if name in ("reward", "ppo"):
        policy.add_scalar_head()
    texts = {"online-bdhs": lambda record: [record.chosen]}.get(
        name, lambda record: [record.chosen, record.rejected]
    )
    examples = [encode_example(vlm, record, texts(record)) for record in records]
    if name in (*OFFLINE, "mixed-dpo"):
        add_reference_logps(policy, vlm, examples)
    sampling, pairs = (
        SamplingParams(max_new_tokens=4, seed=7),
        partial(preference_method, vlm, "dpo", BETA),
    )
    averaged = {"weights": (GAMMA, 1 - GAMMA)}
    return (
        policy,
        {
            "sft": lambda: sft_method(vlm),
            "reward": lambda: reward_model_method(policy, vlm),
            "online-dpo": lambda: pairs(collect=collect_online(policy, vlm, First(), sampling)),
            "mixed-dpo": lambda: pairs(collect=collect_online(policy, vlm, First(), sampling, 0.5)),
            "online-bdhs": lambda: pairs(collect=collect_online_bdhs(policy, vlm, Denials())),
            "averaged-bdhs": lambda: pairs(
                collect=collect_online_bdhs(policy, vlm, Denials()), **averaged
            ),
            "distortion": lambda: pairs(
                collect=collect_distortion(policy, vlm, 500, 3), **averaged
            ),
            "rloo": lambda: rloo_method(policy, vlm, reward, scale, sampling, BETA),
            "ppo": lambda: ppo_method(policy, vlm, reward, scale, sampling, BETA),
        }.get(name, lambda: preference_method(vlm, name, BETA))(),
        examples,
    )


def loss_of(method, examples, tokens=16384):
    """(loss, means) of step 0 over what the method collects, in the parts that `add_references` makes."""
    found, means = method.collect(examples, 0)
    value = 0.0
    for part in microbatches(found, tokens):
        loss, stats = method.loss(part, found)
        value, means = (
            value + loss,
            means | {name: means.get(name, 0.0) + stat for name, stat in stats.items()},
        )
    return value, means


def stirred(policy, size=0.02):
    """The policy away from its reference in every trainable weight, the scalar head more so: it starts at zero."""
    generator = torch.Generator().manual_seed(5)
    for name, p in policy.parameters().items():
        p.data += (0.3 if name.startswith("score.") else size) * torch.randn(
            p.shape, generator=generator
        )
    return policy


def gradients(policy, value):
    parameters = list(policy.parameters().values())
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(torch.autograd.grad(value, parameters, allow_unused=True), parameters)
        ]
    )


def distance(a, b):
    return float((a - b).norm() / b.norm())


# --- the slow twins ---


def gaps(policy, reference, pairs, mean=False):
    """h of every (prompt, pictures, chosen, rejected), from whole sequences; of per-token means if asked."""
    found = []
    for prompt, pictures, *pair in pairs:
        gains = []
        for response in pair:
            with torch.no_grad():
                frozen = reference.response_logp(reference, prompt, pictures, response)
            gains.append(
                (reference.response_logp(policy, prompt, pictures, response) - frozen)
                / (len(response) if mean else 1)
            )
        found.append(gains[0] - gains[1])
    return torch.stack(found)


def calibrated(policy, pairs):
    """SLiC-HF's loss, mean over pairs, from whole sequences."""
    logps = [
        [reference.response_logp(policy, *told, response) for response in pair]
        for *told, chosen, rejected in pairs
        for pair in ((chosen, rejected),)
    ]
    return sum(
        torch.clamp(1 - BETA * (right - wrong), min=0) - 0.1 * BETA * right
        for right, wrong in logps
    ) / len(logps)


def slow(name, policy, reference, vlm, examples, scored):
    """The twin's loss on what was collected; `scored` are the texts' normalised rewards, worked out apart."""
    model, told = (
        vlm.model,
        [(example.prompt_ids, vlm.encode_images(example.record.paths)) for example in examples],
    )
    pairs = [(*one, *example.responses[:2]) for one, example in zip(told, examples)]
    second = [
        (*one, example.responses[0], example.responses[-1]) for one, example in zip(told, examples)
    ]
    return {
        "sft": lambda: reference.sft_loss(
            model, [(*one, example.responses[0]) for one, example in zip(told, examples)]
        ),
        "ipo": lambda: ((gaps(model, reference, pairs) - 1 / (2 * BETA)) ** 2).mean(),
        "ipo-mean": lambda: (
            (gaps(model, reference, pairs, mean=True) - 1 / (2 * BETA)) ** 2
        ).mean(),
        "slic": lambda: torch.clamp(1 - BETA * gaps(model, reference, pairs), min=0).mean(),
        "slic-calibration": lambda: calibrated(model, pairs),
        "averaged-bdhs": lambda: (
            GAMMA * reference.dpo_loss(model, reference, pairs, BETA)
            + (1 - GAMMA) * reference.dpo_loss(model, reference, second, BETA)
        ),
        "distortion": lambda: reference.averaged_loss(
            model,
            reference,
            [(*pair, example.scored_ids[-1]) for pair, example in zip(pairs, examples)],
            BETA,
            GAMMA,
        ),
        "reward": lambda: reference.reward_model_loss(model, policy.scalar_head, pairs),
        "rloo": lambda: reference.rloo_loss(
            model,
            reference,
            [(*one, example.responses, own) for one, example, own in zip(told, examples, scored)],
            BETA,
        ),
        "ppo": lambda: reference.ppo_loss(
            model,
            reference,
            policy.scalar_head,
            [(*one, *example.responses, *own) for one, example, own in zip(told, examples, scored)],
            BETA,
        ),
    }.get(name, lambda: reference.dpo_loss(model, reference, pairs, BETA))()


def real_reward():
    """A reward model of its own: the shipped model and a head with random weights."""
    judge = load_vlm(TINY / "model")
    judge.model.requires_grad_(False)
    head = scalar_head(judge.model)
    head.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return reward_models.RewardModel(judge, head.requires_grad_(False))


def scored_slowly(reward, vlm, example, scale):
    """The normalised rewards of an example's responses: each read as a whole sequence, its end token last."""
    judge, found = reward.vlm, []
    for ids in example.responses:
        text = decode_response(
            vlm.tokenizer, vlm.template, [id for id in ids if id != vlm.tokenizer.eos]
        )
        read = encode_response(judge.tokenizer, judge.template, text)
        score = reward.head(
            reference.hidden_states(
                judge.model, example.prompt_ids, judge.encode_images(example.record.paths), read
            )[-1]
        )
        found.append((float(score) - scale[0]) / scale[1])
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_step_equals_its_slow_twin(vlm, short, name):
    """The gradient over adapters, projector and scalar head on what was collected once; of pairs also the loss. Rewards are a real model's."""
    reference, reward, scale = copy.deepcopy(vlm.model), real_reward(), (0.5, 1.5)
    policy, method, examples = ready(name, vlm, short[:2], reward=reward, scale=scale)
    stirred(policy)
    found, means = method.collect(examples, 0)
    loss, stats = method.loss(found, found)
    scored = (
        [scored_slowly(reward, vlm, example, scale) for example in found]
        if name in ("rloo", "ppo")
        else None
    )
    twin = slow(name, policy, reference, vlm, found, scored)
    assert (
        len(found) == 2 and abs(stats.get("margin", 1)) > 1e-4
    )  # the policy has moved: not a comparison of ln 2 with ln 2
    assert name != "mixed-dpo" or means["offline"] == 0.5
    if name not in ("rloo", "ppo"):  # theirs is another expression of the same gradient
        assert loss.item() == pytest.approx(twin.item(), rel=1e-5)
    assert distance(gradients(policy, loss), gradients(policy, twin)) <= 1e-5


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_step_over_all_weights_equals_its_slow_twin(vlm, short, name):
    """Rank 0: decoder, head and projector are trained in place and the reference is their frozen copy."""
    reference = copy.deepcopy(vlm.model)
    policy, method, examples = ready(name, vlm, short[:3], rank=0)
    stirred(policy, 0.003)
    loss, _ = method.loss(examples, examples)
    twin = slow(name, policy, reference, vlm, examples, None)
    assert loss.item() == pytest.approx(twin.item(), rel=1e-5)
    assert distance(gradients(policy, loss), gradients(policy, twin)) <= 1e-5


# --- step 0 ---


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    "name, value",
    [
        ("dpo", LN2),
        ("ipo", 1 / (4 * BETA**2)),
        ("ipo-mean", 1 / (4 * BETA**2)),
        ("slic", 1.0),
        ("reward", LN2),
        ("online-dpo", LN2),
        ("online-bdhs", LN2),
        ("averaged-bdhs", LN2),
        ("distortion", LN2),
    ],
)
def test_at_step_0_the_margin_is_0_to_the_bit(vlm, short, rank, name, value):
    """Policy and reference in the same layout are one and the same; a scalar head starts at zero."""
    policy, method, examples = ready(name, vlm, short, rank)
    loss, means = loss_of(method, examples)
    assert means["margin"] == 0.0 and means["accuracy"] == 0.5
    assert loss.item() == pytest.approx(value, rel=2e-7)  # rounding of the mean and of beta alone


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", ["rloo", "ppo"])
def test_at_step_0_there_is_no_kl(vlm, short, rank, name):
    """Writer and reference agree to the bit; advantages sum to nothing, so that PPO's loss is its value's."""
    policy, method, examples = ready(name, vlm, short, rank)
    loss, means = loss_of(method, examples)
    assert means["kl"] == 0.0
    assert loss.item() == pytest.approx(0.1 * means.get("value_loss", 0.0), abs=1e-6)


@pytest.mark.parametrize("rank", [0, 4])
def test_step_0_with_references_from_another_layout(vlm, records, rank):
    """Within the tolerance, max(1e-6 |x|, 1e-5 tokens), where the reference saw each example alone."""
    policy = Policy(vlm.model, rank, 8)
    examples = [
        encode_example(vlm, record, [record.chosen, text])
        for record, text in zip(records, ("A red cup is here.", "No.", "There is a dog. " * 4))
    ]
    add_reference_logps(policy, vlm, examples, tokens=1)
    loss, means = preference_method(vlm, "dpo", 1.0).loss(examples, examples)
    reference, counts = (
        torch.stack([example.ref_logps for example in examples]),
        torch.tensor([[len(own) for own in example.responses] for example in examples]),
    )
    tolerance = torch.maximum(1e-6 * reference.abs(), 1e-5 * counts).sum()
    assert abs(means["margin"]) <= tolerance and abs(loss.item() - LN2) <= tolerance
    assert means["logp_chosen"] == pytest.approx(means["ref_logp_chosen"], abs=float(tolerance))


def test_references_come_to_their_own_examples(vlm, short):
    """Whatever the order and the parts in which they were computed."""
    policy, _, examples = ready("online-dpo", vlm, short)
    add_reference_logps(policy, vlm, examples, tokens=200)
    for example in examples:
        alone = response_logps(vlm.model, pack_examples(vlm, [example]))[0][0]
        torch.testing.assert_close(example.ref_logps, alone, rtol=1e-6, atol=1e-4)


# --- the loop ---


@pytest.mark.parametrize("name", METHODS)
def test_microbatches_give_the_gradient_of_the_whole_batch(vlm, short, name):
    """Collected once, then summed over parts of two and of one: gradient (relative L2), loss and every logged mean."""
    policy, method, examples = ready(name, vlm, short[:3])
    stirred(policy)
    fixed = method.collect(examples, 0)
    value, means = loss_of(method._replace(collect=lambda *_: fixed), examples)
    whole = gradients(policy, value)
    longest = max(example.length for example in fixed[0])
    for tokens in (2 * longest, 1):
        assert len(microbatches(fixed[0], tokens)) == (2 if tokens > 1 else 3)
        parts, same = loss_of(method._replace(collect=lambda *_: fixed), examples, tokens)
        assert distance(gradients(policy, parts), whole) <= 1e-5
        assert parts.item() == pytest.approx(
            value.item(), rel=1e-5, abs=1e-6
        ) and same == pytest.approx(means, rel=1e-4, abs=1e-5)


def log_of(folder):
    """The log without what may differ between two runs."""
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def dying(method, calls):
    """`method`, until its loss has been asked for that often."""
    left = iter(range(calls))

    def loss(part, whole):
        if next(left, None) is None:
            raise MemoryError("killed")
        return method.loss(part, whole)

    return method._replace(loss=loss)


def same_runs(whole, broken):
    """Whether two runs left the same log and, bit for bit, the same state."""
    states = [load_file(folder / "state.safetensors") for folder in (whole, broken)]
    return (
        log_of(whole) == log_of(broken)
        and set(states[0]) == set(states[1])
        and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    )


@pytest.mark.parametrize(
    "name, calls", [("online-dpo", 3), ("mixed-dpo", 3), ("distortion", 1), ("rloo", 3), ("ppo", 5)]
)
def test_a_killed_run_of_sampled_responses_goes_on_to_the_bit(vlm, short, tmp_path, name, calls):
    """Killed behind its last checkpoint or before the first (PPO between the two passes of a step) and gone on with by a new process: log, weights, moments."""
    schedule, whole, broken = (
        Schedule(4, 3, 1e-3, 1e-3, 0, save_every=2),
        tmp_path / "whole",
        tmp_path / "broken",
    )
    (policy, method, examples), second, third = (
        ready(name, copy.deepcopy(vlm), short) for _ in range(3)
    )
    train(policy, method, examples, schedule, whole)
    with pytest.raises(MemoryError):
        train(second[0], dying(second[1], calls), second[2], schedule, broken)
    train(third[0], third[1], third[2], schedule, broken)
    assert len(log_of(whole)) == 4 and same_runs(whole, broken)


def test_a_run_that_learnt_nothing_yet_is_gone_on_with(vlm, short, tmp_path):
    """Steps 0 and 1 are ties, killed in step 2: there are no moments to restore, and Adam counts the two steps that it took."""

    def run(copied):
        policy, method, examples = ready("online-dpo", copied, short)
        ties = collect_online(
            policy,
            copied,
            Verdicts(dict.fromkeys([record.id for record in short])),
            SamplingParams(4),
        )
        return (
            policy,
            method._replace(
                collect=lambda batch, step: (ties if step < 2 else method.collect)(batch, step)
            ),
            examples,
        )

    schedule, whole, broken = (
        Schedule(4, 4, 1e-3, 1e-3, 0, save_every=1),
        tmp_path / "whole",
        tmp_path / "broken",
    )
    train(*run(copy.deepcopy(vlm)), schedule, whole)
    policy, method, examples = run(copy.deepcopy(vlm))
    with pytest.raises(MemoryError):
        train(policy, dying(method, 0), examples, schedule, broken)
    assert not any(name.startswith("step.") for name in load_file(broken / "state.safetensors"))
    train(*run(vlm), schedule, broken)
    assert same_runs(whole, broken)
    assert {
        float(value)
        for name, value in load_file(whole / "state.safetensors").items()
        if name.startswith("step.")
    } == {2.0}


# --- the reference ---


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", METHODS)
def test_the_reference_never_moves(vlm, short, tmp_path, rank, name):
    """Log-probs of fixed rows, bit for bit, before and after two steps of a high rate, which the policy feels."""
    policy, method, examples = ready(name, vlm, short, rank)
    probe = pack_examples(
        vlm,
        [encode_example(vlm, record, [record.chosen, record.rejected]) for record in short],
    )

    def reference():
        with policy.reference() as model:
            return response_logps(model, probe)[0]

    before = reference()
    train(policy, method, examples, Schedule(2, 3, 1e-2, 1e-2, 0), tmp_path)
    assert torch.equal(reference(), before)
    with torch.no_grad():
        assert not torch.allclose(response_logps(vlm.model, probe)[0], before, atol=0.01)


# --- pairs: what is logged, and Eq. 5 ---


def test_what_a_step_logs_is_the_mean_over_its_pairs(vlm, short):
    """By hand from the log-probs themselves: margin is beta h, accuracy counts h > 0 and a tie as half."""
    _, method, examples = ready("slic", vlm, short[:3])
    logps, _ = response_logps(vlm.model, pack_examples(vlm, examples))
    for example, own, shift in zip(examples, logps.detach(), (2.0, -1.0, 0.0)):
        example.ref_logps = own - torch.tensor([shift, 0.0])  # h = 2, -1, 0
    loss, means = method.loss(examples, examples)
    assert means["margin"] == pytest.approx(BETA / 3, abs=1e-4) and means["accuracy"] == 0.5
    assert loss.item() == pytest.approx((0.4 + 1.3 + 1) / 3, abs=1e-4)
    assert [means["logp_chosen"], means["logp_rejected"]] == pytest.approx(
        logps.mean(0).tolist(), rel=1e-5
    )
    assert [means["ref_logp_chosen"], means["ref_logp_rejected"]] == pytest.approx(
        [logps[:, 0].mean().item() - 1 / 3, logps[:, 1].mean().item()], rel=1e-5
    )


def test_two_rejected_responses_are_averaged_by_eq_5(vlm, short):
    """h = 1 against the first rejected response and -3 against the second: .7 f(1) + .3 f(-3), and so with everything logged."""
    examples = [
        encode_example(vlm, record, [record.chosen, record.rejected, "A red pen."])
        for record in short[:2]
    ]
    logps = response_logps(vlm.model, pack_examples(vlm, examples))[0].detach()
    for example, own in zip(examples, logps):
        example.ref_logps = own + torch.tensor([0.0, 1.0, -3.0])
    loss, means = preference_method(vlm, "dpo", 0.5, weights=(0.7, 0.3)).loss(examples, examples)
    assert loss.item() == pytest.approx(
        0.7 * math.log(1 + math.exp(-0.5)) + 0.3 * math.log(1 + math.exp(1.5)), rel=1e-4
    )
    assert means["margin"] == pytest.approx(0.5 * (0.7 - 0.9), abs=1e-4) and means[
        "accuracy"
    ] == pytest.approx(0.7)
    assert means["logp_chosen"] == pytest.approx(logps[:, 0].mean().item(), rel=1e-5)
    assert means["logp_rejected"] == pytest.approx(
        (0.7 * logps[:, 1] + 0.3 * logps[:, 2]).mean().item(), rel=1e-5
    )


def test_smoothing_reaches_the_loss(vlm, short):
    """h = 1 at beta .5, a fifth of the labels wrong: .8 f(.5) + .2 f(-.5)."""
    _, _, examples = ready("dpo", vlm, short[:2])
    for example, own in zip(
        examples, response_logps(vlm.model, pack_examples(vlm, examples))[0].detach()
    ):
        example.ref_logps = own - torch.tensor([1.0, 0.0])
    loss, _ = preference_method(vlm, "dpo", 0.5, smoothing=0.2).loss(examples, examples)
    assert loss.item() == pytest.approx(
        0.8 * math.log(1 + math.exp(-0.5)) + 0.2 * math.log(1 + math.exp(0.5)), rel=1e-4
    )


# --- writing ---


def test_what_is_written_is_drawn_from_the_policy_by_the_record_and_the_step(vlm, short):
    """Both responses of two records against plain.write on uniforms of (seed, record id, step, number) alone; the end token is kept."""
    policy, _, examples = ready("online-dpo", vlm, short[:2])
    stirred(policy)
    found = [
        own
        for (own,) in generate_responses(
            vlm, examples, 2, SamplingParams(max_new_tokens=5, seed=7), 11
        )
    ]
    for example, own in zip(examples, found):
        uniforms = [
            torch.rand(5, generator=seeded_generator(7, example.record.id, 11, number))
            for number in range(2)
        ]
        assert own == [
            reference.generate(
                vlm.model,
                example.prompt_ids,
                vlm.encode_images(example.record.paths),
                [],
                one,
                {vlm.tokenizer.eos},
            )
            for one in uniforms
        ]
    assert found[0][0] != found[0][1] and found[0][0] != found[1][0]


def test_draws_know_nothing_of_order_and_company(vlm, short):
    """Each record's responses are the same in any batch; another step, seed or record id changes them."""
    _, _, examples = ready("online-dpo", vlm, short)
    sampling = SamplingParams(max_new_tokens=6, seed=3)
    whole = generate_responses(vlm, examples, 2, sampling, 5)
    assert generate_responses(vlm, examples[::-1], 2, sampling, 5) == whole[::-1]
    assert [generate_responses(vlm, [example], 2, sampling, 5)[0] for example in examples] == whole
    assert (
        generate_responses(vlm, examples[1:3], 3, sampling, 5)[0][0][:2] == whole[1][0]
    )  # a further response changes nothing of the first two
    renamed = [
        replace(example, record=replace(example.record, id=f"{example.record.id}a"))
        for example in examples
    ]
    for others in (
        generate_responses(vlm, examples, 2, sampling, 6),
        generate_responses(vlm, examples, 2, replace(sampling, seed=4), 5),
        generate_responses(vlm, renamed, 2, sampling, 5),
    ):
        assert all(a != b for (a,), (b,) in zip(others, whole))


def test_what_is_written_and_told_knows_nothing_of_the_room_for_it(vlm, short):
    """One example at a time, as a cache of one slot has it, or all together: the same responses, and what is told of each in its place."""
    policy, _, examples = ready("rloo", vlm, short)
    stirred(policy)

    def tell(rows, cache):
        assert cache.keys.shape[1] == len(rows)
        return [[sum(ids) for row in rows for _, ids in row.branches]]

    several = generate_responses(vlm, examples, 2, SamplingParams(max_new_tokens=4), 0, tell)
    assert several == generate_responses(
        vlm, examples, 2, SamplingParams(max_new_tokens=4), 0, tell, slots=1
    )
    assert [told for _, told in several] == [[sum(ids) for ids in own] for own, _ in several]


def test_a_response_ends_with_its_end_token_or_at_the_limit(vlm, short):
    """Where " is" may come so may the end: responses of several lengths, each whole, none with an end token inside."""
    as_likely_as(vlm, vlm.tokenizer.eos, " is")
    _, _, examples = ready("online-dpo", vlm, short)
    responses = [
        ids
        for step in range(4)
        for (own,) in generate_responses(vlm, examples, 4, SamplingParams(max_new_tokens=8), step)
        for ids in own
    ]
    assert len({len(ids) for ids in responses}) > 2
    assert all(
        vlm.tokenizer.eos not in ids[:-1] and (ids[-1] == vlm.tokenizer.eos or len(ids) == 8)
        for ids in responses
    )


def saying(monkeypatch, vlm, texts):
    """Put responses in the policy's mouth: {record id: texts}; a text in brackets is cut off before its end token."""

    def said(subject_, examples, k, sampling, step, tell=lambda rows, cache: ()):
        """As `written`, what is told of the responses included."""
        if not examples:
            return []
        responses = [
            [
                encode_response(vlm.tokenizer, vlm.template, text.strip("[]"))[
                    : -1 if text.startswith("[") else None
                ]
                for text in texts[example.record.id]
            ]
            for example in examples
        ]
        cache, _ = prefill(
            vlm.model,
            pack_examples(vlm, [replace(example, responses=[[]] * k) for example in examples]),
        )
        columns = [
            iter(column)
            for column in tell(
                pack_examples(
                    vlm,
                    [replace(example, responses=own) for example, own in zip(examples, responses)],
                ),
                cache,
            )
        ]
        return [(own, *([next(column) for _ in own] for column in columns)) for own in responses]

    monkeypatch.setattr(methods_base, "generate_responses", said)


def as_likely_as(vlm, id, word):
    """Give a token the logit of the token that writes `word`."""
    (other,) = vlm.tokenizer.encode(word, after="text")
    vlm.model.lm_head.weight.data[id] = vlm.model.lm_head.weight.data[other]


# --- Online-DPO and Mixed-DPO ---


def test_online_pairs_are_what_the_annotator_says(vlm, short, monkeypatch):
    """Verdict 0 keeps the order, 1 swaps, None is left out; the same text twice (one cut off before its end token) is not even asked about."""
    policy, _, examples = ready("online-dpo", vlm, short)
    a, b, c, d = (record.id for record in short)
    saying(
        monkeypatch,
        vlm,
        {
            a: ["A pen.", "A cup."],
            b: ["A dog.", "[No cat"],
            c: ["Yes.", "No."],
            d: ["A lamp.", "[A lamp."],
        },
    )
    annotator = Verdicts({a: 0, b: 1, c: None})
    found, means = collect_online(policy, vlm, annotator, SamplingParams())(examples, 0)
    encoded = {
        text: encode_response(vlm.tokenizer, vlm.template, text)
        for text in ("A pen.", "A cup.", "A dog.", "No cat")
    }
    assert [(example.record.id, example.responses) for example in found] == [
        (a, [encoded["A pen."], encoded["A cup."]]),
        (b, [encoded["No cat"][:-1], encoded["A dog."]]),
    ]
    assert annotator.asked == [(a, "A pen.", "A cup."), (b, "A dog.", "No cat"), (c, "Yes.", "No.")]
    assert means == {"same": 0.25, "tied": 0.25, "offline": 0.0}
    with policy.reference() as model:
        (part,) = microbatches(found, 16384)  # their order: another moves the last bit on some CPUs
        assert [example.ref_logps.tolist() for example in part] == response_logps(
            model, pack_examples(vlm, part)
        )[0].tolist()


def test_a_step_without_a_pair_is_no_step(vlm, short, tmp_path):
    """Ties alone after a step that learnt: the log says so, loss and gradient are 0, and the weights stay, whatever Adam's momentum."""
    policy, method, examples = ready("online-dpo", vlm, short)
    ties, before = (
        collect_online(
            policy,
            vlm,
            Verdicts(dict.fromkeys([record.id for record in short])),
            SamplingParams(4, seed=3),
        ),
        [],
    )

    def collect(batch, step):
        before.append({name: p.detach().clone() for name, p in policy.parameters().items()})
        return (ties if step else method.collect)(batch, step)

    train(
        policy, method._replace(collect=collect), examples, Schedule(3, 4, 1e-2, 1e-2, 0), tmp_path
    )
    assert [
        (line["loss"], line["grad_norm"], line["tied"] + line["same"])
        for line in log_of(tmp_path)[1:]
    ] == [(0.0, 0.0, 1.0)] * 2
    assert all(torch.equal(p, before[1][name]) for name, p in policy.parameters().items())
    assert not all(torch.equal(p, before[0][name]) for name, p in policy.parameters().items())


def test_no_pair_to_ask_about_is_no_error_for_a_reward_model(vlm, short, monkeypatch):
    """Every prompt answered twice with the same words."""
    policy, _, examples = ready("online-dpo", vlm, short[:2])
    saying(monkeypatch, vlm, {record.id: ["A cup.", "A cup."] for record in short})
    assert collect_online(policy, vlm, RewardAnnotator(real_reward()), SamplingParams())(
        examples, 0
    ) == (
        [],
        {"same": 1.0, "tied": 0.0, "offline": 0.0},
    )


def test_a_sampled_placeholder_is_a_token_like_any_other(vlm, short):
    """The picture's own token has a logit like any other, and is drawn some day: it is then scored where it was drawn, as it was drawn."""
    as_likely_as(vlm, vlm.model.config.image_token_id, " is")
    policy, _, examples = ready("online-dpo", vlm, short)
    found, _ = collect_online(policy, vlm, First(), SamplingParams(max_new_tokens=8))(examples, 0)
    own = [
        (example, ids)
        for example in found
        for ids in example.responses
        if vlm.model.config.image_token_id in ids
    ]
    assert own
    for example, ids in own:
        (fast,) = each_token(vlm.model, pack_examples(vlm, [replace(example, responses=[ids])]))
        assert len(fast) == len(ids) and fast.max() < 0
        assert fast[ids.index(vlm.model.config.image_token_id)] > -8  # likely, as it was made


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_mixed_keeps_the_offline_pair_with_probability_p(vlm, short, monkeypatch, p):
    """Eq. 4 over 1,000 (record, step): within 4 standard deviations, each record and each step for itself; 0 and 1 exactly."""
    policy, _, examples = ready("mixed-dpo", vlm, short)
    examples = [
        replace(example, record=replace(example.record, id=f"{example.record.id}-{i}"))
        for i in range(5)
        for example in examples
    ]
    saying(monkeypatch, vlm, {example.record.id: ["A pen.", "A cup."] for example in examples})
    monkeypatch.setattr(methods_base, "add_reference_logps", lambda *_: None)
    collect, kept = collect_online(policy, vlm, First(), SamplingParams(seed=9), p), Counter()
    for step in range(50):
        found, means = collect(examples, step)
        own = {example.record.id for example in found if any(example is one for one in examples)}
        fresh = [example for example in found if example.record.id not in own]
        assert len(found) == 20 and all(
            example.responses[0] == encode_response(vlm.tokenizer, vlm.template, "A cup.")
            for example in fresh
        )
        assert (
            means["offline"] == pytest.approx(len(own) / 20)
            and means["same"] == means["tied"] == 0.0
        )
        kept.update({(id, step): 1 for id in own})
    assert abs(len(kept) - 1000 * p) <= 4 * math.sqrt(1000 * p * (1 - p))
    for part in (0, 1):  # a draw for each record and for each step: neither decides alone
        shares = Counter(key[part] for key in kept)
        assert (
            p != 0.3
            or 2 < len(set(shares.values()))
            and max(shares.values()) < (40 if part == 0 else 19)
        )


def test_an_offline_pair_does_not_depend_on_its_company(vlm, short, monkeypatch):
    """Whether a record keeps its own pair is (seed, record id, step) alone."""
    policy, _, examples = ready("mixed-dpo", vlm, short)
    saying(monkeypatch, vlm, {record.id: ["A pen.", "A cup."] for record in short})
    collect = collect_online(policy, vlm, First(), SamplingParams(seed=9), 0.5)
    whole = {
        step: {
            example.record.id
            for example in collect(examples, step)[0]
            if any(example is one for one in examples)
        }
        for step in range(6)
    }
    alone = {
        step: {
            example.record.id for example in examples if collect([example], step)[0][0] is example
        }
        for step in range(6)
    }
    assert whole == alone and len({frozenset(ids) for ids in whole.values()}) > 2


# --- online BDHS and distortion ---


def test_online_bdhs_leaves_out_what_is_no_rejected_response(vlm, short):
    """One is the chosen one, one empty, one too long for the context; with two responses given, the sampled one comes last."""
    policy, _, examples = ready("averaged-bdhs", vlm, [*short, replace(short[0], id="long")])
    said = [short[0].chosen, "A red cup.", "", "Two dogs.", "No. " * 300]
    sampler = SimpleNamespace(
        pairs=lambda records, step: [
            {"chosen": record.chosen, "rejected": text, "rounds": 3 + step}
            for record, text in zip(records, said)
        ]
    )
    found, means = collect_online_bdhs(policy, vlm, sampler)(examples, 2)
    assert means == {"rounds": 5.0, "same": pytest.approx(0.6)}
    assert [example.responses for example in found] == [
        [*examples[i].responses, encode_response(vlm.tokenizer, vlm.template, said[i])]
        for i in (1, 3)
    ]
    assert (
        all(example.ref_logps.shape == (3,) for example in found)
        and len(examples[1].responses) == 2
    )


def test_distortion_scores_the_policys_own_tokens_in_the_context_of_the_chosen_response(vlm, short):
    """y~- is, token by token, the argmax of plain's logits under the noisy picture after the true tokens; its log-probs are plain's under the clean one."""
    policy, method, examples = ready("distortion", vlm, short[:2])
    stirred(policy)
    found, means = method.collect(examples, 6)
    changed = []
    for example, before in zip(found, examples):
        chosen = before.responses[0]
        tiles, size = preprocess(open_image(example.record.paths[0]), vlm.image_processor)
        blurred = vlm.model.encode_images(
            [(diffuse(tiles, 500, seeded_generator(3, example.record.id, 6, "noise")), size)]
        )
        with torch.no_grad():
            wrong = [
                int(
                    reference.next_token_logits(vlm.model, example.prompt_ids, blurred, chosen[:t])[
                        -1
                    ].argmax()
                )
                for t in range(len(chosen))
            ]
            slow = sum(
                reference.token_logps(
                    vlm.model,
                    example.prompt_ids,
                    vlm.encode_images(example.record.paths),
                    chosen,
                    scored_ids=wrong,
                )
            )
        assert example.responses == [*before.responses, chosen] and example.scored_ids == [
            *before.responses,
            wrong,
        ]
        assert response_logps(vlm.model, pack_examples(vlm, [example]))[0][
            0, 2
        ].item() == pytest.approx(slow.item(), rel=1e-5)
        changed += [a != b for a, b in zip(chosen, wrong)]
    assert means["changed"] == pytest.approx(sum(changed) / len(changed)) and 0 < means["changed"]


def test_the_noise_is_drawn_by_the_record_and_the_step(vlm, records):
    """The same tokens in any company, others at another step: twelve records, so that some token turns."""
    policy = Policy(vlm.model, 4, 8)
    examples = [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:12]]
    collect = collect_distortion(policy, vlm, 500, 3)
    tokens = [example.scored_ids[-1] for example in collect(examples, 1)[0]]
    assert [example.scored_ids[-1] for example in collect(examples[5:8][::-1], 1)[0]] == tokens[
        5:8
    ][::-1]
    assert [example.scored_ids[-1] for example in collect(examples, 2)[0]] != tokens


# --- reinforcement learning ---


def test_the_normaliser_by_hand(short):
    """Scores 1, 2, 6 of the chosen responses: mean 3, variance (4 + 1 + 9) / 3; a reward that never varies is not divided by zero."""
    asked = []
    stub = SimpleNamespace(
        score=lambda records, texts: (
            asked.append((records, texts)) or torch.tensor([[1.0], [2.0], [6.0]])
        )
    )
    assert reward_statistics(stub, short[:3]) == (3.0, pytest.approx(math.sqrt(14 / 3)))
    assert asked == [(short[:3], [[record.chosen] for record in short[:3]])]
    assert reward_statistics(
        SimpleNamespace(score=lambda records, texts: torch.ones(3, 1)), short
    ) == (
        1.0,
        1e-6,
    )


@pytest.mark.parametrize("name, k", [("rloo", 4), ("ppo", 1)])
def test_what_reinforcement_learning_logs(vlm, short, monkeypatch, name, k):
    """By hand: rewards raw and normalised, KL a response, surprise a token, length with the end token, and the share that came to an end."""
    reference = copy.deepcopy(vlm.model)
    policy, method, examples = ready(name, vlm, short[:2], scale=(2.0, 4.0))
    stirred(policy)
    said = {
        short[0].id: ["A cup.", "[No", "A red dog.", "Yes."][:k],
        short[1].id: ["[Two", "A pen.", "A", "No."][:k],
    }
    saying(monkeypatch, vlm, said)
    found, means = method.collect(examples, 0)
    told = [
        (example.prompt_ids, vlm.encode_images(example.record.paths), ids)
        for example in found
        for ids in example.responses
    ]
    with torch.no_grad():
        old, frozen = (
            [reference.response_logp(model, *one) for one in told]
            for model in (vlm.model, reference)
        )
    raw = sum(text.count(vowel) for own in said.values() for text in own for vowel in "aeiou") / (
        2 * k
    )
    assert means["reward_raw"] == pytest.approx(raw) and means["reward"] == pytest.approx(
        (raw - 2) / 4
    )
    assert (
        means["kl"] == pytest.approx(float(sum(old) - sum(frozen)) / (2 * k), rel=1e-4)
        and abs(means["kl"]) > 0.01
    )
    tokens = sum(len(ids) for *_, ids in told)
    assert means["length"] == tokens / (2 * k) and means["entropy"] == pytest.approx(
        -float(sum(old)) / tokens, rel=1e-5
    )
    assert means["ended"] == (6 if k == 4 else 1) / (2 * k)


def test_rloo_holds_what_has_gone_far_enough(vlm, short):
    """After the policy moved: the ratio of whole responses to the policy that wrote them, clipped, by hand from plain's log-probs."""
    policy, method, examples = ready("rloo", vlm, short[:1])
    stirred(policy)
    found, _ = method.collect(examples, 0)
    (example,) = found
    told = [
        (example.prompt_ids, vlm.encode_images(example.record.paths), ids)
        for ids in example.responses
    ]
    with torch.no_grad():
        old = [float(reference.response_logp(vlm.model, *one)) for one in told]
        stirred(policy, 0.01)
        ratios = [
            math.exp(float(reference.response_logp(vlm.model, *one)) - before)
            for one, before in zip(told, old)
        ]
        loss, _ = method.loss(found, found)
    advantages = example.rollout["advantages"].tolist()
    assert any(not 0.8 < ratio < 1.2 for ratio in ratios) and any(
        0.8 < ratio < 1.2 for ratio in ratios
    )
    wanted = [
        -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        for ratio, advantage in zip(ratios, advantages)
    ]
    assert loss.item() == pytest.approx(sum(wanted) / 4, rel=1e-4)


def test_ppo_holds_what_has_gone_far_enough(vlm, short):
    """The same token by token, with the value clipped around the one that was noted; means over all tokens of both responses."""
    policy, method, examples = ready("ppo", vlm, short[:2])
    stirred(policy)
    found, _ = method.collect(examples, 0)

    def slowly():
        """(log-prob, value) of every token."""
        logps, values = [], []
        for example in found:
            told, (ids,) = (
                (example.prompt_ids, vlm.encode_images(example.record.paths)),
                example.responses,
            )
            logps += [float(logp) for logp in reference.token_logps(vlm.model, *told, ids)]
            values += [
                float(policy.scalar_head(reference.hidden_states(vlm.model, *told, ids[:t])[-1]))
                for t in range(len(ids))
            ]
        return list(zip(logps, values))

    with torch.no_grad():
        old = slowly()
        head = (
            0.85 * policy.scalar_head.weight
        )  # smaller values are nearer to their returns, some of them by more than the clip
        stirred(policy, 0.01).scalar_head.weight.copy_(head)
        new = slowly()
        loss, means = method.loss(found, found)
    noted = {
        name: torch.cat([part for example in found for part in example.rollout[name]]).tolist()
        for name in ("advantages", "returns")
    }
    surrogate, errors, ratios, held = [], [], [], []
    for (before, value_then), (after, value_now), advantage, wanted in zip(
        old, new, noted["advantages"], noted["returns"]
    ):
        ratio, near = (
            math.exp(after - before),
            value_then + min(max(value_now - value_then, -0.2), 0.2),
        )
        surrogate.append(-min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
        errors.append(0.5 * max((value_now - wanted) ** 2, (near - wanted) ** 2))
        ratios, held = (
            [*ratios, ratio],
            [*held, abs(near - wanted) > abs(value_now - wanted) + 0.01],
        )
    assert any(not 0.8 < ratio < 1.2 for ratio in ratios) and any(held) and not all(held)
    assert means["value_loss"] == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert loss.item() == pytest.approx(
        sum(surrogate) / len(surrogate) + 0.1 * means["value_loss"], rel=1e-4
    )


# --- what the tower has seen ---


@pytest.mark.parametrize("room", [0, 2, 99])
def test_pictures_are_looked_at_once_within_the_byte_budget(vlm, records, monkeypatch, room):
    """Room for so many pictures' features: what is kept is not looked at again and is the same; the oldest goes first; a picture asked for twice is looked at once."""
    paths, looked, look = [record.paths[0] for record in records[:4]], [], vlm.model.encode_images
    fresh = look([preprocess(open_image(path), vlm.image_processor) for path in paths[:1]])[0].tiles
    vlm.feature_cache_bytes = room * fresh.numel() * fresh.element_size()
    monkeypatch.setattr(
        vlm.model, "encode_images", lambda prepared: looked.append(len(prepared)) or look(prepared)
    )
    for path in paths[:3]:
        one, other = vlm.encode_images([path, path])
        assert one is other
    assert looked == [1, 1, 1] and [path for path, _ in vlm.feature_cache] == list(
        map(str, paths[max(0, 3 - room) : 3])
    )
    again = [vlm.encode_images([path])[0] for path in (paths[2], paths[0])]
    assert len(looked) == 3 + {0: 2, 2: 1, 99: 0}[room]
    assert torch.equal(again[1].tiles, fresh)


def test_what_was_seen_in_company_does_not_serve_a_restart(vlm, records, monkeypatch):
    """An evaluation of the training pictures, which looks at several together, leaves training what it would see without it."""
    paths, looked, look = [record.paths[0] for record in records[:3]], [], vlm.model.encode_images
    monkeypatch.setattr(
        vlm.model, "encode_images", lambda prepared: looked.append(len(prepared)) or look(prepared)
    )
    together, alone = vlm.encode_images(paths, batch_size=32), vlm.encode_images(paths)
    assert looked == [3, 1, 1, 1] and not any(one is other for one, other in zip(together, alone))
    assert (
        vlm.encode_images(paths, batch_size=32) == together
        and vlm.encode_images(paths[::-1]) == alone[::-1]
        and len(looked) == 4
    )
