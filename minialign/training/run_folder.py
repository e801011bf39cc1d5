"""The folder of a run: started, refused or resumed, and filled with what the run leaves behind.

These are the files that this module writes. README.md beside it lists those of other modules.

config.json        every setting, the versions, and a hash of a sample of the model's weights
.evaluation.json   the scores so far, so that a resumed run need not measure them again
.inputs.json       hashes of the files that the run reads, until it is finished
.export.json       the path that --export names, written just before the model is
captions.jsonl     the captions of the variants that are measured, with their mentions
answers.jsonl      their answers to the questions
evaluation.json    the scores of all variants, once the last one is measured
evaluation.md      the same as a table
summary.json       seconds, steps, pairs and memory. It is written last, when the run is finished
"""

import contextlib
import platform
import shutil
import time
from pathlib import Path

import torch

import minialign
from minialign.evaluation.kept_answers import KeptAnswers, read_answers_of_run
from minialign.evaluation.results import ask_set, results_table, score_set
from minialign.models.checkpoint import fingerprint
from minialign.pairs.similarity import ModelEmbeddings
from minialign.training.input_files import INPUTS_FILE, check_same_inputs
from minialign.training.progress import peak_memory_mb
from minialign.utils.cli import check_new, flag, new_folder, resume_hint
from minialign.utils.distributed import barrier, broadcast_from_main, is_main_process
from minialign.utils.files import (
    InputError,
    WriteError,
    check,
    friendly_errors,
    read_json,
    read_optional_json,
    remove_dead_temporaries,
    write_errors,
    write_json,
    write_text,
)
from minialign.utils.locks import (
    describe_use,
    file_lock,
    missing_folders,
    read_holder,
    remove_empty,
)
from minialign.utils.messages import print_message

# Options that change no result, so that they may differ when a run is resumed.
NOT_SETTINGS = ("resume", "out", "export", "plan", "keep_features", "split")
LOCK_FILE = ".lock"
EXPORT_FILE = ".export.json"  # the folder that the run has begun to export its model to
# A folder with one of these is the folder of a run.
RUN_FILES = {
    "config.json",
    "metrics.jsonl",
    "pairs.jsonl",
    "pairs.jsonl.part",
    ".evaluation.json",
    INPUTS_FILE,
    LOCK_FILE,
}
PHASES = ("load", "sample", "reference", "train", "evaluate")  # what summary.json times


