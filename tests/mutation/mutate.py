"""Give mutated inputs to the commands, and judge how each of them ends.

python tests/mutation/mutate.py --inputs 5000 --seed 0    a long run, which prints every fault
python tests/mutation/mutate.py --replay 17               one input again, with all that it prints

Every input must end with status 0, or with status 2 and one line on standard error that names the
file. Anything else is a fault: an exception, a signal, no end, too much memory, a line that nobody
expects. All that is random about an input comes from its seed, which is printed with a fault.

Each input runs in a child process that is forked after torch was imported, so that an input takes
a fraction of a second. The child works in a folder of its own that holds links to valid inputs.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "data")]
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from mutation_inputs import Target, all_targets, link_inputs, write_inputs  # noqa: E402
from mutations import (  # noqa: E402
    encode_odd,
    mutate_json,
    mutate_picture,
    mutate_safetensors,
    mutate_text_file,
    mutate_words,
    to_json,
)
from tqdm import tqdm  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from minialign import annotators, evaluate  # noqa: E402
from minialign.training.options import build_parser  # noqa: E402
from minialign.utils.cli import run_script  # noqa: E402

COMMANDS = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "annotators": annotators,
}
# What follows the checks of a command. A mutated command line stops there: it may be valid and ask
# for a million steps.
WORK = {
    "train": (train.RunFolder, "start"),
    "sample": (sample, "sample_pair_file"),
    "evaluate": (evaluate, "ask_set"),
    "annotators": (annotators, "pair_accuracy"),
}
MORE_WORK = (
    (sample, "prefill"),
    (sample, "score_records"),
    (sample, "sample_best_pairs"),
)

CPU_SECONDS = 10
WALL_SECONDS = 60  # a process that waits takes no CPU time
EXTRA_MEMORY = 2 << 30  # bytes, beyond what Python and torch take
LONGEST_LINE = 1500

# Lines on standard error that are no errors.
NOTES = (
    r"model .*, template .*, \d+ records, .*",
    r".*: nothing to resume; this is a new run",
    r".* is finished already",
    r"\d+ of \d+ records have the images and the prompt of an earlier one",
    r"\d+ pairs in .*; \d+ of them drawn in .*",
    r"\d+ pairs kept of .*",
    r"the contact sheet shows no annotations: .*",
    r"\d+ of \d+ records left out: .*",
    r".*: \d+ of \d+ records left out, .*",
    r".* was computed from other weights, data or settings, or is damaged; computing it again",
    r"\d+ of \d+ records keep a system text of their own; the others get that of --system",
    r"--model was given, so the defaults are the paper's; .*",
    r"[\w -]+: \d+(, [\w -]+: \d+)*",  # what an annotator counted
    r"(set|evalset) +model( .*)?",  # a row of the table of evaluate
    r"(model|this model|LLaVA-1.6-7B, the paper's) .*",  # one of the table of benchmarks
    r".*: \d+ images have several captions; each one counts",
    r"[\w-]+: its answers will not be scored: .*",
    r"[\w-]+: no submission will be written: .*",
    r"\d+ of \d+ images have gray values above 255, .*",
    r".*: has no answers of (base|control|aligned); measuring it again",
)
PROGRESS = re.compile(r"\d+%\||\d+(pair|step|it) \[")  # tqdm


@dataclass
class Outcome:
    """How an input ended: the exit status, negative for a signal, and what was printed."""

    status: int
    stdout: str
    stderr: str
    seconds: float = 0.0


class WorkBeginsError(BaseException):
    """Raised in the place of the work, when a command line was accepted."""


# --- running one input


def run_child(folder, command, words, *, stop_before_work=False) -> Outcome:
    """Run a command in a forked child whose working directory is `folder`."""
    output = folder / ".stdout"
    errors = folder / ".stderr"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(run_as_child(folder, command, words, stop_before_work))
    status = wait_for(child, started + WALL_SECONDS)
    return Outcome(
        status=status,
        stdout=output.read_bytes().decode("utf-8", "backslashreplace"),
        stderr=errors.read_bytes().decode("utf-8", "backslashreplace"),
        seconds=time.monotonic() - started,
    )


def run_as_child(folder, command, words, stop_before_work):
    """Call a command in this process, within limits, and return its exit status."""
    status = 99
    try:
        for number, name in ((1, ".stdout"), (2, ".stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        limit_resources()
        if stop_before_work:
            stop_at_work(command)
        # The two commands of the package are files in it, as `python -m` names them.
        sys.argv = [f"{command}.py", *words]
        status = run_script(COMMANDS[command].main)
    except SystemExit as error:
        status = error.code
    except WorkBeginsError:
        status = 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return status if isinstance(status, int) else 99


def limit_resources():
    """Limit the CPU time and the memory of this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/", "proc", "self", "statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def stop_at_work(command):
    """Make a command raise WorkBeginsError as soon as its input is checked."""

    def begin_work(*arguments, **named_arguments):
        raise WorkBeginsError

    for owner, name in (WORK[command], *MORE_WORK):
        setattr(owner, name, begin_work)


