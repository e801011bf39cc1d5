"""Build a small run of each method: a policy, the method over it, and a few short examples."""

import copy
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import TINY

from minialign.data.chat_templates import encode_response
from minialign.generation.decoding import SamplingParams, prefill
from minialign.losses import PAIR_LOSSES
from minialign.methods import policy_gradient, responses
from minialign.methods.base import (
    Example,
    Method,
    add_reference_logps,
    encode_example,
    microbatches,
    pack_examples,
)
from minialign.methods.distillation import DistillationConfig, DistillationMethod
from minialign.methods.distilled_preference import DistilledPreferenceMethod
from minialign.methods.grpo import GrpoMethod
from minialign.methods.mdpo import ImageDamage, MdpoMethod
from minialign.methods.mpo import MpoMethod
from minialign.methods.online import DistortionPairs, OnlineBdhsPairs, OnlinePairs
from minialign.methods.policy_gradient import PpoMethod, RlooMethod
from minialign.methods.preference import PreferenceMethod, RewardModelMethod, SupervisedMethod
from minialign.models.llava import Llava
from minialign.models.loading import VLM, load_vlm
from minialign.models.policy import Policy, scalar_head
from minialign.neighbor_losses import NEIGHBOR_LOSSES
from minialign.pairs.reward_model import RewardModel

BETA = 0.3
GAMMA = 0.4  # weight of the data's rejected response (Eq. 5)
DISTILL_WEIGHT = 2.5  # of the distillation that is added to a loss on pairs
OFFLINE_METHODS = ("sft", *PAIR_LOSSES, *NEIGHBOR_LOSSES, "reward")
POLICY_GRADIENTS = {"rloo": RlooMethod, "ppo": PpoMethod, "grpo": GrpoMethod}
METHODS_WITH_TWO_REJECTED = ("averaged-bdhs", "distortion")
METHOD_NAMES = (
    *OFFLINE_METHODS,
    "online-dpo",
    "mixed-dpo",
    "online-bdhs",
    "averaged-bdhs",
    "distortion",
    "rloo",
    "ppo",
    "grpo",
    "distill",
    "distill-reference",
    "distill-policy",
    "dpo-distill",
)
SHORT_PAIRS = (
    ("A cup.", "No red dog."),
    ("Yes, a dog.", "No."),
    ("There is a lamp.", "Two pens."),
    ("No cat.", "A white cat."),
)


class AlphabeticAnnotator:
    """Prefer the response that comes first in the alphabet."""

    counters = Counter()  # it counts nothing

    def compare(self, records, firsts, seconds):
        """Return 1 where the second response is the better one, else 0."""
        verdicts = []
        for first, second in zip(firsts, seconds, strict=True):
            verdicts.append(int(second < first))
        return verdicts


class FixedAnnotator:
    """Give known verdicts, by record id, and remember and count the questions."""

    def __init__(self, verdicts):
        self.verdicts = verdicts
        self.counters = Counter()
        self.questions = []

    def compare(self, records, firsts, seconds):
        """Return the known verdict of each record."""
        ids = [record.id for record in records]
        self.questions += zip(ids, firsts, seconds, strict=True)
        self.counters["asked"] += len(ids)
        return [self.verdicts[record_id] for record_id in ids]


class VowelReward:
    """Reward a response with its number of vowels."""

    def score(self, records, texts):
        """Return the rewards (n, k)."""
        rewards = []
        for texts_of_record in texts:
            rewards.append([float(count_vowels(text)) for text in texts_of_record])
        return torch.tensor(rewards)


def count_vowels(text):
    """Return the number of vowels in a text."""
    return sum(text.count(vowel) for vowel in "aeiou")


class NumberedSampler:
    """Sample the step's number as the rejected response."""

    def pairs(self, records, step):
        """Return a pair of each record; the first took one round, the next two, and so on."""
        pairs = []
        for i, record in enumerate(records):
            pairs.append({"chosen": record.chosen, "rejected": f"A {step}.", "rounds": 1 + i})
        return pairs


