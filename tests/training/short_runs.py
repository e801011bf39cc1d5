"""Short training runs on the tiny model, for the tests of the loop."""

import json
from dataclasses import dataclass
from pathlib import Path

from minialign.methods.base import Example, add_reference_logps, encode_example
from minialign.methods.preference import PreferenceMethod
from minialign.models.policy import Policy
from minialign.training.loop import Schedule, train

# Two batches of three out of five examples cross the end of an epoch. States are saved after the
# steps 2, 4 and 5.
SHORT = Schedule(steps=5, batch_size=3, lr=1e-3, projector_lr=5e-4, seed=0, save_every=2)


@dataclass
class Run:
    """What a short training run needs, and a way back to its start."""

    policy: Policy
    method: object
    examples: list[Example]

    def __post_init__(self):
        self.initial_weights = self.weights()

    def weights(self):
        """Return a copy of the trained weights."""
        return {name: p.detach().clone() for name, p in self.policy.parameters().items()}

    def reset(self):
        """Put the initial weights back, as in a new process."""
        for name, parameter in self.policy.parameters().items():
            parameter.data.copy_(self.initial_weights[name])
            parameter.grad = None

    def train(self, folder, schedule=SHORT, method=None):
        """Train, with the run's own method unless another one is given."""
        if method is None:
            method = self.method
        train(self.policy, method, self.examples, schedule, folder)


def make_run(vlm, records, rank=4) -> Run:
    """Return a DPO run on five records, with LoRA of the given rank (0: all weights)."""
    policy = Policy(vlm.model, rank, 8, seed=1)
    examples = []
    for record in records[:5]:
        examples.append(encode_example(vlm, record, [record.chosen, "A red cup is here."]))
    add_reference_logps(policy, vlm, examples)
    return Run(policy, PreferenceMethod(vlm, "dpo", 0.3), examples)


class WrappedMethod:
    """A method that does what another one does. Tests override a part of it."""

    def __init__(self, method):
        self.method = method
        self.passes = method.passes
        self.unit = method.unit

    def collect(self, batch, step):
        return self.method.collect(batch, step)

    def learned_from(self, examples):
        return self.method.learned_from(examples)

    def state_tensors(self):
        return self.method.state_tensors()

    def loss(self, examples, batch):
        return self.method.loss(examples, batch)


class DyingMethod(WrappedMethod):
    """A method that raises MemoryError after a number of calls, as if it had been killed."""

    def __init__(self, method, calls):
        super().__init__(method)
        self.calls_left = calls

    def loss(self, examples, batch):
        if self.calls_left == 0:
            raise MemoryError("killed")
        self.calls_left -= 1
        return super().loss(examples, batch)


def read_log(folder):
    """Return the lines of the log, without the seconds that may differ between two runs."""
    lines = []
    for text in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        del line["seconds"]
        lines.append(line)
    return lines
