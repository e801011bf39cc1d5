"""Define what every training method works with: examples, micro-batches and reference log-probs."""

from dataclasses import dataclass

import torch
from tqdm import tqdm

from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.packing import PackedExample
from minialign.data.records import Record, errors_name_record
from minialign.logprobs import MAX_TOKENS, response_logps
from minialign.utils.distributed import gather_results, local_share
from minialign.utils.files import check


@dataclass
class Example:
    """A record as token ids: its prompt and its k responses, end tokens included."""

    record: Record
    prompt_ids: list[int]
    responses: list[list[int]]
    num_image_tokens: int
    ref_logps: torch.Tensor | None = None  # (k,), summed log-probs of the reference in nats
    scored_ids: list[list[int]] | None = None  # ids to score in place of the responses' (Sec. 3.3)
    rollout: object = None  # policy gradients keep a policy_gradient.Rollout here
    damaged: object = None  # mDPO keeps an mdpo.DamagedReference here
    targets: object = None  # distillation keeps the distillation.Targets of its response here

    @property
    def length(self) -> int:
        """Return the number of positions of the packed sequence, image tokens included."""
        # Each image placeholder of the prompt becomes image tokens. The prompt's last token belongs
        # to the responses: each of them reads that token first and does not read its own last one.
        prefix_length = len(self.prompt_ids) - len(self.record.paths) + self.num_image_tokens - 1
        return prefix_length + sum(len(response) for response in self.responses)


class Method:
    """A training method: where the responses of a step come from, and the loss on them.

    A training step calls `collect` once. Then it makes `passes` optimizer steps over what was
    collected. Each of them calls `loss` on every micro-batch.
    """

    passes: int = 1
    unit: str = "resp"  # what the progress line counts: "resp" for responses, or "pairs"
    stores_targets: bool = False  # whether targets are computed once, before training, and stored

    def collect(self, batch: list[Example], step: int) -> tuple[list[Example], dict]:
        """Return the examples of a step, and metrics for the log.

        Offline methods learn from the batch as it is. The others sample responses to its prompts.
        """
        return batch, {}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Return what `collect` changes in the method itself, for the saved state of a run.

        A run that is resumed copies the saved values into these tensors.
        """
        return {}

    def learned_from(self, examples: list[Example]) -> list[Example]:
        """Return the examples with the responses that `loss` reads: all of them."""
        return examples

    def loss(self, micro_batch: list[Example], batch: list[Example]) -> tuple[torch.Tensor, dict]:
        """Return the loss of a micro-batch of `batch`, and its metrics.

        Both are already divided by the number of examples, or of tokens, of the whole `batch`.
        Added up over its micro-batches, they are therefore the loss and the metrics of the batch.
        """
        raise NotImplementedError


def encode_example(vlm, record, texts) -> Example:
    """Return the Example of a record with `texts` as its responses.

    Raises InputError if an image cannot be read, if a text cannot be encoded, or if all together
    does not fit the model's context.
    """
    with errors_name_record(record):
        responses = [encode_response(vlm.tokenizer, vlm.template, text) for text in texts]
        prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns, system=record.system)
        num_image_tokens = vlm.total_image_tokens(record.paths)

    longest_response = max(len(response) for response in responses)
    excess = longest_response - vlm.max_response_tokens(record.paths, prompt_ids)
    context_length = vlm.model.config.text.max_position_embeddings
    check(
        excess <= 0,
        f"{record.location}: {num_image_tokens} image tokens, the prompt and a response of "
        f"{longest_response} tokens are {context_length + excess} tokens together, but the "
        f"model's context is {context_length}; shorten the text or remove the record "
        "(images are never cut)",
    )
    return Example(
        record=record,
        prompt_ids=prompt_ids,
        responses=responses,
        num_image_tokens=num_image_tokens,
    )


def pack_examples(vlm, examples) -> list[PackedExample]:
    """Return one packed sequence an example: its images and prompt once, then its k responses."""
    packed_examples = []
    for example in examples:
        packed_example = PackedExample.of(
            example.prompt_ids,
            vlm.encode_images(example.record.paths),
            example.responses,
            scored_ids=example.scored_ids,
        )
        packed_examples.append(packed_example)
    return packed_examples


def microbatches(examples, max_tokens) -> list[list[Example]]:
    """Split a batch into micro-batches of examples of similar length.

    The padded size of a micro-batch is at most `max_tokens`. An example that is longer than that
    gets a micro-batch of its own.
    """
    remaining = sorted(examples, key=lambda example: -example.length)  # longest first
    micro_batches = []
    while remaining:
        # The first example of a micro-batch is its longest: all others are padded to its length.
        size = max(1, max_tokens // remaining[0].length)
        micro_batches.append(remaining[:size])
        remaining = remaining[size:]
    return micro_batches


def add_reference_logps(policy, vlm, examples, max_tokens=MAX_TOKENS):
    """Set `ref_logps` of every example: the reference's summed log-probs (k,) in nats."""
    micro_batches = microbatches(examples, max_tokens)

    # 1. Each process computes the log-probs of its share of the micro-batches.
    local_logps = []
    with policy.reference() as reference_model:
        for micro_batch in tqdm(local_share(micro_batches), "reference", leave=False):
            logps, _ = response_logps(reference_model, pack_examples(vlm, micro_batch))  # (B, k)
            local_logps.append(logps.tolist())

    # 2. All processes get all of them.
    gathered_logps = gather_results(local_logps, num_items=len(micro_batches))
    for micro_batch, logps_of_batch in zip(micro_batches, gathered_logps, strict=True):
        for example, logps in zip(micro_batch, logps_of_batch, strict=True):
            example.ref_logps = torch.tensor(logps)
