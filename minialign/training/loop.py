"""The training loop: seeded batches, AdamW, one log line a step, and exact restarts.

On a CPU, with the same machine, packages, threads and processes, a run that is killed and resumed
ends with the same bits as one that was never stopped. README.md beside this file lists all that
makes it so. This module does three of these things:

1. `state.safetensors` holds all that a step changes: the trained weights and Adam's moments in full
   precision, what the method itself keeps, and the number of steps done.
2. The batch of a step is a function of the seed, the step, the batch size and the number of
   examples (`batch_indices`). There is no data iterator whose position would have to be saved.
3. A line of the log is written before the state of its step. So the log may be ahead of the last
   saved state. Its additional lines are dropped when the run is resumed, and their steps are done
   again.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minialign.methods.base import microbatches
from minialign.models.safetensors_files import open_tensors, read_tensors, save_tensors
from minialign.models.split import gradient_norm, sum_gradients_of_parts
from minialign.training.messages import warn_if_nothing_learned
from minialign.training.progress import Speedometer, describe_step, make_progress_bar
from minialign.utils.distributed import (
    all_reduce_sum,
    barrier,
    gather_results,
    join_lists,
    local_share,
)
from minialign.utils.files import append_jsonl, check, friendly_errors, write_jsonl
from minialign.utils.interrupts import Interrupted, delay_interrupts

CANNOT_RESUME = "cannot resume from it; use a new --out directory"
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")  # what torch's AdamW keeps for each parameter


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train."""

    steps: int
    batch_size: int  # records a step
    lr: float  # peak learning rate
    projector_lr: float  # peak learning rate of the projector
    seed: int  # of the order of the records
    max_tokens_per_microbatch: int = 16384  # padding and image tokens included
    warmup: float = 0.03  # share of the steps
    clip: float = 1.0  # norm that gradients are clipped to
    save_every: int = 20  # steps
    constant: bool = False  # no cosine decay after the warm-up


def batch_indices(num_examples, schedule, step) -> list[int]:
    """Return the indices of the examples of a step.

    All epochs together are one long stream: a random permutation of the examples, then another one,
    and so on. The stream is cut into batches, so a batch may reach from one epoch into the next.
    """
    first = step * schedule.batch_size
    indices = []
    permuted_epoch = None
    for position in range(first, first + schedule.batch_size):
        epoch, offset = divmod(position, num_examples)
        if epoch != permuted_epoch:
            generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + epoch)
            permutation = torch.randperm(num_examples, generator=generator).tolist()
            permuted_epoch = epoch
        indices.append(permutation[offset])
    return indices


