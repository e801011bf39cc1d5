"""The loop: batches in a seeded order, AdamW, warm-up and cosine, a log line a step, checkpoints, restarts to the bit."""

import contextlib
import json
import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minialign.methods.base import microbatches
from minialign.models.checkpoint import open_tensors, read_tensors, save_tensors
from minialign.utils.distributed import all_reduce_sum, barrier, is_main_process, map_across_ranks
from minialign.utils.files import check, friendly_errors, write_jsonl

CANNOT_RESUME = "it cannot be gone on with; start a new --out"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: optimiser steps, examples a step, peak learning rates, padded tokens a micro-batch."""

    steps: int
    batch_size: int
    lr: float
    projector_lr: float
    seed: int
    max_tokens_per_microbatch: int = 16384
    warmup: float = 0.03
    clip: float = 1.0
    save_every: int = 20
    constant: bool = False


def batch_indices(n, schedule, step):
    """Indices of the examples of a step: one long stream of seeded permutations, cut into batches."""
    indices = []
    for place in range(step * schedule.batch_size, (step + 1) * schedule.batch_size):
        epoch, offset = divmod(place, n)
        if not indices or offset == 0:
            generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + epoch)
            order = torch.randperm(n, generator=generator).tolist()
        indices.append(order[offset])
    return indices


def lr_multiplier(step, schedule):
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to zero, or all of it if `constant`."""
    warm = max(1, round(schedule.warmup * schedule.steps))
    if step < warm:
        return (step + 1) / warm
    return (
        1.0
        if schedule.constant
        else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, schedule.steps - warm))
    )


def _save(path, step, parameters, optimiser):
    state = {f"weight.{name}": p for name, p in parameters.items()}
    for name, p in parameters.items():
        state |= {f"{key}.{name}": value for key, value in optimiser.state[p].items()}
    save_tensors(state, path, {"step": str(step)})


def _restore(path, parameters, optimiser):
    """The step to go on from; weights and moments are put in place. Raises BadInput where they are not this run's."""
    with open_tensors(path) as tensors, friendly_errors(path, CANNOT_RESUME):
        step, names = int(tensors.metadata()["step"]), set(tensors.keys())
    wanted = {}
    for (
        name,
        p,
    ) in parameters.items():  # a run whose steps all found nothing to learn from has no moments
        for key in (
            "weight",
            *(("step", "exp_avg", "exp_avg_sq") if f"step.{name}" in names else ()),
        ):
            wanted[f"{key}.{name}"] = ((p, key), torch.Size() if key == "step" else p.shape)
    for (p, key), tensor in read_tensors(path, dict.fromkeys(names, path), wanted).items():
        if key == "weight":
            p.data.copy_(tensor)
        else:
            optimiser.state[p][key] = tensor if key == "step" else tensor.to(p.device)
    return step


def train(policy, method, examples, schedule, folder, title="train"):
    """Train `policy` by a Method on examples; goes on from `folder`/state.safetensors if that is there.

    Appends a line a step to `folder`/metrics.jsonl. An interrupt is saved and then goes up.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters, state, log = (
        policy.parameters(),
        folder / "state.safetensors",
        folder / "metrics.jsonl",
    )
    optimiser = torch.optim.AdamW(
        policy.parameter_groups(schedule.lr, schedule.projector_lr), weight_decay=0.0
    )
    done = _restore(state, parameters, optimiser) if state.exists() else 0
    with friendly_errors(log, CANNOT_RESUME):
        lines = (
            [json.loads(line) for line in log.read_text().split("\n")[:-1]][:done]
            if log.exists()
            else []
        )
    check(
        len(lines) == done,
        f"{log}: has {len(lines)} lines of the {done} steps that {state.name} has done; {CANNOT_RESUME}",
    )
    barrier()  # until all have read what was done before
    write_jsonl(log, lines)
    with (
        open(log if is_main_process() else os.devnull, "a", encoding="utf-8") as stream,
        tqdm(total=schedule.steps, initial=done, desc=title, unit="step") as bar,
        delay_keyboard_interrupt() as interrupted,
    ):
        for step in range(done, schedule.steps):
            line = _step(
                policy,
                method,
                [examples[i] for i in batch_indices(len(examples), schedule, step)],
                schedule,
                optimiser,
                step,
            )
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            bar.set_postfix(
                {
                    key: f"{line[key]:.3f}"
                    for key in ("loss", "margin", "reward", "kl")
                    if key in line
                }
            )
            bar.update()
            if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps or interrupted:
                _save(state, step + 1, parameters, optimiser)
            if interrupted:
                raise KeyboardInterrupt


@contextlib.contextmanager
def delay_keyboard_interrupt():
    """Within, Ctrl-C fills the list that is given instead of breaking a step in the middle."""
    asked = []
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def backward(method, part, whole):
    """Add the gradient of a part's loss; the loss and the part's share of the means."""
    loss, means = method.loss(part, whole)
    loss.backward()
    return {"loss": loss.item()} | means


def _step(policy, method, batch, schedule, optimiser, step):
    """One step over what the method collects for a batch; its line for the log. Where that is nothing, the weights stay."""
    began = time.perf_counter()
    examples, collected = method.collect(batch, step)
    loss, means, norm = 0.0, {}, 0.0
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * lr_multiplier(step, schedule)
    for _ in range(method.passes if examples else 0):
        loss, means, trained = 0.0, {}, list(policy.parameters().values())
        # Each process has its gradient from its own share; only what is logged is exchanged here.
        for part in map_across_ranks(
            microbatches(examples, schedule.max_tokens_per_microbatch),
            lambda parts: [backward(method, part, examples) for part in parts],
        ):
            loss += part.pop("loss")
            means = {name: means.get(name, 0.0) + stat for name, stat in part.items()}
        for p in trained:
            p.grad = (
                torch.zeros_like(p) if p.grad is None else p.grad
            )  # of a process without a share
        all_reduce_sum([p.grad for p in trained])
        norm = float(torch.nn.utils.clip_grad_norm_(trained, schedule.clip))
        check(
            math.isfinite(loss + norm),
            f"the loss is {loss} at step {step}, its gradient {norm} long; "
            "lower the learning rate, or give --dtype bfloat16 if the weights are float16",
        )
        optimiser.step()
        optimiser.zero_grad()
    rates = {
        "lr": optimiser.param_groups[0]["lr"],
        "grad_norm": norm,
        "seconds": round(time.perf_counter() - began, 4),
    }
    return {"step": step, "loss": loss, **means, **collected, **rates}
