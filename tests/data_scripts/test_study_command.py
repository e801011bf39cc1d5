"""The command `python data/study.py`: a small study from start to end, and again."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY

from minialign.utils.cli import run_script

sys.path.insert(0, str(ROOT / "data"))
import study  # noqa: E402
from tiny_study.arms import MAIN_ARMS, STUDIES, Arm, Part, Run, Study, is_central  # noqa: E402

SETS = ("typical", "balanced")


def write_small_set(name, folder, num_images=6):
    """Write the first images of a shipped evaluation set, with their questions."""
    shipped = TINY / "final" / name
    (folder / "images").mkdir(parents=True)
    raw = json.loads((shipped / "captions.json").read_text())
    raw["captions"] = raw["captions"][:num_images]
    (folder / "captions.json").write_text(json.dumps(raw))
    images = {row["image"] for row in raw["captions"]}
    for image in images:
        shutil.copy(shipped / "images" / image, folder / "images")
    for path in shipped.glob("pope_*.jsonl"):
        lines = []
        for line in path.read_text().splitlines(keepends=True):
            if json.loads(line)["image"] in images:
                lines.append(line)
        (folder / path.name).write_text("".join(lines))


@pytest.fixture()
def run_study(tmp_path, monkeypatch, capfd):
    """Return a function that runs a study of these arms on the shipped base, with two steps each.

    It returns the exit status, what is printed, and the lines of standard error that are no
    progress bars.
    """
    for name in SETS:
        write_small_set(name, tmp_path / "pictures" / name)
    recipe = json.loads((TINY / "recipe.json").read_text())
    recipe |= {"steps": 2, "limit": 16, "batch_size": 4, "rounds": 2}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setenv("TQDM_DISABLE", "1")  # main() sets it too, which would outlast the test

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


def test_a_small_study_from_start_to_end_and_again(tmp_path, run_study):
    """Everything is measured once.

    A second start writes the same tables from what is there. A third start measures what was
    removed.
    """
    out = tmp_path / "out"
    arms = (*MAIN_ARMS, Arm("a = 2.0", contrast=2.0))
    names = [arm.name for arm in arms]
    folders = {arm.name: Run(str(TINY), arm, 0).folder(out) for arm in arms}

    # 1. The first start.
    status, printed, messages = run_study(arms, num_jobs=2)

    assert status == 0, messages
    assert messages == []
    stored = json.loads((out / "study.json").read_text())
    page = (out / "study.md").read_text()
    assert printed.strip() == page.strip()
    assert stored["pictures"] == {"typical": 6, "balanced": 6}
    assert stored["recipe"]["steps"] == 2
    tables = stored["tables"]["One question"]["0.35"]
    assert list(tables) == list(SETS)
    for rows in tables.values():
        assert [row["arm"] for row in rows] == names
        for row in rows[2:]:
            assert np.isfinite(row["interval"]).all()

    # 2. Each arm has scores of its own, and the settings of its own.
    scores_of_arms = {}
    for name, folder in folders.items():
        scores_of_arms[name] = json.loads((folder / "scores.json").read_text())
        for scores in scores_of_arms[name].values():
            assert len(scores["counts"]) == 6
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