def lr_multiplier(step, schedule) -> float:
    """Return the share of the peak learning rate at a step.

    It rises linearly over the warm-up. Then it follows a cosine down to 0, or stays if `constant`.
    """
    warmup_steps = max(1, round(schedule.warmup * schedule.steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule.constant:
        return 1.0
    decay_steps = max(1, schedule.steps - warmup_steps)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / decay_steps)


def train(policy, method, examples, schedule, folder, title="train"):
    """Train `policy` with a method on examples, or resume from the state that is in `folder`.

    Writes one line a step to `folder`/metrics.jsonl, and a state every few steps. Ctrl-C, SIGTERM
    or SIGHUP ends the current step, saves a state and raises Interrupted.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state_path = folder / "state.safetensors"
    log_path = folder / "metrics.jsonl"

    # 1. Make an optimizer. The projector has a learning rate of its own.
    parameters = policy.parameters()
    groups = policy.parameter_groups(schedule.lr, schedule.projector_lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    # 2. Resume from the last saved state, if there is one.
    first_step = 0
    if state_path.exists():
        first_step = restore_state(state_path, parameters, optimizer, method.state_tensors())
    log_lines = read_log(log_path, first_step)
    barrier()  # all processes must have read the log before it is written anew
    write_jsonl(log_path, log_lines)

    # 3. Take the remaining steps.
    speedometer = Speedometer(policy, method)
    with (
        make_progress_bar(title, first_step, schedule.steps) as progress_bar,
        delay_interrupts() as signal_numbers,
    ):
        for step in range(first_step, schedule.steps):
            indices = batch_indices(len(examples), schedule, step)
            batch = [examples[i] for i in indices]
            line, learned = train_step(
                policy, method, batch, optimizer, schedule=schedule, step=step
            )

            append_jsonl(log_path, [line])
            log_lines.append(line)
            warn_if_nothing_learned(log_lines)
            speedometer.add_step(batch, learned, line["seconds"])
            progress_bar.set_postfix_str(describe_step(line, speedometer), refresh=False)
            progress_bar.update()

            steps_done = step + 1
            is_due = steps_done % schedule.save_every == 0 or steps_done == schedule.steps
            # A signal may reach one process before the others. The lists of all processes are
            # joined at every step, so that all of them end with the same step.
            signals = join_lists(signal_numbers)
            if is_due or signals:
                save_state(state_path, steps_done, parameters, optimizer, method.state_tensors())
            if signals:
                break

        # 4. Report a signal. It may have come as late as while the last state was saved.
        signals = join_lists(signal_numbers)
        if signals:
            raise Interrupted(signals[0])


def train_step(policy, method, batch, optimizer, *, schedule, step) -> tuple[dict, list]:
    """Take one training step on a batch of examples.

    Returns its line for the log, and the examples that it learned from. If the method collects
    none, the weights stay.
    """
    started = time.perf_counter()

    # 1. Collect what is learned from: the batch itself, or responses of the current policy.
    examples, collected_metrics = method.collect(batch, step)

    # 2. Set the learning rates of this step. `peak` is from Policy.parameter_groups.
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * lr_multiplier(step, schedule)

    # 3. Learn from the examples, in one pass or, for PPO, several.
    loss = 0.0
    metrics = {}
    grad_norm = 0.0
    num_passes = method.passes if examples else 0
    for _ in range(num_passes):
        # a. Each process adds up the gradients of its share of the micro-batches.
        micro_batches = microbatches(examples, schedule.max_tokens_per_microbatch)
        local_metrics = []
        for micro_batch in local_share(micro_batches):
            micro_loss, micro_metrics = method.loss(micro_batch, examples)
            micro_loss.backward()
            local_metrics.append({"loss": micro_loss.item(), **micro_metrics})

        # b. Add up over all micro-batches and processes. The loss of a micro-batch is its share of
        #    the mean over the batch, so the sum is that mean.
        metrics = sum_metrics(gather_results(local_metrics, num_items=len(micro_batches)))
        loss = metrics.pop("loss")
        grad_norm = reduce_and_clip_gradients(policy, max_norm=schedule.clip)
        check(
            math.isfinite(loss + grad_norm),
            f"the loss is {loss} at step {step}, and its gradient has norm {grad_norm}; "
            "lower the learning rate, or give --dtype bfloat16 if the weights are float16",
        )

        # c. Update the weights.
        optimizer.step()
        optimizer.zero_grad()

    # 4. Report.
    line = {
        "step": step,
        "loss": loss,
        **metrics,
        **collected_metrics,
        "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm,
        "seconds": round(time.perf_counter() - started, 4),
    }
    return line, examples


def sum_metrics(metrics_of_micro_batches) -> dict:
    """Return the sum of each metric over the micro-batches of a batch."""
    totals = {}
    for metrics in metrics_of_micro_batches:
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals


def reduce_and_clip_gradients(policy, max_norm) -> float:
    """Sum the gradients over all models, and over the parts of each, and clip them.

    Returns their norm before clipping.
    """
    parameters = policy.parameters()
    for parameter in parameters.values():
        if parameter.grad is None:  # this process had no micro-batch
            parameter.grad = torch.zeros_like(parameter)
    all_reduce_sum([parameter.grad for parameter in parameters.values()])
    sum_gradients_of_parts(parameters)
    norm = gradient_norm(parameters)
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, norm)
    return float(norm)


def save_state(path, steps_done, parameters, optimizer, method_tensors):
    """Write the trained weights, Adam's state, that of the method, and the number of steps done.

    The number is stored as "step".
    """
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    for name, tensor in method_tensors.items():
        tensors[f"method.{name}"] = tensor
    save_tensors(tensors, path, {"step": str(steps_done)})


def restore_state(path, parameters, optimizer, method_tensors) -> int:
    """Put a saved state back in place and return the number of steps it had done.

    Raises InputError if the state does not belong to these parameters.
    """
    # 1. Read the number of steps, and the names of the tensors.
    with open_tensors(path) as tensors, friendly_errors(path, CANNOT_RESUME):
        steps_done = int(tensors.metadata()["step"])
        stored_names = set(tensors.keys())

    # 2. List what must be there: the weights, the method's state, and Adam's. A run whose steps all
    #    found nothing to learn from has no Adam state. An entry is (key, shape), and the key says
    #    what the tensor is for: (parameter or tensor of the method, what is stored of it).
    wanted = {}
    for name, parameter in parameters.items():
        wanted[f"weight.{name}"] = ((parameter, "weight"), parameter.shape)
        if f"step.{name}" in stored_names:
            for key in ADAM_STATE:
                shape = torch.Size() if key == "step" else parameter.shape
                wanted[f"{key}.{name}"] = ((parameter, key), shape)
    for name, tensor in method_tensors.items():
        wanted[f"method.{name}"] = ((tensor, "method"), tensor.shape)

    # 3. Read all of it before anything is changed, then put it in place.
    files = dict.fromkeys(stored_names, path)
    tensors = read_tensors(path, files, wanted)
    for (target, kind), tensor in tensors.items():
        if kind in ("weight", "method"):
            target.data.copy_(tensor)
        elif kind == "step":
            optimizer.state[target][kind] = tensor  # torch keeps the step count on the CPU
        else:
            optimizer.state[target][kind] = tensor.to(target.device)
    return steps_done


def read_log(path, num_steps) -> list[dict]:
    """Return the log lines of the first steps. Raise InputError unless all of them are there."""
    lines = []
    if path.exists():
        with friendly_errors(path, CANNOT_RESUME):
            complete_lines = path.read_text().split("\n")[:-1]  # a line cut short has no "\n"
            lines = [json.loads(line) for line in complete_lines]
    lines = lines[:num_steps]
    check(
        len(lines) == num_steps,
        f"{path}: has {len(lines)} lines of the {num_steps} steps that the saved state has done; "
        f"{CANNOT_RESUME}",
    )
    for line_number, line in enumerate(lines, start=1):
        check(
            is_log_line(line),
            f"{path}, line {line_number}: not the numbers of a training step; {CANNOT_RESUME}",
        )
    return lines


def is_log_line(line) -> bool:
    """Return whether a JSON value is a line of the log: numbers by name, "step" among them."""
    if not isinstance(line, dict) or not {"step", "grad_norm"} <= line.keys():
        return False
    return all(type(value) in (int, float) for value in line.values())