class RunFolder:
    """The folder that a run writes to, with the scores and the timings so far."""

    def __init__(self, path, options, new_folders=()):
        self.path = path
        self.options = options
        self.new_folders = new_folders  # made for this run: `path`, then its parents; or empty
        self.checkpoint = None  # `fingerprint` of the weights that the run starts from
        self.scores = {}  # variant -> evaluation set -> scores
        self.answers = KeptAnswers()  # what the scores were computed from
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @classmethod
    @contextlib.contextmanager
    def open(cls, options):
        """Yield the folder that the options name, which no other run may use until the block ends.

        If nothing was done in a new folder, it is removed. Raises InputError if the run may not
        use the folder.
        """
        # The main process makes and locks the folder, and tells the others which one it is. The
        # stack holds the lock until the block ends. In the other processes it is empty.
        with contextlib.ExitStack() as stack:
            claim = None
            if is_main_process():
                claim = stack.enter_context(claim_folder(options))
            path, new_folders = broadcast_from_main(claim)
            run = cls(Path(path), options, new_folders)
            with run.removed_if_useless(), resume_hint(path):
                if options.export:
                    run.check_export()
                run.check_same_settings()
                barrier()  # nothing is written before all processes have looked at the folder
                yield run

    def check_export(self):
        """Raise InputError if the merged model cannot be written, or would lie in this folder.

        A run that is resumed may have ended while it wrote the model, or just after. It writes over
        its own files, and over no others. A finished run writes nothing, so its model must be
        there.
        """
        export = self.options.export
        path = Path(export).resolve()
        check(
            not path.is_relative_to(self.path.resolve()),
            f"{export}: lies inside the folder of the run, {self.path}; give another --export",
        )
        noted_path = self.path / EXPORT_FILE
        has_begun = noted_path.exists() and read_json(noted_path) == str(path)
        if self.is_finished():
            remedy = "leave --export out, or train again with another --out"
            check(
                has_begun,
                f"{self.path}: is finished, and has not noted that it wrote its model to {export}; "
                f"{remedy}",
            )
            check(
                path.exists(),
                f"{self.path}: is finished, and its model is no longer in {export}; {remedy}",
            )
        elif not (self.options.resume and has_begun):
            check_new(export, "--export")

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
                check(
                    earlier.get(name) == value,
                    f"{self.path}: was started with another {flag(name)} "
                    f"({earlier.get(name)!r}, now {value!r}); give the same options, or another "
                    "--out",
                )

    def is_finished(self):
        """Return whether the run has nothing left to do."""
        return (self.path / "summary.json").exists()

    def start(self, vlm, input_digests):
        """Write config.json. Raise InputError if the run was started from other weights or files.

        input_digests: the content of the files that the run reads (input_files.py), besides those
            of the model.
        """
        self.checkpoint = fingerprint(vlm.model)
        config_path = self.path / "config.json"
        if config_path.exists():
            earlier = read_json(config_path, dict).get("checkpoint")
            check(
                earlier == self.checkpoint,
                f"{self.path}: was started with other weights in {self.options.model}; "
                "use a new --out directory",
            )
        check_same_inputs(self.path, vlm.file_digests | input_digests)
        config = {
            "settings": self.settings(),
            "template": vlm.template,
            "checkpoint": self.checkpoint,
            "similarity": self.options.similarity or ModelEmbeddings.name,
            "versions": {
                "minialign": minialign.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        write_json(config_path, config)

    @contextlib.contextmanager
    def removed_if_useless(self):
        """Remove the folder of a new run if an error ends it before it is of any use.

        After bad input it is of use if pairs were sampled or steps were done. After anything else,
        such as Ctrl-C, it is of use if it holds the settings: the same command can resume it.
        """
        with contextlib.ExitStack() as stack:
            stack.push(self._remove_if_useless)
            yield

    def _remove_if_useless(self, error_type, error, traceback):
        """Do what `removed_if_useless` says. Called as the __exit__ of a context manager."""
        if error is None:
            return
        is_bad_input = isinstance(error, InputError) and not isinstance(error, WriteError)
        has_settings = (self.path / "config.json").exists()
        is_useful = self.has_progress() if is_bad_input else has_settings
        if not is_useful and is_main_process():
            self.remove()
            error.__notes__ = []  # there is nothing to resume, so no note says how

    def remove(self):
        """Remove the folders that were made for this run."""
        if self.new_folders:
            shutil.rmtree(self.path, ignore_errors=True)
        remove_empty([Path(folder) for folder in self.new_folders[1:]])

    def has_reward_model(self):
        """Return whether an earlier attempt has trained and measured the reward model."""
        return (self.path / "reward" / "evaluation.json").exists()

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
            # 1. What an earlier attempt has measured, and kept, is not measured again.
            if not self.scores:
                self.scores = self.read_scores(evaluation_sets)
                self.answers = read_answers_of_run(self.path, evaluation_sets)
            if variant in self.scores and self.answers.has(variant):
                return
            if variant in self.scores:
                print_message(f"{self.path}: has no answers of {variant}; measuring it again")

            # 2. Measure.
            scores_of_sets = {}
            for set_name, evaluation_set in evaluation_sets.items():
                answers = ask_set(vlm, evaluation_set, f"{variant}, {set_name}")
                scores_of_sets[set_name], _ = score_set(evaluation_set, answers)
                self.answers.add(variant, set_name, evaluation_set, answers)
            self.scores[variant] = scores_of_sets

            # 3. Keep it. The scores are written last: whoever finds them finds the answers too.
            self.check_not_removed()
            self.answers.write(self.path)
            write_json(self.path / ".evaluation.json", self.scores)

    def read_scores(self, evaluation_sets):
        """Return the scores that an earlier attempt has stored, if they are of the same sets."""
        path = self.path / ".evaluation.json"
        scores = read_optional_json(path)
        for scores_of_sets in scores.values():
            is_complete = (
                isinstance(scores_of_sets, dict) and scores_of_sets.keys() == evaluation_sets.keys()
            )
            check(is_complete, f"{path}: not the scores of this run; remove it to measure again")
        return scores

    def write_evaluation(self):
        """Write evaluation.json and its table, now that all variants are measured."""
        write_json(self.path / "evaluation.json", self.scores)
        if any(self.scores.values()):
            write_text(self.path / "evaluation.md", results_table(self.scores) + "\n")

    def finish(self, *, steps, pairs):
        """Write summary.json, and remove the files that only a resumed run needs."""
        self.check_not_removed()
        seconds = {phase: round(value, 2) for phase, value in self.seconds.items()}
        summary = {
            "seconds": seconds,
            "steps": steps,
            "pairs": pairs,
            "peak_memory_mb": peak_memory_mb(self.options.device),
        }
        write_json(self.path / "summary.json", summary)
        if is_main_process():
            (self.path / ".evaluation.json").unlink(missing_ok=True)
            for state_path in list(self.path.rglob("state.safetensors")):
                state_path.unlink()
            (self.path / INPUTS_FILE).unlink(missing_ok=True)

    def check_not_removed(self):
        """Raise InputError if the folder has been removed during the run."""
        if is_main_process():  # another process may come here before the file is written
            config_path = self.path / "config.json"
            check(config_path.exists(), f"{config_path}: was removed during the run; start again")


@contextlib.contextmanager
def claim_folder(options):
    """Make and lock the folder of a run, or only lock the one that is to be resumed.

    Yields its path, and a list of the folders that were made: the path and then its parents.
    """
    # 1. Make the folder, or check that the one that exists may be resumed.
    path = None if options.out is None else Path(options.out)
    new_folders = missing_folders(path or Path("runs"))
    if path is None:
        path = new_folder(options.method)
        new_folders = [path, *new_folders]
    elif new_folders:
        make_folder(path)
    else:
        check_resumable(path, options.resume)
    if new_folders and options.resume:
        print_message(f"{path}: nothing to resume; this is a new run")

    # 2. Lock it, and remove what a killed run has left half written.
    with file_lock(path / LOCK_FILE, path):
        remove_dead_temporaries(path.rglob(".*.tmp"))
        yield str(path), [str(folder) for folder in new_folders]


def make_folder(path):
    """Make a folder and its parents. Raise InputError if another run has just made it."""
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    except FileExistsError:
        raise InputError(f"{path}: another run has just made it; give another --out") from None


def check_resumable(path, resume):
    """Raise InputError unless `path` is the folder of a run that may be resumed, or is empty."""
    check(path.is_dir(), f"{path}: is a file and no folder; give another --out")
    lock_path = path / LOCK_FILE
    check(resume or not read_holder(lock_path), describe_use(lock_path, path))
    check(resume, f"{path}: exists already; give another --out, or --resume to resume it")
    names = {entry.name for entry in path.iterdir()}
    check(
        not names or names & RUN_FILES,
        f"{path}: holds other files than those of a run; give another --out",
    )