def wait_for(child, deadline):
    """Wait for a child, kill it at the deadline, and return its status."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


# --- mutating one input


def choose_target(rng) -> Target:
    """Choose a target by the weights."""
    targets = all_targets()
    return rng.choices(targets, weights=[target.weight for target in targets])[0]


def mutate_file(content, kind, rng):
    """Return the content of a file of a kind, mutated."""
    if kind == "picture":
        return mutate_picture(content, rng)
    if kind == "safetensors":
        return mutate_safetensors(content, rng)
    if rng.random() < 0.2:
        return mutate_text_file(content, rng)
    if kind == "json":
        return encode_odd(to_json(mutate_json(json.loads(content), rng), rng))
    # JSON Lines: one of the lines is mutated.
    lines = content.decode().splitlines()
    i = rng.randrange(len(lines))
    lines[i] = to_json(mutate_json(json.loads(lines[i]), rng), rng)
    return encode_odd("\n".join(lines) + "\n")


def run_input(inputs, workspace, seed) -> tuple[Target, list[str], Outcome]:
    """Make the mutated input of a seed in an empty folder, and run the command that reads it."""
    rng = random.Random(seed)
    target = choose_target(rng)
    words = target.words.split()
    link_inputs(inputs, workspace, target)
    if target.kind == "words":
        words = mutate_words(words, rng, option_names())
    else:
        path = workspace / target.path
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(mutate_file(content, target.kind, rng))
    outcome = run_child(workspace, target.command, words, stop_before_work=target.kind == "words")
    return target, words, outcome


def option_names():
    """Return the options of train.py, and some that only the other commands have."""
    names = [action.option_strings[-1] for action in build_parser()._actions]
    others = ["--corrupter", "--image", "--prompt", "--adapter", "--pope", "--captions", "--help"]
    return [*names, *others, "--contrast", "--unknown"]


# --- judging


def find_fault(outcome, names) -> str | None:
    """Return what is wrong with how an input ended, or None.

    names: an error line must have one of them. If there are none, it need not name anything.
    """
    if outcome.status == -signal.SIGXCPU:
        return f"takes more than {CPU_SECONDS} s of CPU time"
    if outcome.status not in (0, 2):
        return f"ends with status {outcome.status}"
    lines = []
    for line in outcome.stderr.replace("\r", "\n").split("\n"):
        if line.strip() and not PROGRESS.search(line) and not is_note(line):
            lines.append(line)
    if outcome.status == 0:
        return f"prints a line that nobody expects: {lines[0][:300]!r}" if lines else None
    if len(lines) != 1:
        return f"prints {len(lines)} lines in the place of one: {lines[:3]!r}"[:600]
    return find_fault_of_line(lines[0], names)


def is_note(line):
    """Return whether a line is one of the known notes."""
    return any(re.fullmatch(note, line) for note in NOTES)


def find_fault_of_line(line, names):
    """Return what is wrong with the line of an error, or None."""
    if not line.isprintable():
        return f"prints control characters: {line[:300]!r}"
    if len(line) > LONGEST_LINE:
        return f"prints a line of {len(line)} characters: {line[:300]!r}"
    if names and not any(name in line for name in names):
        return f"does not name {names[0]}: {line[:300]!r}"
    return None


def names_of(target) -> list[str]:
    """Return what an error about a target may name: its file, a folder of it, or the record."""
    if not target.path:
        return []
    parts = target.path.split("/")
    return [parts[-1], *parts[:-1], "record "]


# --- the command


def run_here(folder, command, words):
    """Run a command on valid input in this process. Raise RuntimeError unless it succeeds."""
    sys.argv = [f"{command}.py", *words.split()]
    printed = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        status = run_script(COMMANDS[command].main)
    if status != 0:
        raise RuntimeError(f"{command} {words}: {printed.getvalue()[-2000:]}")


def make_inputs(folder):
    """Write all valid inputs into a folder.

    The commands run in this process. What torch does only once, which takes seconds, is then done
    before the first child is forked.
    """
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread, so that forking is safe
    # States are removed when a run ends. Here they stay, as after a kill.
    finish = train.RunFolder.finish
    train.RunFolder.finish = lambda run, **counts: None
    try:
        write_inputs(folder, partial(run_here, folder))
    finally:
        train.RunFolder.finish = finish


def run_seeds(inputs, seeds):
    """Run the inputs of all seeds, print the faults, and return their number and the statuses."""
    statuses = {}
    num_faults = 0
    for seed in seeds:
        with tempfile.TemporaryDirectory() as workspace:
            target, words, outcome = run_input(inputs, Path(workspace), seed)
        fault = find_fault(outcome, names_of(target))
        statuses[outcome.status] = statuses.get(outcome.status, 0) + 1
        if fault is not None:
            num_faults += 1
            subject = target.path or " ".join(words)[:300]
            print(f"--replay {seed}: {target.command}, {subject!a}: {fault}", flush=True)
    return num_faults, statuses


def replay(inputs, seed):
    """Run the input of one seed, keep its folder, and print everything."""
    workspace = Path(tempfile.mkdtemp(prefix=f"input-{seed}-"))
    target, words, outcome = run_input(inputs, workspace, seed)
    print(f"{target.command} {words!a}\nmutated: {target.path or 'the command line'}")
    print(f"folder: {workspace}\nstatus {outcome.status} after {outcome.seconds:.1f} s")
    print(f"--- stdout\n{outcome.stdout[-3000:]!a}\n--- stderr")
    for line in outcome.stderr[-8000:].replace("\r", "\n").split("\n"):
        print(ascii(line)[1:-1])
    print(f"--- verdict: {find_fault(outcome, names_of(target)) or 'no fault'}")


def main():
    """Run mutated inputs. Return 1 if there were faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=200, help="how many inputs to run")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first input")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one input, print all of it")
    options = parser.parse_args()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="inputs-"))
    try:
        make_inputs(folder)
        gc.collect()
        gc.freeze()  # so that a child does not touch, and thereby copy, the pages of old objects
        if options.replay is not None:
            replay(folder, options.replay)
            return 0
        seeds = range(options.seed, options.seed + options.inputs)
        num_faults, statuses = run_seeds(folder, seeds)
    finally:
        if options.replay is None:
            shutil.rmtree(folder)
    counts = ", ".join(f"status {status}: {n}" for status, n in sorted(statuses.items()))
    print(
        f"{options.inputs} inputs from seed {options.seed} in "
        f"{time.monotonic() - started:.0f} s; {counts}; {num_faults} faults"
    )
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