@dataclass
class MethodRun:
    """A method over a policy that a test may train, and the model as it was before."""

    vlm: VLM
    policy: Policy
    method: Method
    examples: list[Example]
    ref_model: Llava  # a copy, for the slow reference implementation

    def move_policy(self, size=0.02):
        """Move the policy away from its reference, in every trainable weight."""
        move(self.policy, size)

    def gradient(self, loss):
        """Return the gradient of a loss over all trainable weights as one vector."""
        return gradient_vector(self.policy, loss)

    def questions(self, examples):
        """Return (prompt ids, image features) of each example."""
        questions = []
        for example in examples:
            image_features = self.vlm.encode_images(example.record.paths)
            questions.append((example.prompt_ids, image_features))
        return questions

    def pairs(self, examples, rejected=1):
        """Return (prompt ids, image features, chosen, rejected) of each example."""
        pairs = []
        for question, example in zip(self.questions(examples), examples, strict=True):
            pairs.append((*question, example.responses[0], example.responses[rejected]))
        return pairs


def make_run(
    name, vlm, records, *, num_records=4, rank=4, reward_model=None, reward_statistics=(2.0, 1.5)
):
    """Build the method called `name` over a fresh policy. Offline pairs get reference log-probs."""
    soften_head(vlm)
    ref_model = copy.deepcopy(vlm.model)
    policy = Policy(vlm.model, rank, 8, seed=1)
    if name in ("reward", "ppo"):
        policy.add_scalar_head()

    examples = []
    for record in short_records(records)[:num_records]:
        texts = [record.chosen, record.rejected]
        if name == "online-bdhs" or name.startswith("distill"):
            texts = [record.chosen]
        examples.append(encode_example(vlm, record, texts))
    if name in (*OFFLINE_METHODS, "mixed-dpo", "dpo-distill"):
        add_reference_logps(policy, vlm, examples)

    if name in POLICY_GRADIENTS:
        method = make_policy_gradient(name, policy, vlm, reward_model, reward_statistics)
    elif name.startswith("distill"):
        method = make_distillation(name, policy, vlm)
        if name != "distill-policy":
            examples = method.prepare(examples)
    elif name == "dpo-distill":
        preference = PreferenceMethod(vlm, "dpo", BETA)
        distillation = make_distillation("distill", policy, vlm)
        method = DistilledPreferenceMethod(preference, distillation, DISTILL_WEIGHT)
        examples = method.prepare(examples)
    else:
        method = make_supervised(name, policy, vlm)
    return MethodRun(vlm, policy, method, examples, ref_model)


def make_supervised(name, policy, vlm):
    """Build a method that learns from chosen responses, pairs or rankings."""
    if name == "sft":
        return SupervisedMethod(vlm)
    if name == "reward":
        return RewardModelMethod(policy, vlm)
    if name in PAIR_LOSSES:
        return PreferenceMethod(vlm, name, BETA)
    if name == "mpo":
        return MpoMethod(vlm, name, BETA)
    if name == "mdpo":
        return MdpoMethod(vlm, name, BETA, policy=policy, damage=ImageDamage(seed=3))
    rejected_weights = (1.0,)
    if name in METHODS_WITH_TWO_REJECTED:
        rejected_weights = (GAMMA, 1 - GAMMA)
    collector = make_collector(name, policy, vlm)
    return PreferenceMethod(
        vlm, "dpo", BETA, rejected_weights=rejected_weights, collector=collector
    )


def make_collector(name, policy, vlm, annotator=None, seed=7):
    """Build the collector of an online method. The annotator prefers by the alphabet."""
    if annotator is None:
        annotator = AlphabeticAnnotator()
    sampling = SamplingParams(max_new_tokens=4, seed=seed)
    if name == "online-dpo":
        return OnlinePairs(policy, vlm, annotator, sampling)
    if name == "mixed-dpo":
        return OnlinePairs(policy, vlm, annotator, sampling, mix=0.5)
    if name == "distortion":
        return DistortionPairs(policy, vlm, noise_steps=500, seed=3)
    if name in ("online-bdhs", "averaged-bdhs"):
        return OnlineBdhsPairs(policy, vlm, NumberedSampler())
    raise ValueError(f"no collector is called {name}; add it here")


def make_policy_gradient(name, policy, vlm, reward_model, reward_statistics):
    """Build RLOO, PPO or GRPO. Without a reward model the reward is the number of vowels."""
    if reward_model is None:
        reward_model = VowelReward()
    reward_mean, reward_std = reward_statistics
    return POLICY_GRADIENTS[name](
        policy=policy,
        vlm=vlm,
        reward_model=reward_model,
        reward_mean=reward_mean,
        reward_std=reward_std,
        sampling=SamplingParams(max_new_tokens=4, seed=7),
        beta=BETA,
    )


