"""The command `python data/study.py`: a small study from start to end, and again."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY
from processes import forks
from small_sets import write_small_set

from minialign.utils.cli import run_script
from minialign.utils.files import InputError

sys.path.insert(0, str(ROOT / "data"))
import study  # noqa: E402
from forked_training import measure_with_forked_training  # noqa: E402
from tiny_study import running  # noqa: E402
from tiny_study.arms import (  # noqa: E402
    MAIN_ARMS,
    STUDIES,
    Arm,
    LaterArm,
    Part,
    Run,
    Study,
    is_central,
)
from tiny_study.difference_tables import difference_lines  # noqa: E402

SETS = ("typical", "balanced")


@pytest.fixture()
def run_study(tmp_path, monkeypatch, capfd):
    """Return a function that runs a study of these arms on the shipped base, with two steps each.

    It returns the exit status, what is printed, and the lines of standard error that are no
    progress bars.
    """
    for name in SETS:
        write_small_set(name, tmp_path / "pictures" / name, num_images=4)
    recipe = json.loads((TINY / "recipe.json").read_text())
    recipe |= {"steps": 2, "limit": 16, "batch_size": 4, "rounds": 2}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setenv("TQDM_DISABLE", "1")  # main() sets it too, which would outlast the test
    # Forked processes need not import torch, as those do that a study starts.
    monkeypatch.setattr(study, "get_context", lambda method: forks())

    def run(arms, num_jobs):
        part = Part("One question", arms, num_seeds=1, wants=is_central)
        monkeypatch.setitem(STUDIES, "bdhs", Study((part,)))
        words = ["study.py", "--bases", TINY]
        words += ["--eval", *[tmp_path / "pictures" / name for name in SETS]]
        words += ["--recipe", tmp_path / "recipe.json", "--out", tmp_path / "out"]
        words += ["--jobs", num_jobs]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        status = run_script(study.main)
        out, err = capfd.readouterr()
        messages = []
        for line in err.replace("\r", "\n").split("\n"):
            if line.strip() and "%|" not in line:
                messages.append(line)
        return status, out, messages

    return run


def assert_trained_with(folder, method):
    """Assert that a run was trained with a method, for two steps and without a control."""
    settings = json.loads((folder / "run" / "config.json").read_text())["settings"]
    assert settings["method"] == method
    assert settings["steps"] == 2
    assert settings["seed"] == 0
    assert settings["control"] is False


def modification_times(folder):
    """Return when each file of a folder was written."""
    times = {}
    for path in folder.rglob("*"):
        if path.is_file():
            times[path] = path.stat().st_mtime_ns
    return times


def assert_report_has_all_rows(stored, names):
    """Assert that study.json has the settings of the study, and a row of each arm in its tables."""
    assert stored["pictures"] == {"typical": 4, "balanced": 4}
    assert stored["recipe"]["steps"] == 2
    tables = stored["tables"]["One question"]["0.35"]
    assert list(tables) == list(SETS)
    for rows in tables.values():
        assert [row["arm"] for row in rows] == names
        for row in rows[2:]:
            assert np.isfinite(row["interval"]).all()


def read_scores(folders):
    """Return {arm: its scores} of {arm: the folder of its run}."""
    scores_of_arms = {}
    for name, folder in folders.items():
        scores_of_arms[name] = json.loads((folder / "scores.json").read_text())
    return scores_of_arms


def test_a_small_study_from_start_to_end_and_again(tmp_path, run_study, monkeypatch):
    """Everything is measured once.

    A second start writes the same tables from what is there. A third start measures what was
    removed. It starts train.py as a user's study does, which finds that its run is finished.
    """
    out = tmp_path / "out"
    arms = (*MAIN_ARMS, Arm("a = 2.0", contrast=2.0))
    folders = {arm.name: Run(str(TINY), arm, 0).folder(out) for arm in arms}

    # 1. The first start.
    with monkeypatch.context() as patch:
        patch.setattr(study, "measure_run", measure_with_forked_training)
        status, printed, messages = run_study(arms, num_jobs=2)

    assert status == 0, messages
    assert messages == []
    stored = json.loads((out / "study.json").read_text())
    page = (out / "study.md").read_text()
    assert printed.strip() == page.strip()
    assert_report_has_all_rows(stored, names=[arm.name for arm in arms])

    # 2. Each arm has scores of its own, and the settings of its own.
    scores_of_arms = read_scores(folders)
    for scores_of_sets in scores_of_arms.values():
        assert [len(scores["counts"]) for scores in scores_of_sets.values()] == [4, 4]
    assert scores_of_arms["base"] != scores_of_arms["a = 2.0"]
    assert scores_of_arms["a = 2.0"] != scores_of_arms["bdhs"]
    assert_trained_with(folders["control"], "sft")
    assert_trained_with(folders["bdhs"], "bdhs")

    # 3. The second start does nothing again.
    times = modification_times(out / "arms")

    status, printed_again, _ = run_study(arms, num_jobs=2)

    assert status == 0
    assert printed_again == printed
    assert modification_times(out / "arms") == times
    assert json.loads((out / "study.json").read_text()) == stored
    assert (out / "study.md").read_text() == page

    # 4. The third start measures what is missing, and nothing else.
    removed = folders["bdhs"] / "scores.json"
    removed.unlink()

    status, printed_again, _ = run_study(arms, num_jobs=1)

    assert status == 0
    assert printed_again == printed
    new_times = modification_times(out / "arms")
    changed = {path for path in times if new_times[path] != times[path]}
    assert changed - {folders["bdhs"] / "log"} == {removed}
    assert json.loads(removed.read_text()) == scores_of_arms["bdhs"]
    assert (out / "study.md").read_text() == page


def test_an_arm_that_fails_is_one_line_that_names_its_log(tmp_path, run_study):
    """No tables are written. The log says what is wrong."""
    broken = Arm("broken", "--method sft --colour red")

    status, printed, messages = run_study((broken,), num_jobs=1)

    folder = Run(str(TINY), broken, 0).folder(tmp_path / "out")
    assert status == 2
    assert printed == ""
    assert len(messages) == 1, messages
    assert str(folder / "log") in messages[0]
    assert "--colour" in (folder / "log").read_text()
    assert not (folder / "scores.json").exists()
    assert not (tmp_path / "out" / "study.md").exists()


def test_a_study_can_be_frozen_before_anything_is_measured(tmp_path, monkeypatch, capfd):
    """Recipe, arms, targets and images are in settings.json. Other images are refused later."""
    folder = tmp_path / "pictures" / "balanced"
    write_small_set("balanced", folder)
    words = ["study.py", "--study", "distillation", "--bases", TINY, "--eval", folder]
    words += ["--out", tmp_path / "out", "--freeze"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))

    assert run_script(study.main) == 0

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["study"] == "distillation"
    assert settings["recipe"] == json.loads((TINY / "recipe.json").read_text())
    assert settings["pictures"] == {"balanced": 6}
    assert len(settings["targets"]) == 8
    seeds_of_arms = {arm["name"]: arm["seeds"] for arm in settings["arms"]}
    assert seeds_of_arms["base"] == seeds_of_arms["a = 1.0"] == 1
    assert seeds_of_arms["distill"] == seeds_of_arms["control"] == 3

    captions = folder / "captions.json"
    captions.write_text(captions.read_text() + " ")
    assert run_script(study.main) == 2
    assert "other arms or images" in capfd.readouterr().err


def test_an_arm_that_starts_from_another_one_waits_for_it(tmp_path, monkeypatch):
    """However many runs are done at a time, and in whatever order they were listed."""
    ended = []

    def measure_run(run, **_):
        if not isinstance(run.arm, LaterArm):
            time.sleep(0.05)
        ended.append(run.arm.name)

    first = Run("b/one", Arm("distill", "--method distill"), 0)
    later = Run("b/one", LaterArm("then bdhs", "--method bdhs", first="distill"), 0)
    monkeypatch.setattr(study, "measure_run", measure_run)
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    monkeypatch.setenv("TQDM_DISABLE", "1")

    study.run_all([later, first], {}, {}, SimpleNamespace(jobs=2, out=tmp_path, study="parts"))

    assert ended == ["distill", "then bdhs"]


class Killed(BaseException):
    """What ends a study at once."""


class StubTraining:
    """Takes the place of train.py: every run learns from all records, until the study is killed."""

    def __init__(self, num_runs):
        self.runs_left = num_runs
        self.trained = []

    def __call__(self, run, recipe, folder, records, *, model_folder):
        """Note the run, or kill the study."""
        if self.runs_left == 0:
            raise Killed
        self.runs_left -= 1
        self.trained.append((run.arm.name, run.seed))


@pytest.fixture()
def run_without_models(tmp_path, monkeypatch):
    """Return a function that runs a study of distillation with two seeds and without any model.

    It returns study.json and study.md. `train` takes the place of the training.
    """
    arms = (Arm("base"), Arm("bdhs", "--method dpo"), Arm("distill", "--method distill"))
    part = Part("One question", arms, num_seeds=2, wants=is_central)
    small = Study((part,), shares_records=True, by_seed=True)
    monkeypatch.setitem(STUDIES, "distillation", small)
    monkeypatch.setitem(STUDIES, "parts", Study((part,), compared_with="distill"))
    folders = []
    for name in ("balanced", "shifted", "typical"):
        folders.append(tmp_path / "pictures" / name)
        write_small_set(name, folders[-1], num_images=4)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    # One thread in place of processes, so that what is replaced here is replaced in a run.
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(1))
    model = SimpleNamespace(model=None)
    monkeypatch.setattr(running, "load_vlm", lambda path: model)
    monkeypatch.setattr(running, "load_adapter", lambda model, path: None)
    monkeypatch.setattr(running, "share_records", lambda *arguments: None)
    monkeypatch.setattr(running, "measure_set", lambda *arguments: SCORES)
    monkeypatch.setattr(running.torch, "set_num_threads", lambda num_threads: None)

    def run(train, out, name="distillation"):
        monkeypatch.setattr(running, "train_run", train)
        words = ["study.py", "--study", name, "--bases", TINY, "--eval", *folders]
        monkeypatch.setattr(sys, "argv", list(map(str, [*words, "--out", out])))
        study.main()
        return (out / "study.json").read_text(), (out / "study.md").read_text()

    return run


# Of four images with 4 mentions and 4 objects each.
SCORES = {
    "counts": [[4, 1, 1, 2, 4, 3, 3, 20, 0]] * 4,
    "pope_of_images": [[9, 10]] * 4,
    "well_formed": [True] * 4,
    "text_logps": [[-6.0, 12]] * 4,
    "captions": ["A cup."] * 4,
}


def test_a_study_that_is_killed_between_two_runs_continues_with_the_next_one(
    tmp_path, run_without_models
):
    """It trains nothing twice, and ends with the files of a study that was never killed."""
    before = StubTraining(num_runs=1)
    after = StubTraining(num_runs=9)
    never = StubTraining(num_runs=9)

    with pytest.raises(Killed):
        run_without_models(before, tmp_path / "killed")
    assert not (tmp_path / "killed" / "study.json").exists()
    files_of_killed = run_without_models(after, tmp_path / "killed")
    files_of_whole = run_without_models(never, tmp_path / "whole")

    assert before.trained == [("bdhs", 0)]
    assert after.trained == [("distill", 0), ("bdhs", 1), ("distill", 1)]
    assert before.trained + after.trained == never.trained
    assert files_of_killed == files_of_whole


def test_the_folder_of_another_study_is_refused(tmp_path, run_without_models):
    """Two studies may have arms of one name that learn from other records."""
    out = tmp_path / "out"
    files = run_without_models(StubTraining(num_runs=9), out)

    with pytest.raises(InputError, match=f"{out}: was started as another study"):
        run_without_models(StubTraining(num_runs=9), out, "parts")

    assert run_without_models(StubTraining(num_runs=0), out) == files


def test_a_study_that_an_earlier_version_started_is_refused_by_its_cause(
    tmp_path, run_without_models
):
    """It did not store the arms, so that nothing tells whether they are the same."""
    out = tmp_path / "out"
    run_without_models(StubTraining(num_runs=9), out)
    path = out / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: settings[name] for name in ("recipe", "pictures", "commit")}))

    message = f"{path}: lacks study, arms, .*, as an earlier version of this script started"
    with pytest.raises(InputError, match=message):
        run_without_models(StubTraining(num_runs=9), out)


def test_other_images_of_the_same_number_are_refused(tmp_path, run_without_models):
    """What was measured on the first ones would be reported as measured on these."""
    out = tmp_path / "out"
    run_without_models(StubTraining(num_runs=9), out, "parts")
    captions = tmp_path / "pictures" / "shifted" / "captions.json"
    captions.write_text(captions.read_text() + " ")

    with pytest.raises(InputError, match="other arms or images; give another --out"):
        run_without_models(StubTraining(num_runs=9), out, "parts")


def test_a_study_without_a_control_compares_all_arms_with_one_of_them(tmp_path, run_without_models):
    """The page shows what is stored. Four equal images give equal shares."""
    stored, page = run_without_models(StubTraining(num_runs=9), tmp_path / "out", "parts")

    report = json.loads(stored)
    tables = report["tables"]
    assert page == "\n".join(difference_lines(tables)).strip() + "\n"
    assert [row["arm"] for row in tables["One question"][:3]] == ["distill", "base", "bdhs"]
    assert tables["One question"][2]["runs"] == 2
    assert tables["One question"][2]["chair_i"] == {
        "share": 0.25,
        "difference": 0.0,
        "interval": [0.0, 0.0],
    }
