"""The reward model: the MLLM with a scalar head, read where a response ends (Sec. 2.1)."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.packing import PackedExample
from minialign.logprobs import response_hidden_states
from minialign.models.adapters import load_adapter
from minialign.models.checkpoint import open_tensors, read_tensors, save_tensors
from minialign.models.loading import VLM, load_vlm
from minialign.models.policy import scalar_head
from minialign.utils.distributed import map_across_ranks
from minialign.utils.files import check, read_json


def score_responses(model, head, rows):
    """Scores (B, k) in fp32 of every response: the head on the hidden state that has read the response's last token."""
    longer = [
        replace(row, branches=[(lead, response + response[-1:]) for lead, response in row.branches])
        for row in rows
    ]
    hidden, _, lengths = response_hidden_states(
        model, longer
    )  # a position reads what stands before its target
    last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
    return head(hidden[last].float())[:, 0].view(len(rows), -1)


@dataclass
class RewardModel:
    """A trained reward model: r(x, y)."""

    vlm: VLM
    head: nn.Linear

    @torch.no_grad()
    def score(self, records, texts, batch=16):
        """Scores (n, k) of k responses to each of n records' prompts, as texts; the end token is added and read."""
        tokenizer, template = self.vlm.tokenizer, self.vlm.template

        def row(record, own):
            """A Row; what does not fit the context is not read."""
            prompt = encode_prompt(tokenizer, template, record.turns)
            responses = [
                encode_response(tokenizer, template, text)[
                    : self.vlm.max_response_tokens(record, prompt)
                ]
                for text in own
            ]
            return PackedExample.of(prompt, self.vlm.encode_images(record.paths), responses)

        def scored(pairs):
            """The scores of (record, texts) pairs, a few at a time."""
            for first in range(0, len(pairs), batch):
                rows = [row(*pair) for pair in pairs[first : first + batch]]
                yield from score_responses(self.vlm.model, self.head, rows).tolist()

        return torch.tensor(
            map_across_ranks(list(zip(records, texts)), lambda own: list(scored(own)))
        )


def save_reward_model(policy, template, directory):
    """Write the scalar head as `directory`/score.safetensors, beside the adapter/ or model/ that it was trained with."""
    save_tensors(
        dict(policy.scalar_head.named_parameters()),
        Path(directory) / "score.safetensors",
        {"template": template},
    )


def load_reward_model(directory, base, dtype=None, device="cpu"):
    """Reward from a folder that `train.py --method reward` wrote, on the base that its adapter names or, if that is gone, on `base`,
    with the prompt template that it was trained with."""
    directory, file = Path(directory), Path(directory) / "score.safetensors"
    check(
        file.exists(), f"{file}: no such file; give a folder that `train.py --method reward` wrote"
    )
    with open_tensors(file) as tensors:
        files, template = (
            dict.fromkeys(tensors.keys(), file),
            (tensors.metadata() or {}).get("template"),
        )
    if (directory / "model").is_dir():
        vlm = load_vlm(directory / "model", template, dtype, device=device)
    else:
        named = read_json(directory / "adapter" / "adapter_config.json", dict).get(
            "base_model_name_or_path"
        )
        named = named if named and Path(named).is_dir() else base
        check(
            named is not None,
            f"{directory}: the base model that its adapter names is not there; give it with --model",
        )
        vlm = load_vlm(named, template, dtype, device=device)
        load_adapter(vlm.model, directory / "adapter")
    head = scalar_head(vlm.model)
    wanted = {name: (name, tensor.shape) for name, tensor in head.state_dict().items()}
    head.load_state_dict(read_tensors(file, files, wanted, device=device))
    vlm.model.requires_grad_(False)
    return RewardModel(vlm, head)
