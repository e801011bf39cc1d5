"""The DPO steps that the benchmarks compare: ours, the naive way, and TRL's.

A step is the forward pass, the loss and the backward pass. Each class here makes a function without
arguments that takes one step and returns its loss. The gradients stay on the parameters.
"""

from contextlib import nullcontext

import torch
from peers import compact_head

from minialign.data.packing import IGNORED_TARGET, PackedExample, pack
from minialign.logprobs import response_logps
from minialign.losses import dpo_loss, log_ratio_margin
from minialign.methods.distillation import Targets, token_divergences
from minialign.models.llava import hidden_states
from minialign.models.policy import Policy

BETA = 0.1

# What a step has at hand, and so need not compute.
WARM = "warm"  # image features and reference log-probs, as from the second epoch of training on
REFERENCE = "reference"  # reference log-probs; the vision tower runs in the step
COLD = "cold"  # nothing
STARTS = (WARM, REFERENCE, COLD)


def make_policy(options, model):
    """Put LoRA on the decoder and train the projector.

    B is random too, not zero, so that policy and reference differ.
    """
    policy = Policy(model, rank=options.rank, alpha=2 * options.rank)
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=0.01)
    return policy


def packed_logps(model, pairs, features):
    """Return summed log-probs (B, k) in our way: one packed row a pair."""
    rows = []
    for pair, image_features in zip(pairs, features, strict=True):
        rows.append(PackedExample.of(pair.prompt, [image_features], pair.responses))
    logps, _ = response_logps(model, rows)
    return logps


def naive_logps(model, pairs, features):
    """Return summed log-probs (B, 2) in the naive way.

    Every response follows an image and a prompt of its own, and log-softmax is taken at all
    positions.
    """
    # 1. Two sequences a pair.
    rows = []
    for pair, image_features in zip(pairs, features, strict=True):
        for response in pair.responses:
            rows.append(PackedExample.of(pair.prompt, [image_features], [response]))
    batch = pack(model, rows)

    # 2. The log-probs of the whole vocabulary at every position.
    logits = (hidden_states(model, batch) @ model.vocab_head.T).float()  # (2B, T, V)
    logps = torch.log_softmax(logits, dim=-1)

    # 3. Those of the response tokens, summed.
    targets = batch.targets.clamp(min=0)  # any index will do where nothing is scored
    target_logps = logps.gather(-1, targets[..., None])[..., 0]  # (2B, T)
    is_scored = batch.targets != IGNORED_TARGET
    return (target_logps * is_scored).sum(dim=1).view(-1, 2)


class OurStep:
    """A DPO step of this package, or of the naive way.

    start: one of STARTS.
    compute_logps: packed_logps, or naive_logps.
    encodings_per_image: how often the vision tower encodes an image. In the naive way it does so
        for each of the two sequences.
    """

    def __init__(
        self, policy, pairs, *, start=WARM, compute_logps=packed_logps, encodings_per_image=1
    ):
        self.policy = policy
        self.pairs = pairs
        self.start = start
        self.compute_logps = compute_logps
        self.encodings_per_image = encodings_per_image
        self.features = self.encode_images()
        self.ref_logps = None
        if start != COLD:
            self.ref_logps = self.compute_reference()

    def encode_images(self):
        """Run the vision tower; return the features of each pair's image."""
        images = []
        for pair in self.pairs:
            images += [pair.image] * self.encodings_per_image
        features = self.policy.model.encode_images(images)
        return features[:: self.encodings_per_image]

    def compute_reference(self):
        """Return the log-probs (B, k) of the reference."""
        with self.policy.reference() as reference_model:
            return self.compute_logps(reference_model, self.pairs, self.features)

    def __call__(self):
        """Take the step and return its loss."""
        self.policy.model.zero_grad()
        return self.add_gradients()

    def add_gradients(self):
        """Add the gradients of the pairs to those that are there, and return the loss."""
        # 1. What is not at hand.
        if self.start != WARM:
            self.features = self.encode_images()
        ref_logps = self.ref_logps
        if self.start == COLD:
            ref_logps = self.compute_reference()

        # 2. The loss, with the first response as the chosen one and all others as rejected ones.
        logps = self.compute_logps(self.policy.model, self.pairs, self.features)
        losses = []
        for rejected in range(1, logps.shape[1]):
            margin = log_ratio_margin(
                policy_chosen_logps=logps[:, 0],
                policy_rejected_logps=logps[:, rejected],
                ref_chosen_logps=ref_logps[:, 0],
                ref_rejected_logps=ref_logps[:, rejected],
            )
            losses.append(dpo_loss(margin, beta=BETA))
        loss = torch.stack(losses).mean()

        # 3. The gradients.
        loss.backward()
        return loss.detach()


