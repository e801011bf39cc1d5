"""Score responses with a reward model: a language model with a scalar head (Sec. 2.1)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.packing import PackedExample
from minialign.data.records import Record, errors_name_record
from minialign.data.templates import find_template
from minialign.logprobs import response_hidden_states
from minialign.models.adapters import load_adapter
from minialign.models.loading import VLM, load_vlm
from minialign.models.policy import scalar_head
from minialign.models.safetensors_files import open_tensors, read_tensors, save_tensors
from minialign.pairs.image_batches import batches_with_images
from minialign.utils.distributed import gather_results, local_share
from minialign.utils.files import InputError, check, read_json

HEAD_FILE = "score.safetensors"


def score_responses(model, head, rows) -> torch.Tensor:
    """Return the scores (B, k) in fp32 of the k responses of each packed example.

    The scalar head reads the hidden state of the position that has read the whole response, its
    last token included.
    """
    # `response_hidden_states` returns the positions that predict a response's tokens. None of them
    # has read the last token. So the last token is repeated: the position that predicts the
    # repetition has read all of the response.
    extended_rows = []
    for row in rows:
        branches = [(lead, response + response[-1:]) for lead, response in row.branches]
        extended_rows.append(replace(row, branches=branches))
    hidden, _, lengths = response_hidden_states(model, extended_rows)

    ends = torch.tensor(lengths, device=hidden.device).cumsum(0)
    last_hidden = hidden[ends - 1].float()  # (B * k, D)
    return head(last_hidden)[:, 0].view(len(rows), -1)


@dataclass
class RewardModel:
    """A trained reward model r(x, y): a model with its adapter, and the scalar head."""

    vlm: VLM
    head: nn.Linear

    def check_records(self, records: list[Record]):
        """Raise InputError for a record whose prompt fills the context of the model."""
        context_length = self.vlm.model.config.text.max_position_embeddings
        for record in records:
            prompt_ids = encode_record_prompt(self.vlm, record)
            with errors_name_record(record):
                check(
                    self.vlm.max_response_tokens(record.paths, prompt_ids) > 0,
                    "the image and the prompt fill the reward model's context of "
                    f"{context_length} tokens; shorten the prompt, remove the record, or give "
                    "another reward model",
                )

    def score(self, records: list[Record], texts: list, batch_size=16) -> torch.Tensor:
        """Return the scores (n, k) of k responses, given as texts, to the prompts of n records."""
        # The processes share the records.
        scores = self.score_locally(local_share(records), local_share(texts), batch_size)
        return torch.tensor(gather_results(scores.tolist(), num_items=len(records)))

    @torch.no_grad()
    def score_locally(self, records: list[Record], texts: list, batch_size=16) -> torch.Tensor:
        """Return the scores as `score` does, all of them computed by this process."""
        scores = []
        for rows in packed_batches(self.vlm, records, texts, batch_size):
            scores += score_responses(self.vlm.model, self.head, rows).tolist()
        return torch.tensor(scores)


def encode_record_prompt(vlm: VLM, record: Record) -> list[int]:
    """Return the prompt (ids) of a record, in the chat template of a model."""
    with errors_name_record(record):  # the template may be another one than the policy's
        return encode_prompt(vlm.tokenizer, vlm.template, record.turns, system=record.system)


def pack_responses(vlm: VLM, record: Record, texts: list[str]) -> PackedExample:
    """Return one packed example of a record's prompt and its responses, still without its images.

    The responses include their end tokens. They may come from another model. What does not fit this
    model's context is cut off.
    """
    prompt_ids = encode_record_prompt(vlm, record)
    max_tokens = vlm.max_response_tokens(record.paths, prompt_ids)
    responses = []
    for text in texts:
        response = encode_response(vlm.tokenizer, vlm.template, text)
        responses.append(response[:max_tokens])
    return PackedExample.of(prompt_ids, [], responses)


def packed_batches(
    vlm: VLM, records: list[Record], texts: list[list[str]], batch_size: int
) -> Iterator[list[PackedExample]]:
    """Yield the packed examples of records and their responses, with images, in batches that fit.

    batch_size: the most examples in a batch.
    """
    examples = []
    for record, record_texts in zip(records, texts, strict=True):
        examples.append(pack_responses(vlm, record, record_texts))
    paths = [record.paths for record in records]
    return batches_with_images(
        vlm, examples, paths, lambda i: vlm.encode_images(paths[i]), batch_size=batch_size
    )


def save_reward_model(policy, template, directory):
    """Write the scalar head to `directory`, next to the adapter/ or model/ it was trained with."""
    parameters = dict(policy.scalar_head.named_parameters())
    save_tensors(parameters, Path(directory) / HEAD_FILE, {"template": template})


def load_reward_model(directory, base, dtype=None, device="cpu") -> RewardModel:
    """Load the reward model that `train.py --method reward` wrote to `directory`.

    An adapter is put on the base model that it names, or on `base` if that one is not there. The
    prompt template is the one that the reward model was trained with.
    """
    # 1. The scalar head's file also says which prompt template belongs to it.
    directory = Path(directory)
    head_file = directory / HEAD_FILE
    check(
        head_file.exists(),
        f"{head_file}: no such file; give a folder that `train.py --method reward` wrote",
    )
    with open_tensors(head_file) as tensors:
        tensor_names = list(tensors.keys())
        metadata = tensors.metadata() or {}
    template = metadata.get("template")
    if template is not None:
        try:
            find_template(template)
        except InputError as error:
            raise InputError(f"{head_file}: {error}; train the reward model again") from None

    # 2. The model: all weights, or a base model with an adapter.
    if (directory / "model").is_dir():
        vlm = load_vlm(directory / "model", template, dtype=dtype, device=device)
    else:
        base = find_base_model(directory, base)
        vlm = load_vlm(base, template, dtype=dtype, device=device)
        load_adapter(vlm.model, directory / "adapter", base)

    # 3. The scalar head. Nothing of the reward model is trained any more.
    head = scalar_head(vlm.model)
    wanted = {name: (name, tensor.shape) for name, tensor in head.state_dict().items()}
    files = dict.fromkeys(tensor_names, head_file)
    head.load_state_dict(read_tensors(head_file, files, wanted, device=device))
    vlm.model.requires_grad_(False)
    return RewardModel(vlm, head)


def find_base_model(directory, base):
    """Return the base model that the adapter in `directory` names if it is there, else `base`."""
    adapter_config = read_json(directory / "adapter" / "adapter_config.json", dict)
    named_base = adapter_config.get("base_model_name_or_path")
    has_name = isinstance(named_base, str) and named_base
    if has_name and Path(named_base).is_dir():
        return named_base
    check(
        base is not None,
        f"{directory}: the base model {named_base!r:.100}, which its adapter names, is not there; "
        "give it with --model",
    )
    return base
