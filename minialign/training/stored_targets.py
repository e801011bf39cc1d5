"""Store the targets of distillation, so that a resumed run does not compute them again."""

from dataclasses import replace

import torch

from minialign.methods.base import Example
from minialign.methods.distillation import Targets, join_targets, split_targets
from minialign.models.checkpoint import save_tensors
from minialign.models.safetensors_files import open_tensors
from minialign.utils.messages import print_message


def read_or_prepare_targets(method, examples, *, path, key) -> list[Example]:
    """Return the examples with responses and targets, from `path` or computed and stored there.

    `key` is a text that changes with everything that the targets depend on.
    """
    if path.exists():
        stored_examples = read_targets(examples, path, key)
        if stored_examples is not None:
            return stored_examples
        print_message(
            f"{path} was computed from other weights, data or settings, or is damaged; "
            "computing it again",
        )
    examples = method.prepare(examples)
    save_targets(examples, path, key)
    return examples


def save_targets(examples, path, key):
    """Write the responses and the targets of all examples, each joined into one tensor."""
    response_ids = []
    response_lengths = []
    for example in examples:
        response = example.responses[0]
        response_ids += response
        response_lengths.append(len(response))
    targets = join_targets([example.targets for example in examples])
    tensors = {
        "response_ids": torch.tensor(response_ids, dtype=torch.int32),
        "response_lengths": torch.tensor(response_lengths, dtype=torch.int32),
        "token_ids": targets.token_ids,
        "probs": targets.probs,
        "counts": targets.counts,
    }
    save_tensors(tensors, path, {"key": key})


def read_targets(examples, path, key) -> list[Example] | None:
    """Return the examples with the stored responses and targets.

    Returns None if the file has another key or is incomplete.
    """
    # 1. Read the file, and compare its key and the lengths of its tensors.
    names = ("response_ids", "response_lengths", "token_ids", "probs", "counts")
    with open_tensors(path) as tensors:
        metadata = tensors.metadata() or {}
        if metadata.get("key") != key or set(tensors.keys()) != set(names):
            return None
        stored = {name: tensors.get_tensor(name) for name in names}
    num_tokens = len(stored["response_ids"])
    num_entries = len(stored["token_ids"])
    is_complete = (
        len(stored["response_lengths"]) == len(examples)
        and int(stored["response_lengths"].sum()) == num_tokens
        and len(stored["counts"]) == num_tokens
        and int(stored["counts"].sum()) == num_entries
        and len(stored["probs"]) == num_entries
    )
    if not is_complete:
        return None

    # 2. Give each example its response and its targets. Rejected responses have no targets.
    lengths = stored["response_lengths"].tolist()
    responses = stored["response_ids"].split(lengths)
    all_targets = Targets(stored["token_ids"], stored["probs"], stored["counts"])
    examples_with_targets = []
    for example, response, targets in zip(
        examples, responses, split_targets(all_targets, lengths), strict=True
    ):
        examples_with_targets.append(
            replace(
                example,
                responses=[response.tolist(), *example.responses[1:]],
                targets=targets,
            )
        )
    return examples_with_targets
