"""Contrastive distillation: teach what the image adds to a token, without pairs (not the paper's).

Suppose that DPO's chosen responses are sampled from the reference with the image, and the rejected
ones without it. Then its optimum is the reference, sharpened by what the image adds to it
(minialign/README.md, stop 11). Distillation teaches such a distribution directly, token by token:

1. The frozen reference reads a response twice, with the image and with the image hidden.
2. At every token the two predictions give a target distribution q (losses.contrastive_targets). Few
   tokens are plausible there, so a target is a short list of tokens and probabilities.
3. The policy reads the response once, with the image, and learns the targets: KL(q || pi), or
   that divergence reversed (losses.reverse_distillation_loss).

The targets of fixed responses are computed once and stored, as reference log-probs are.

Related: visual contrastive decoding (arXiv 2311.16922) samples from such a distribution, with two
forward passes a token. SEED (arXiv 2507.04680) distills such knowledge with a mode-seeking loss.

Shapes: N tokens of all responses, n tokens of a block of them, M entries of their targets, D hidden
size, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from minialign.data.packing import PackedExample
from minialign.generation.decoding import SamplingParams
from minialign.logprobs import (
    MAX_TOKENS,
    expected_token_logps,
    response_hidden_states,
    sparse_token_logps,
)
from minialign.losses import contrastive_targets, distillation_loss, reverse_distillation_loss
from minialign.methods.base import Method, microbatches, pack_examples
from minialign.methods.responses import generate_responses
from minialign.models.loading import VLM
from minialign.models.policy import Policy
from minialign.pairs.distortion import noisy_image_features
from minialign.utils.distributed import (
    gather_tensors,
    local_share,
    share_of_model,
)
from minialign.utils.files import check
from minialign.utils.seeding import seeded_generator

MAX_LOGITS = 1 << 22  # of a block of tokens, for each of the reference's two predictions
# The most bytes of targets that one call of `add_targets` makes. It has two copies of them while it
# joins them.
MAX_TARGET_BYTES = 1 << 30


@dataclass(frozen=True)
class DistillationConfig:
    """How the targets are made, and for whose responses."""

    contrast: float = 1.0  # a: how strongly q sharpens what the image adds
    plausibility: float = 0.1  # smallest share of the largest probability that is plausible
    responses: str = "chosen"  # those of the data, or samples of the "reference" or of the "policy"
    # How the image is hidden. By default all of its tokens are left out.
    rho: float = 1.0  # probability that an image token is masked
    noise_steps: int = 0  # steps of diffusion, which take the place of the mask unless 0
    seed: int = 0  # of the mask or the noise


@dataclass
class Targets:
    """The target distributions of N tokens, one after the other.

    Token i has the next `counts[i]` entries of `token_ids` and `probs`.
    """

    token_ids: torch.Tensor  # (M,) int32, the plausible tokens
    probs: torch.Tensor  # (M,) fp32
    counts: torch.Tensor  # (N,) int32

    def num_bytes(self) -> int:
        """Return how much memory the targets take."""
        return self.token_ids.nbytes + self.probs.nbytes + self.counts.nbytes

    def entropies(self) -> torch.Tensor:
        """Return the entropy of each distribution in nats, (N,)."""
        position_of_entry = torch.repeat_interleave(self.counts)  # (M,): 0 0 0 1 2 2 ...
        terms = -torch.xlogy(self.probs, self.probs)
        zeros = torch.zeros(len(self.counts), device=terms.device)
        return zeros.index_add(0, position_of_entry, terms)

    def to(self, device) -> "Targets":
        """Return the same targets on a device, with the int64 integers that indexing needs."""
        return Targets(
            token_ids=self.token_ids.to(device).long(),
            probs=self.probs.to(device),
            counts=self.counts.to(device).long(),
        )


def join_targets(targets_list: list[Targets]) -> Targets:
    """Return several Targets as one."""
    return Targets(
        token_ids=torch.cat([targets.token_ids for targets in targets_list]),
        probs=torch.cat([targets.probs for targets in targets_list]),
        counts=torch.cat([targets.counts for targets in targets_list]),
    )


def gather_targets(targets: Targets) -> list[Targets]:
    """Return the Targets that each model has computed, in the order of the models."""
    token_ids = gather_tensors(targets.token_ids)
    probs = gather_tensors(targets.probs)
    counts = gather_tensors(targets.counts)
    return [Targets(*tensors) for tensors in zip(token_ids, probs, counts, strict=True)]


def split_targets(targets: Targets, lengths: list[int]) -> list[Targets]:
    """Split Targets into one for each response. `lengths` are the responses' numbers of tokens."""
    counts_of_responses = targets.counts.split(lengths)
    num_entries = [int(counts.sum()) for counts in counts_of_responses]
    targets_of_responses = []
    for token_ids, probs, counts in zip(
        targets.token_ids.split(num_entries),
        targets.probs.split(num_entries),
        counts_of_responses,
        strict=True,
    ):
        targets_of_responses.append(Targets(token_ids, probs, counts))
    return targets_of_responses