class DistillationStep:
    """A warm step of contrastive distillation: one response a pair, the chosen one.

    Image features and targets are at hand. Of random weights almost every token would be plausible,
    so each target has eight random tokens instead, more than a trained model's targets have.
    """

    tokens_per_target = 8

    def __init__(self, policy, pairs):
        self.policy = policy
        features = policy.model.encode_images([pair.image for pair in pairs])
        self.rows = []
        num_tokens = 0
        for pair, image_features in zip(pairs, features, strict=True):
            chosen = pair.responses[0]
            self.rows.append(PackedExample.of(pair.prompt, [image_features], [chosen]))
            num_tokens += len(chosen)
        self.targets = self.random_targets(num_tokens)

    def random_targets(self, num_tokens):
        """Return targets of so many response tokens."""
        generator = torch.Generator().manual_seed(0)
        vocab_size = len(self.policy.model.vocab_head)
        shape = (num_tokens, self.tokens_per_target)
        token_ids = torch.randint(vocab_size, shape, generator=generator)
        probs = torch.rand(shape, generator=generator).softmax(dim=1)
        counts = torch.full((num_tokens,), self.tokens_per_target)
        return Targets(token_ids.flatten().int(), probs.flatten(), counts.int())

    def __call__(self):
        """Take the step and return its loss."""
        self.policy.model.zero_grad()
        loss = token_divergences(self.policy.model, self.rows, self.targets).mean()
        loss.backward()
        return loss.detach()


class TrlStep:
    """A `training_step` of TRL's trainer.

    ref_logps: log-probs (2, B) of the reference to use. None lets every step compute them.
    compact: whether the vocabulary head is applied to response positions alone, as on CUDA.
    """

    def __init__(self, trainer, batch, *, ref_logps=None, compact=False):
        self.trainer = trainer
        self.batch = batch
        self.reference = {}
        if ref_logps is not None:
            chosen_logps, rejected_logps = ref_logps
            self.reference = {
                "ref_chosen_logps": chosen_logps,
                "ref_rejected_logps": rejected_logps,
            }
        self.head_context = nullcontext
        if compact:
            self.head_context = compact_head

    def __call__(self):
        """Take the step and return its loss."""
        self.trainer.model.zero_grad()
        self.trainer.precompute_ref_logps = bool(self.reference)
        with self.head_context():
            return self.trainer.training_step(self.trainer.model, self.batch | self.reference)

    @torch.no_grad()
    def logps(self):
        """Return the summed log-probs (B, 2) of the policy, as TRL's loss takes them."""
        batch = dict(self.batch)
        is_response = batch.pop("completion_mask") == 1
        labels = batch["input_ids"].masked_fill(~is_response, IGNORED_TARGET)
        with self.head_context():
            output = self.trainer.model(**batch, labels=labels, fused_lm_head=True, use_cache=False)
        logps = output.log_probs.sum(dim=1)  # (2B,), all chosen and then all rejected
        return logps.view(2, -1).T


def gpu_peak_of(step):
    """Return the bytes on the GPU at the peak of a step, above those before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before
