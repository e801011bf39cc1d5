"""Run commands one after the other in the same processes, with whole models or with split ones.

A command is a name and its arguments. That all run in the same processes saves their start.
"""

import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

import torch

import sample
import train
from minialign import evaluate
from minialign.data.packing import PackedExample, pack
from minialign.logprobs import response_logps
from minialign.models.adapters import load_adapter, save_adapter
from minialign.models.checkpoint import load_model, save_model
from minialign.models.llava import hidden_states
from minialign.models.policy import Policy
from minialign.models.safetensors_files import save_tensors
from minialign.models.split import (
    local_part,
    split_models,
    sum_gradients_of_parts,
    whole_shape,
)
from minialign.pairs import annotators
from minialign.training import loop
from minialign.utils.distributed import init_distributed, num_processes
from minialign.utils.files import write_json

SCRIPTS = {"train": train, "sample": sample, "evaluate": evaluate}


def verdict_by_length(answer):
    """Return a verdict that depends on the whole answer. The tiny model never gives a real one."""
    return len(answer) % 2


@contextlib.contextmanager
def interrupt_at_once():
    """Take the place of `delay_interrupts`. A signal has come before the first step."""
    yield [2]


def do_nothing(argument):
    """Take the place of functions that a process may call only once."""


def run_script(script, *words):
    """Run a script. With "stop" before its options, a run ends after its first step."""
    options = words[1:] if words[0] == "stop" else words
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", [script, *options]))
        stack.enter_context(patch.object(annotators, "parse_verdict", verdict_by_length))
        if words[0] == "stop":
            stack.enter_context(patch.object(loop, "delay_interrupts", interrupt_at_once))
            stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        if num_processes() > 1:
            stack.enter_context(patch.object(SCRIPTS[script], "init_distributed", do_nothing))
            stack.enter_context(patch.object(SCRIPTS[script], "split_models", do_nothing))
        SCRIPTS[script].main()


def copy_files(model_folder, adapter, out):
    """Load a model and an adapter, and write both again. Write how large the layers are, too."""
    out = Path(out)
    model = load_model(model_folder)
    save_model(model, model_folder, out / "model")
    policy = load_adapter(model, adapter, model_folder)
    save_adapter(policy, out / "adapter", model_folder)
    parameters = model.language_model.layers.parameters()
    write_json(out / "bytes.json", sum(parameter.nbytes for parameter in parameters))


def write_gradients(model_folder, rank, out):
    """Write hidden states, log-probs and the gradient of their sum, for two prompts as text."""
    # 1. A policy whose adapters have an effect. They start at zero.
    model = load_model(model_folder)
    policy = Policy(model, rank=rank, alpha=8)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.parameters().items():
        if name.endswith("lora_B"):
            whole = torch.randn(whole_shape(name, parameter.shape), generator=generator)
            parameter.data.copy_(local_part(name, 0.1 * whole))

    # 2. The forward and the backward pass.
    examples = [
        PackedExample.of([1, 20, 21, 13, 40], [], [[50, 51, 52], [60, 61]]),
        PackedExample.of([1, 22, 43, 44, 45, 46], [], [[53, 54], [62]]),
    ]
    with torch.no_grad():
        hidden = hidden_states(model, pack(model, examples))
    logps, _ = response_logps(model, examples)
    logps.sum().backward()

    # 3. The gradients. Those of the parts are put together when they are written.
    parameters = {}
    for name, parameter in policy.parameters().items():
        if parameter.grad is not None:  # there is no image, so the projector has none
            parameters[name] = parameter
    sum_gradients_of_parts(parameters)
    tensors = {"hidden": hidden, "logps": logps}
    for name, parameter in parameters.items():
        tensors[name] = parameter.grad
    save_tensors(tensors, out)


FUNCTIONS = {"copy": copy_files, "gradients": write_gradients}


def run_all(commands):
    """Run commands one after the other, each given as a name and its arguments."""
    for name, *arguments in commands:
        if name in FUNCTIONS:
            FUNCTIONS[name](*arguments)
        else:
            run_script(name, *arguments)


def run_split_in_two(commands):
    """Run commands in one of several processes, of which every two hold one model."""
    init_distributed("cpu")
    split_models(2)
    run_all(commands)