@dataclass
class DistillationMethod(Method):
    """Contrastive distillation of the reference into the policy."""

    policy: Policy
    vlm: VLM
    config: DistillationConfig
    sampling: SamplingParams | None  # how responses are sampled, if they are not the chosen ones
    divergence: str = "forward"  # or "reverse"

    @property
    def stores_targets(self):
        """Return whether targets stay the same: the policy's responses are new at every step."""
        return self.config.responses != "policy"

    def settings(self) -> str:
        """Return what stored targets depend on besides model and data, as a text."""
        return repr((self.config, self.sampling))

    def prepare(self, examples) -> list:
        """Return the examples with responses and targets that do not change during training.

        A run calls this once, before training, unless the responses are the policy's.
        """
        if self.config.responses == "reference":
            with self.policy.reference():  # vlm.model is the reference in here
                examples = self.with_responses(examples, step=0)
        add_targets(self.policy, self.vlm, examples, self.config)
        return examples

    def collect(self, batch, step):
        """Return the examples of a step, with new responses and targets if they are the policy's.

        Other examples have theirs from `prepare`.
        """
        if self.stores_targets:
            return batch, {}
        examples = self.with_responses(batch, step)
        add_targets(self.policy, self.vlm, examples, self.config)
        return examples, {}

    def with_responses(self, examples, step) -> list:
        """Return the examples, each with one response that vlm.model samples in its present state.

        That is the policy, or the reference inside `policy.reference()`.
        """
        responses = generate_responses(self.vlm, examples, 1, sampling=self.sampling, step=step)
        sampled = []
        for example, response in zip(examples, responses, strict=True):
            sampled.append(replace(example, responses=response))
        return sampled

    def loss(self, micro_batch, batch):
        """Return this micro-batch's share of the mean KL divergence of a token."""
        rows = pack_examples(self.vlm, micro_batch)
        targets = join_targets([example.targets for example in micro_batch])
        divergences = token_divergences(self.vlm.model, rows, targets, self.divergence)

        # "support" is the mean number of tokens with a probability in the target of a token.
        num_batch_tokens = sum(len(example.responses[0]) for example in batch)
        metrics = {"support": len(targets.token_ids) / num_batch_tokens}
        return divergences.sum() / num_batch_tokens, metrics


def token_divergences(model, rows, targets, divergence="forward") -> torch.Tensor:
    """Compute the divergence from q of each response token of packed examples, (N,)."""
    hidden, _, _ = response_hidden_states(model, rows)  # (N, D)
    targets = targets.to(hidden.device)
    if divergence == "reverse":
        policy_logps = sparse_token_logps(
            hidden, model.vocab_head, targets.token_ids, counts=targets.counts
        )
        return reverse_distillation_loss(targets.probs.log(), policy_logps, targets.counts)
    expected_logps = expected_token_logps(
        hidden, model.vocab_head, targets.token_ids, targets.probs, counts=targets.counts
    )
    return distillation_loss(targets.entropies(), expected_logps)


# --- The targets