def make_distillation(name, policy, vlm, **config):
    """Build distillation: "distill" reads the chosen responses, others those of their suffix."""
    responses = {"distill-reference": "reference", "distill-policy": "policy"}.get(name, "chosen")
    return DistillationMethod(
        policy=policy,
        vlm=vlm,
        config=DistillationConfig(responses=responses, **config),
        sampling=SamplingParams(max_new_tokens=4, seed=7),
    )


def soften_head(vlm):
    """Scale the logits down: the shipped model is so confident that two samples seldom differ."""
    vlm.model.lm_head.weight.data *= 0.4


def short_records(records):
    """Return four records with short pairs of different lengths.

    The reference implementation runs a whole sequence for every token.
    """
    short = []
    for record, (chosen, rejected) in zip(records, SHORT_PAIRS, strict=False):
        short.append(replace(record, chosen=chosen, rejected=rejected))
    return short


def move(policy, size=0.02):
    """Add noise to every trainable weight; more to a scalar head, which starts at zero."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy.parameters().items():
        scale = 0.3 if name.startswith("score.") else size
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def gradient_vector(policy, loss):
    """Return the gradient of a loss over all trainable weights as one vector."""
    parameters = list(policy.parameters().values())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat_gradients = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        flat_gradients.append(gradient.flatten())
    return torch.cat(flat_gradients)


def relative_distance(a, b):
    """Return |a - b| / |b| of two vectors."""
    return float((a - b).norm() / b.norm())


def assert_equal_gradient(run, loss, slow_loss):
    """Assert that two losses have the same gradient up to rounding."""
    assert relative_distance(run.gradient(loss), run.gradient(slow_loss)) <= 1e-5


def assert_equal_loss_and_gradient(run, loss, slow_loss):
    """Assert that two losses and their gradients are the same up to rounding."""
    assert loss.item() == pytest.approx(slow_loss.item(), rel=1e-5)
    assert_equal_gradient(run, loss, slow_loss)


def assert_policy_has_moved(metrics):
    """Assert that the margin is not 0, so that ln 2 is not merely compared with ln 2."""
    assert abs(metrics["margin"]) > 1e-4


def sum_over_microbatches(method, examples, max_tokens=16384):
    """Return the loss of a batch and its metrics, added up over its micro-batches."""
    total_loss = 0.0
    total_metrics = {}
    for micro_batch in microbatches(examples, max_tokens):
        loss, metrics = method.loss(micro_batch, examples)
        total_loss = total_loss + loss
        for name, value in metrics.items():
            total_metrics[name] = total_metrics.get(name, 0.0) + value
    return total_loss, total_metrics


def load_random_reward_model():
    """Return a reward model of the shipped model and a scalar head with random weights."""
    vlm = load_vlm(TINY / "model")
    vlm.model.requires_grad_(False)
    head = scalar_head(vlm.model)
    head.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return RewardModel(vlm, head.requires_grad_(False))


def script_responses(monkeypatch, vlm, texts):
    """Let the policy sample given texts: {record id: texts}.

    A text that begins with "[" is cut off before its end token.
    """
    scripted_ids = {}
    for record_id, texts_of_record in texts.items():
        scripted_ids[record_id] = [encode_scripted(vlm, text) for text in texts_of_record]

    def scripted_chunk(vlm, examples, k, *, sampling, step):
        """Take the place of sample_chunk: the cache is a real one, the responses are given."""
        prompts = [replace(example, responses=[[]] * k) for example in examples]
        cache, _ = prefill(vlm.model, pack_examples(vlm, prompts))
        sampled_examples = []
        for example in examples:
            sampled_examples.append(replace(example, responses=scripted_ids[example.record.id]))
        return sampled_examples, cache

    monkeypatch.setattr(responses, "sample_chunk", scripted_chunk)
    monkeypatch.setattr(policy_gradient, "sample_chunk", scripted_chunk)


def encode_scripted(vlm, text):
    """Return the ids of a scripted response."""
    ids = encode_text(vlm, text.strip("[]"))
    if text.startswith("["):
        return ids[:-1]
    return ids


def encode_text(vlm, text):
    """Return the ids of a response, its end token included."""
    return encode_response(vlm.tokenizer, vlm.template, text)


def make_as_likely(vlm, token_id, word):
    """Give a token the logit of the token that writes `word`."""
    (other_id,) = vlm.tokenizer.encode(word, after="text")
    vlm.model.lm_head.weight.data[token_id] = vlm.model.lm_head.weight.data[other_id]
