"""The folder of a run: started, refused or resumed, and filled with what the run leaves behind.

config.json        every setting, the versions, and the fingerprint of the checkpoint
.evaluation.json   the scores so far, so that a resumed run need not measure them again
evaluation.json    the scores of all variants, once the last one is measured
summary.json       seconds, steps, pairs and memory; its presence means that the run is finished
"""

import contextlib
import platform
import resource
import shutil
import sys
import time
from pathlib import Path

import torch

import minialign
from minialign.evaluation.report import evaluate_set
from minialign.models.checkpoint import fingerprint
from minialign.pairs.similarity import PolicyEmbeddings
from minialign.utils.cli import new_folder
from minialign.utils.distributed import barrier, broadcast_from_main, is_main_process
from minialign.utils.files import (
    InputError,
    check,
    friendly_errors,
    read_json,
    read_optional_json,
    write_json,
)

# Options that may differ when a run is resumed. They change no result.
NOT_SETTINGS = ("resume", "out", "export", "keep_features")
PHASES = ("load", "sample", "reference", "train", "evaluate")  # what summary.json times


class RunFolder:
    """The folder that a run writes to, with the scores and the timings so far."""

    def __init__(self, path, options):
        self.path = path
        self.options = options
        self.is_new = not path.exists()
        self.checkpoint = None  # fingerprint of the weights that the run started from
        self.scores = {}  # variant -> evaluation set -> scores
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @classmethod
    def open(cls, options):
        """Return the folder that the options name. Raise InputError if the run may not use it."""
        # A new folder has a number that the processes must agree on.
        path = Path(broadcast_from_main(str(options.out or new_folder())))
        run = cls(path, options)
        if options.export:
            check_export_folder(options.export, path)
        check(
            run.is_new or options.resume,
            f"{path}: exists already; give another --out, or --resume to resume it",
        )
        if run.is_new and options.resume:
            print(f"{path}: nothing to resume; this is a new run", file=sys.stderr)
        run.check_same_settings()
        barrier()  # nothing is written before all processes have looked at the folder
        return run

    def settings(self):
        """Return the options that must be the same when the run is resumed."""
        all_options = vars(self.options)
        return {name: value for name, value in all_options.items() if name not in NOT_SETTINGS}

    def check_same_settings(self):
        """Raise InputError if the run in the folder was started with other settings."""
        config_path = self.path / "config.json"
        if not config_path.exists():
            return
        settings = self.settings()
        with friendly_errors(config_path, "use a new --out directory"):
            earlier = read_json(config_path, dict)["settings"]
            for name, value in sorted(settings.items()):
                option = f"--{name.replace('_', '-')}"
                check(
                    earlier.get(name) == value,
                    f"{self.path}: was started with another {option} ({earlier.get(name)!r}, now "
                    f"{value!r}); give the same options, or another --out",
                )

    def is_finished(self):
        """Return whether the run has nothing left to do."""
        return (self.path / "summary.json").exists()

    def start(self, vlm):
        """Write config.json. Raise InputError if the run was started from other weights."""
        self.checkpoint = fingerprint(vlm.model)
        config_path = self.path / "config.json"
        if config_path.exists():
            earlier = read_json(config_path, dict).get("checkpoint")
            check(
                earlier == self.checkpoint,
                f"{self.path}: was started with other weights in {self.options.model}; "
                "use a new --out directory",
            )
        config = {
            "settings": self.settings(),
            "template": vlm.template,
            "checkpoint": self.checkpoint,
            "similarity": self.options.similarity or PolicyEmbeddings.name,
            "versions": {
                "minialign": minialign.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        write_json(config_path, config)

    @contextlib.contextmanager
    def removed_on_bad_input(self):
        """Remove the folder of a new run if bad input ends it before any work is done.

        Almost all bad input is found before the folder is made. The rest is found late, such as an
        image that was damaged in the meantime.
        """
        try:
            yield
        except InputError:
            if self.is_new and not self.has_progress() and is_main_process():
                shutil.rmtree(self.path)
            raise

    def has_reward_model(self):
        """Return whether an earlier attempt has trained the reward model of this run."""
        return (self.path / "reward" / "score.safetensors").exists()

    def has_progress(self):
        """Return whether a resumed run would find work that is done: sampled pairs or steps."""
        if (self.path / "pairs.jsonl").exists():
            return True
        unfinished_pairs = self.path / "pairs.jsonl.part"
        if unfinished_pairs.exists():
            num_lines = unfinished_pairs.read_bytes().count(b"\n")
            if num_lines > 1:  # the first line is a header
                return True
        return any(self.path.rglob("state.safetensors"))

    @contextlib.contextmanager
    def timer(self, phase):
        """Add the time that the block takes to the seconds of a phase."""
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    def evaluate(self, variant, vlm, evaluation_sets):
        """Measure a model on every evaluation set, unless an earlier attempt has measured it.

        variant: "base", "control" or "aligned".
        """
        with self.timer("evaluate"):
            if not self.scores:
                self.scores = self.read_scores(evaluation_sets)
            if variant in self.scores:
                return
            scores_of_sets = {}
            for set_name, evaluation_set in evaluation_sets.items():
                scores, _ = evaluate_set(vlm, evaluation_set, f"{variant}, {set_name}")
                scores_of_sets[set_name] = scores
            self.scores[variant] = scores_of_sets
            write_json(self.path / ".evaluation.json", self.scores)

    def read_scores(self, evaluation_sets):
        """Return the scores that an earlier attempt has stored. Raise InputError for other ones."""
        path = self.path / ".evaluation.json"
        scores = read_optional_json(path)
        for scores_of_sets in scores.values():
            is_complete = (
                isinstance(scores_of_sets, dict) and scores_of_sets.keys() == evaluation_sets.keys()
            )
            check(is_complete, f"{path}: not the scores of this run; remove it to measure again")
        return scores

    def write_evaluation(self):
        """Write evaluation.json, now that all variants are measured."""
        write_json(self.path / "evaluation.json", self.scores)
        if is_main_process():
            (self.path / ".evaluation.json").unlink()

    def finish(self, *, steps, pairs):
        """Write summary.json, and remove the states that only a resumed run needs."""
        seconds = {phase: round(value, 2) for phase, value in self.seconds.items()}
        summary = {
            "seconds": seconds,
            "steps": steps,
            "pairs": pairs,
            "peak_memory_mb": peak_memory_mb(self.options.device),
        }
        write_json(self.path / "summary.json", summary)
        if is_main_process():
            for state_path in list(self.path.rglob("state.safetensors")):
                state_path.unlink()


def check_export_folder(export, run_path):
    """Raise InputError if the folder for the merged model exists or lies inside the run folder."""
    check(not Path(export).exists(), f"{export}: exists already; give another --export")
    is_inside = Path(export).resolve().is_relative_to(run_path.resolve())
    check(
        not is_inside,
        f"{export}: lies inside the folder of the run, {run_path}; give another --export",
    )


def peak_memory_mb(device):
    """Return the most memory that this process has used, in MiB: on the GPU, or in total."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # Linux counts KiB