def add_targets(policy, vlm, examples, config, max_tokens=MAX_TOKENS):
    """Set `targets` of every example, from what the reference predicts for its only response."""
    micro_batches = microbatches(examples, max_tokens)

    # 1. Each process computes the targets of its share of the micro-batches.
    #    The first has no tokens, so that an empty share can be joined.
    local_targets = [sparse_targets(torch.empty(0, 0))]
    num_bytes = 0
    with policy.reference() as reference_model:
        for micro_batch in tqdm(local_share(micro_batches), "targets", leave=False):
            targets = compute_targets(reference_model, vlm, micro_batch, config)
            num_bytes += targets.num_bytes()
            check_target_bytes(num_bytes)
            local_targets.append(targets)

    # 2. Check the bytes of all models together. Then every process gets the targets of all models.
    num_bytes_of_models = torch.cat(gather_tensors(torch.tensor([num_bytes])))
    check_target_bytes(int(num_bytes_of_models.sum()))
    targets_of_models = gather_targets(join_targets(local_targets))

    # 3. Each example keeps the targets of its response.
    for model_index, targets in enumerate(targets_of_models):
        examples_of_model = []
        for micro_batch in share_of_model(model_index, micro_batches):
            examples_of_model += micro_batch
        lengths = [len(example.responses[0]) for example in examples_of_model]
        targets_of_responses = split_targets(targets, lengths)
        for example, targets_of_response in zip(
            examples_of_model, targets_of_responses, strict=True
        ):
            example.targets = targets_of_response


def check_target_bytes(num_bytes):
    """Raise InputError if targets take more than MAX_TARGET_BYTES."""
    check(
        num_bytes <= MAX_TARGET_BYTES,
        f"the targets of distillation take more than {MAX_TARGET_BYTES >> 20} MB; "
        "raise --plausibility, or lower --limit or --batch-size",
    )


def compute_targets(reference_model, vlm, examples, config) -> Targets:
    """Compute the targets of all response tokens of a few examples, in the examples' order."""
    # 1. The reference reads the responses with the image, and with the image hidden.
    rows_with_image = pack_examples(vlm, examples)
    rows_without_image = [hide_image(vlm, example, config) for example in examples]
    states_with_image, _, _ = response_hidden_states(reference_model, rows_with_image)  # (N, D)
    states_without_image, _, _ = response_hidden_states(reference_model, rows_without_image)

    # 2. The targets of a block of tokens at a time, because each token has V logits.
    head = reference_model.vocab_head
    tokens_per_block = max(1, MAX_LOGITS // len(head))
    targets_of_blocks = []
    for block_with_image, block_without_image in zip(
        states_with_image.split(tokens_per_block),
        states_without_image.split(tokens_per_block),
        strict=True,
    ):
        target_logps = contrastive_targets(
            vocab_logps(block_with_image, head),
            vocab_logps(block_without_image, head),
            config.contrast,
            plausibility=config.plausibility,
        )
        targets_of_blocks.append(sparse_targets(target_logps.exp()))
    return join_targets(targets_of_blocks)


def vocab_logps(states, head):
    """Return the log-probs of the whole vocabulary for each token of a block, (n, V)."""
    logits = (states @ head.T).float()
    return torch.log_softmax(logits, dim=-1)


def sparse_targets(probs) -> Targets:
    """Return distributions (n, V) as Targets, which leave out tokens of probability 0."""
    is_possible = probs > 0
    _, token_ids = is_possible.nonzero(as_tuple=True)
    return Targets(
        token_ids=token_ids.int().cpu(),
        probs=probs[is_possible].cpu(),
        counts=is_possible.sum(dim=1).int().cpu(),
    )


def hide_image(vlm, example, config) -> PackedExample:
    """Return an example packed with its image hidden: masked tokens left out, or with noise."""
    record = example.record
    if config.noise_steps:
        generator = seeded_generator(config.seed, record.id, "noise")
        features = noisy_image_features(vlm, record.paths, config.noise_steps, generator)
        return PackedExample.of(example.prompt_ids, features, example.responses)

    # Image token i stays visible if its draw is at least rho (Eq. 6). Draws are below 1, so none
    # stays with rho = 1. Visible tokens keep their positions (data/packing.py).
    generator = seeded_generator(config.seed, record.id, "mask")
    draws = torch.rand(example.num_image_tokens, generator=generator)
    visible = (draws >= config.rho).nonzero().flatten().tolist()
    features = vlm.encode_images(record.paths)
    return PackedExample.of(example.prompt_ids, features, example.responses, visible)
