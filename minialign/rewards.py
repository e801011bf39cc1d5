"""The reward model: the MLLM with a scalar head, read where a response ends (Sec. 2.1)."""
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .adapters import load_adapter
from .checkpoint import open_tensors, save_tensors
from .files import BadInput, read_json
from .logprobs import scored_states
from .lora import scalar_head
from .parallel import spread
from .prompts import encode_prompt, encode_response
from .rows import Row
from .subject import Subject, load_subject


def scores(model, head, rows):
    """Scores (B, k) in fp32 of every response: the head on the hidden state that has read the response's last token."""
    longer = [replace(row, branches=[(lead, response + response[-1:]) for lead, response in row.branches]) for row in rows]
    hidden, _, lengths = scored_states(model, longer)  # a position reads what stands before its target
    last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
    return head(hidden[last].float())[:, 0].view(len(rows), -1)


@dataclass
class Reward:
    """A trained reward model: r(x, y)."""
    subject: Subject
    head: nn.Linear

    @torch.no_grad()
    def score(self, records, texts, batch=16):
        """Scores (n, k) of k responses to each of n records' prompts, as texts; the end token is added and read."""
        tokenizer, template = self.subject.tokenizer, self.subject.template
        def row(record, own):
            """A Row; what does not fit the context is not read."""
            prompt = encode_prompt(tokenizer, template, record.turns)
            responses = [encode_response(tokenizer, template, text)[:self.subject.room(record, prompt)] for text in own]
            return Row.of(prompt, self.subject.look(record.paths), responses)

        def scored(pairs):
            """The scores of (record, texts) pairs, a few at a time."""
            for first in range(0, len(pairs), batch):
                rows = [row(*pair) for pair in pairs[first:first + batch]]
                yield from scores(self.subject.model, self.head, rows).tolist()
        return torch.tensor(spread(list(zip(records, texts)), lambda own: list(scored(own))))


def save_reward(policy, template, directory):
    """Write the scalar head as `directory`/score.safetensors, beside the adapter/ or model/ that it was trained with."""
    save_tensors(dict(policy.score.named_parameters()), Path(directory) / "score.safetensors", {"template": template})


def load_reward(directory, base, dtype=None, device="cpu"):
    """Reward from a folder that `train.py --method reward` wrote, on the base that its adapter names or, if that is gone, on `base`,
    with the prompt template that it was trained with."""
    directory = Path(directory)
    with open_tensors(directory / "score.safetensors", device) as tensors:
        state, template = {name: tensors.get_tensor(name) for name in tensors.keys()}, (tensors.metadata() or {}).get("template")
    if (directory / "model").is_dir():
        subject = load_subject(directory / "model", template, dtype, device)
    else:
        named = read_json(directory / "adapter" / "adapter_config.json").get("base_model_name_or_path")
        named = named if named and Path(named).is_dir() else base
        if named is None:
            raise BadInput(f"{directory}: the base model that its adapter names is not there; give it with --model")
        subject = load_subject(named, template, dtype, device)
        load_adapter(subject.model, directory / "adapter")
    head = scalar_head(subject.model)
    if {name: tensor.shape for name, tensor in state.items()} != {name: tensor.shape for name, tensor in head.state_dict().items()}:
        raise BadInput(f"{directory / 'score.safetensors'}: no scalar head for this model of width {subject.model.config.text.width}, it holds "
                       f"{', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in state.items())}; give the folder of a reward trained on this base")
    head.load_state_dict(state)
    subject.model.requires_grad_(False)
    return Reward(subject, head)
