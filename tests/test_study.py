"""The study: which arms there are, what they are trained with, what the tables say of their scores, and a small one from start to end."""

import json
import shutil
import subprocess
import sys
from dataclasses import astuple, fields
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY

from minialign.evaluation.chair import CaptionCounts
from minialign.utils import cli

sys.path.insert(0, str(ROOT / "data"))
import study  # noqa: E402
from study import MAIN, PARTS, Arm, Part, arms_of, interval, markdown, row, summary, words  # noqa: E402

COUNTS = [field.name for field in fields(CaptionCounts)]

# --- arms and their options ---

BASES = {
    "b/one": {"seed": 1, "q": 0.35},
    "b/two": {"seed": 2, "q": 0.35},
    "b/true": {"seed": 1, "q": 0},
    "b/half": {"seed": 1, "q": 0.5},
}


def test_the_arms_of_a_part_by_hand():
    """Of the bases that a part wants, every arm with every seed; the base itself and contrasts, which nothing random made, once."""
    part = Part(
        "A question", {"base": None, "sft": "--method sft", "a = 0.5": 0.5}, 2, lambda q: q == 0.35
    )
    assert arms_of(part, BASES) == [
        Arm("b/one", "base", 0, None),
        Arm("b/one", "sft", 0, "--method sft"),
        Arm("b/one", "sft", 1, "--method sft"),
        Arm("b/one", "a = 0.5", 0, 0.5),
        Arm("b/two", "base", 0, None),
        Arm("b/two", "sft", 0, "--method sft"),
        Arm("b/two", "sft", 1, "--method sft"),
        Arm("b/two", "a = 0.5", 0, 0.5),
    ]
    assert arms_of(part, {"b/true": BASES["b/true"]}) == []


def test_every_base_has_the_arms_that_the_others_are_compared_with():
    """The parts as they stand: base, control and BDHS of each base, whatever its q; folders of different arms differ."""
    arms = [arm for part in PARTS for arm in arms_of(part, BASES)]
    for base in BASES:
        assert {(base, name, 0, options) for name, options in MAIN.items()} <= {
            (arm.base, arm.name, arm.seed, arm.options) for arm in arms
        }
    assert len({arm.folder("out") for arm in arms}) == len(set(arms)) == len(arms)
    assert (
        str(Arm("b/one", "bdhs, IPO, q = 0", 2, None).folder("out"))
        == "out/arms/one/bdhs,_IPO,_q_=_0-2"
    )


def test_the_recipe_as_options_by_hand():
    """A method's own values win; true is a flag; underscores become hyphens; what an arm itself says of method, seed and control is left out."""
    recipe = {
        "method": "bdhs",
        "lora_rank": 4,
        "lr": 2e-4,
        "steps": 10,
        "unguided": True,
        "seed": 7,
        "control": True,
        "loss": "dpo",
        "methods": {
            "rloo": {"steps": 3, "max_new_tokens": 96, "control": True},
            "sft": {"lr": 1.0},
        },
    }
    assert words(recipe, "bdhs") == [
        "--lora-rank",
        "4",
        "--lr",
        "0.0002",
        "--steps",
        "10",
        "--unguided",
        "--loss",
        "dpo",
    ]
    assert words(recipe, "rloo") == [
        "--lora-rank",
        "4",
        "--lr",
        "0.0002",
        "--steps",
        "3",
        "--unguided",
        "--loss",
        "dpo",
        "--max-new-tokens",
        "96",
    ]


@pytest.mark.parametrize(
    "name, options, data, added",
    [
        ("control", "--method sft", "instruct.json", ["--steps", "5"]),
        ("bdhs", "--method bdhs", "instruct.json", ["--steps", "5"]),
        ("online", "--method online-bdhs --rho 1", "instruct.json", ["--steps", "5"]),
        ("dpo", "--method dpo --loss ipo", "povid.json", ["--steps", "9"]),
    ],
)
def test_what_an_arm_is_trained_with(tmp_path, monkeypatch, name, options, data, added):
    """Instructions for what writes its own rejected responses, pairs for the others; the arm's own options behind the recipe's, so that they win."""
    called, loaded = [], []
    monkeypatch.setattr(
        study.subprocess,
        "run",
        lambda command, **_: (
            called.append([str(word) for word in command])
            or subprocess.CompletedProcess(command, 0)
        ),
    )
    monkeypatch.setattr(study, "load_vlm", lambda path: SimpleNamespace(model=path))
    monkeypatch.setattr(study, "load_adapter", lambda model, path: loaded.append((model, path)))
    monkeypatch.setattr(study, "read_folder", str)
    monkeypatch.setattr(
        study,
        "evaluate_set",
        lambda vlm, held, contrast: (
            {"chair_i": 0.5, "set": held, "contrast": contrast},
            [CaptionCounts(1, 2)],
        ),
    )
    monkeypatch.setattr(study.torch, "set_num_threads", lambda n: None)
    arm = Arm("b/one", name, 3, options)
    study.work(
        arm,
        {"typical": "pictures/typical"},
        {"steps": 5, "methods": {"dpo": {"steps": 9}}},
        tmp_path,
    )
    folder = tmp_path / "arms" / "one" / f"{name}-3"
    assert called == [
        [
            sys.executable,
            str(ROOT / "train.py"),
            "--model",
            "b/one/model",
            "--data",
            f"b/one/train/{data}",
            *added,
            *options.split(),
            "--seed",
            "3",
            "--out",
            str(folder / "run"),
            "--resume",
        ]
    ]
    assert loaded == [("b/one/model", folder / "run" / "adapter")]
    assert json.loads((folder / "scores.json").read_text()) == {
        "typical": {
            "chair_i": 0.5,
            "set": "pictures/typical",
            "contrast": 0.0,
            "counts": [list(astuple(CaptionCounts(1, 2)))],
        }
    }


# --- intervals ---


def made_up(runs, pictures, seed):
    """Counts (runs, pictures, counts) of captions with 1 to 8 mentions, some of them of absent objects."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 9, (runs, pictures, len(COUNTS)))
    counts[..., 0] = generator.integers(1, 9, (runs, pictures))
    counts[..., 1] = generator.integers(0, counts[..., 0] + 1)
    return counts


def test_the_interval_against_a_loop():
    """Picture by picture, resample by resample: runs are pooled, and both models are read on the same pictures."""
    ours, others, generator, differences = (
        made_up(3, 11, 1),
        made_up(3, 11, 2),
        np.random.default_rng(0),
        [],
    )
    for _ in range(300):
        ratios, drawn = [], [int(generator.integers(0, 11)) for _ in range(11)]
        for counts in (ours, others):
            absent = sum(
                int(counts[run, picture, COUNTS.index("absent_mentions")])
                for run in range(3)
                for picture in drawn
            )
            ratios.append(
                absent
                / sum(
                    int(counts[run, picture, COUNTS.index("mentions")])
                    for run in range(3)
                    for picture in drawn
                )
            )
        differences.append(ratios[0] - ratios[1])
    differences.sort()
    expected = []
    for share in (0.025, 0.975):
        place = share * 299
        low = int(place)
        expected.append(
            differences[low] + (place - low) * (differences[low + 1] - differences[low])
        )
    assert interval(ours, others, 300) == pytest.approx(expected, abs=1e-12)
    assert expected[0] < expected[1]


def test_intervals_that_are_known():
    """A model beside itself differs by 0 on every resample; one that says one absent thing more in every four, by exactly a quarter, however much pictures differ."""
    counts = made_up(2, 40, 3)
    assert interval(counts, counts) == [0.0, 0.0]
    counts[..., 0], counts[..., 1] = 4, np.arange(40) % 4
    more = counts.copy()
    more[..., 1] += 1
    assert interval(more, counts) == pytest.approx([0.25, 0.25], abs=1e-12)


# --- what the tables say ---


def scores(chair, *counts, pope=0.5, **others):
    """One set's scores of one run: made-up rates, POPE accuracies a tenth to either side of `pope`, and for each picture (mentions, absent)."""
    rest = {"chair_s": 0.4, "recall": 0.6, "colour": 0.7, "words": 20.0, "repeats": 0.1} | others
    return {
        "chair_i": chair,
        **rest,
        "pope": {"random": {"accuracy": pope - 0.1}, "popular": {"accuracy": pope + 0.1}},
        "counts": [[mentions, absent, *[0] * (len(COUNTS) - 2)] for mentions, absent in counts],
    }


def test_a_row_by_hand():
    """Two bases with two seeds each. Over bases: the spread of .2 and .6; over seeds: the mean of the spreads of (.1, .3) and (.4, .8).

    Difference: pictures pooled, 11 of 40 absent against 8 of 40, not the mean of the runs' rates. Of the first picture 5 of 20 are, of the
    second 6 of 20, against 4 of 20 each: the two drawn twice, once each, and the other way, are .05, .075 and .1.
    """
    found = {
        ("a", 0): scores(0.1, (5, 1), (5, 2), pope=0.8, words=20),
        ("a", 1): scores(0.3, (5, 1), (5, 1), pope=0.6, words=22),
        ("b", 0): scores(0.4, (5, 2), (5, 2), pope=0.5, words=24),
        ("b", 1): scores(0.8, (5, 1), (5, 1), pope=0.7, words=26, repeats=0.5),
    }
    line = row("bdhs", found, {key: scores(0.9, (5, 1), (5, 1)) for key in found})
    assert line.pop("interval") == pytest.approx([0.05, 0.1]) and line.pop(
        "by_base"
    ) == pytest.approx([0.2, 0.6])
    assert line == pytest.approx(
        {
            "arm": "bdhs",
            "runs": 4,
            "bases": 2,
            "chair_i": 0.4,
            "chair_s": 0.4,
            "recall": 0.6,
            "colour": 0.7,
            "words": 23.0,
            "repeats": 0.2,
            "pope": 0.65,
            "over_bases": 0.08**0.5,
            "over_seeds": (0.02**0.5 + 0.08**0.5) / 2,
            "difference": 0.275 - 0.2,
        }
    )


def test_a_row_of_one_base_or_one_seed_has_no_such_spread():
    one = row("base", {("a", 0): scores(0.1, (5, 1))}, None)
    assert (
        one["over_bases"] is None
        and one["over_seeds"] is None
        and not {"difference", "interval"} & set(one)
    )
    seeds = row("control", {("a", 0): scores(0.1, (5, 1)), ("a", 1): scores(0.3, (5, 1))}, None)
    assert (
        seeds["over_bases"] is None
        and seeds["over_seeds"] == pytest.approx(0.02**0.5)
        and seeds["bases"] == 1
    )
    bases = row(
        "control",
        {
            ("a", 0): scores(0.1, (5, 1)),
            ("a", 1): scores(0.3, (5, 1)),
            ("b", 0): scores(0.6, (5, 1)),
        },
        None,
    )
    assert (
        bases["over_bases"] == pytest.approx(0.08**0.5)
        and bases["over_seeds"] is None
        and bases["chair_i"] == pytest.approx(1 / 3)
    )


def test_an_arm_is_compared_with_the_control_of_its_own_base_and_seed():
    """Where the control lacks the seed, with seed 0 of the same base: (2 + 3) of 20 against (1 + 1)."""
    found = {("a", 0): scores(0.2, (10, 2)), ("a", 1): scores(0.3, (10, 3))}
    control = {("b", 0): scores(0.9, (10, 9)), ("a", 0): scores(0.1, (10, 1))}
    assert row("bdhs", found, control)["difference"] == pytest.approx(0.25 - 0.1)
    assert row("bdhs", found, control | {("a", 1): scores(0.5, (10, 5))})[
        "difference"
    ] == pytest.approx(0.25 - 0.3)


def written(out, base, name, seed, options, **sets):
    """Leave an arm's scores where the study looks for them."""
    folder = Arm(base, name, seed, options).folder(out)
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(sets))


@pytest.fixture()
def parts(monkeypatch):
    """Parts small enough to fill by hand: the main ones, and a question asked of the bases with q = .35 and with q = .5 each."""
    some = (
        Part("Main", MAIN, 2, lambda q: q == 0.35),
        Part("Strengths", MAIN, 1, lambda q: q != 0.35),
        Part(
            "Hidden",
            {"rho 1": "--method bdhs --rho 1", "never run": "--method bdhs --rho 0"},
            1,
            lambda q: q == 0.35,
        ),
        Part("Half", {"longer": "--method bdhs --steps 9"}, 1, lambda q: q == 0.5),
        Part("Open", {"shorter": "--method bdhs --steps 1"}, 1, lambda q: q == 0.35),
    )
    monkeypatch.setattr(study, "PARTS", some)


def test_the_summary_by_hand(tmp_path, parts):
    """Every part beside base, control and BDHS of the same bases; an arm that is not done, or whose control is not, has no row; a question with none no table."""
    for base, seed, chair in (("b/one", 0, 0.1), ("b/one", 1, 0.3), ("b/two", 0, 0.4)):
        written(
            tmp_path,
            base,
            "control",
            seed,
            "--method sft",
            near=scores(chair, (10, 1)),
            far=scores(2 * chair, (10, 2)),
        )
    written(tmp_path, "b/one", "base", 0, None, near=scores(0.2, (10, 2)), far=scores(0.4, (10, 4)))
    written(
        tmp_path,
        "b/two",
        "rho 1",
        0,
        "--method bdhs --rho 1",
        near=scores(0.5, (10, 5)),
        far=scores(0.6, (10, 6)),
    )
    written(
        tmp_path,
        "b/true",
        "bdhs",
        0,
        "--method bdhs",
        near=scores(0.0, (10, 0)),
        far=scores(0.0, (10, 0)),
    )  # its control is not done
    written(
        tmp_path, "b/true", "base", 0, None, near=scores(0.7, (10, 7)), far=scores(0.7, (10, 7))
    )
    for name, options, chair in (
        ("control", "--method sft", 0.6),
        ("bdhs", "--method bdhs", 0.5),
        ("longer", "--method bdhs --steps 9", 0.4),
    ):
        written(
            tmp_path,
            "b/half",
            name,
            0,
            options,
            near=scores(chair, (10, 10 * chair)),
            far=scores(chair, (10, 10 * chair)),
        )
    tables = summary(BASES, {"near": "p/near", "far": "p/far"}, tmp_path)
    seen = {
        part: {
            q: {
                name: [(line["arm"], line["runs"], line["chair_i"]) for line in lines]
                for name, lines in sets.items()
            }
            for q, sets in own.items()
        }
        for part, own in tables.items()
    }
    near, far = (
        [("base", 1, 0.2), ("control", 3, pytest.approx(0.8 / 3))],
        [("base", 1, 0.4), ("control", 3, pytest.approx(1.6 / 3))],
    )
    assert seen["Main"] == {"0.35": {"near": near, "far": far}}
    assert seen["Hidden"] == {
        "0.35": {"near": [*near, ("rho 1", 1, 0.5)], "far": [*far, ("rho 1", 1, 0.6)]}
    }
    assert list(seen) == ["Main", "Strengths", "Hidden", "Half"]
    half = [("control", 1, 0.6), ("bdhs", 1, 0.5), ("longer", 1, 0.4)]
    assert seen["Half"] == {"0.5": {"near": half, "far": half}} and seen["Strengths"]["0.5"] == {
        "near": half[:2],
        "far": half[:2],
    }
    assert list(seen["Strengths"]) == ["0.5"]  # of q = 0 no control is done
    assert [line.get("difference") for line in tables["Hidden"]["0.35"]["near"]] == [
        None,
        None,
        pytest.approx(0.4),
    ]
    assert tables["Hidden"]["0.35"]["far"][2]["interval"] == pytest.approx([0.4, 0.4])


def test_the_markdown_by_hand():
    """Shares in per cent, words as they are, a difference with its sign; what is not known stays empty."""
    line = {
        "arm": "base",
        "runs": 1,
        "bases": 1,
        "chair_i": 0.1234,
        "chair_s": 0.5,
        "recall": 1.0,
        "colour": 0.987,
        "words": 12.34,
        "repeats": 0.005,
        "pope": 0.8768,
        "over_bases": None,
        "over_seeds": None,
    }
    bdhs = line | {
        "arm": "bdhs",
        "runs": 6,
        "bases": 2,
        "over_bases": 0.011,
        "over_seeds": 0.0249,
        "difference": -0.0312,
        "interval": [-0.07, 0.004],
    }
    worse = bdhs | {
        "arm": "worse",
        "chair_i": 0.2,
        "recall": 0.5,
        "repeats": 0.25,
        "difference": 0.05,
        "interval": [0.0149, 0.0951],
    }
    title, *lines = list(
        markdown(
            {
                "A question": {
                    "0.35": {"near": [line, bdhs], "far": [line, worse]},
                    "0": {"near": [worse], "far": [bdhs]},
                }
            }
        )
    )
    short, long = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert title.strip() == "**A question**"
    assert (
        short[0]
        == "| q | arm | bases | runs | CHAIR_i near | CHAIR_i far | recall near, far | repeats |"
    )
    assert short[2:] == [
        "| 0.35 | base | 1 | 1 | 12.3 | 12.3 | 100.0, 100.0 | 0.5, 0.5 |",
        "| 0.35 | bdhs | 2 | 6 | 12.3 (-3.1 [-7.0, +0.4]) | 20.0 (+5.0 [+1.5, +9.5]) | 100.0, 50.0 | 0.5, 25.0 |",
        "| 0 | worse | 2 | 6 | 20.0 (+5.0 [+1.5, +9.5]) | 12.3 (-3.1 [-7.0, +0.4]) | 50.0, 100.0 | 25.0, 0.5 |",
    ]
    assert (
        long[0]
        == "| q | set | arm | runs | CHAIR_i | ± bases | ± seeds | against control [95 %] | CHAIR_s | recall | colour | words | repeats | POPE |"
    )
    assert long[2:4] == [
        "| 0.35 | near | base | 1 | 12.3 |  |  |  | 50.0 | 100.0 | 98.7 | 12.3 | 0.5 | 87.7 |",
        "| 0.35 | near | bdhs | 6 | 12.3 | 1.1 | 2.5 | -3.1 [-7.0, +0.4] | 50.0 | 100.0 | 98.7 | 12.3 | 0.5 | 87.7 |",
    ]
    assert (
        long[6]
        == "| 0 | near | worse | 6 | 20.0 | 1.1 | 2.5 | +5.0 [+1.5, +9.5] | 50.0 | 50.0 | 98.7 | 12.3 | 25.0 | 87.7 |"
    )
    assert {text.count("|") for text in short} == {9} and {text.count("|") for text in long} == {15}


# --- from start to end ---


@pytest.fixture()
def small(tmp_path, monkeypatch, capfd):
    """A function that runs the study's command line on the shipped base with two sets of six pictures and two steps: (status, out, lines of err but bars)."""
    for name in ("typical", "balanced"):
        own, folder = TINY / "final" / name, tmp_path / "pictures" / name
        (folder / "images").mkdir(parents=True)
        raw = json.loads((own / "captions.json").read_text())
        raw["captions"] = raw["captions"][:6]
        kept = {one["image"] for one in raw["captions"]}
        (folder / "captions.json").write_text(json.dumps(raw))
        for path in own.glob("pope_*.jsonl"):
            (folder / path.name).write_text(
                "".join(
                    line
                    for line in path.read_text().splitlines(True)
                    if json.loads(line)["image"] in kept
                )
            )
        for image in kept:
            shutil.copy(own / "images" / image, folder / "images")
    recipe = json.loads((TINY / "recipe.json").read_text()) | {
        "steps": 2,
        "limit": 16,
        "batch_size": 4,
        "rounds": 2,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as main() sets it, which would outlast the test

    def started(arms, *more):
        monkeypatch.setattr(study, "PARTS", (Part("One question", arms, 1, lambda q: q == 0.35),))
        sets = [tmp_path / "pictures" / name for name in ("typical", "balanced")]
        monkeypatch.setattr(
            sys,
            "argv",
            list(
                map(
                    str,
                    [
                        "study.py",
                        "--bases",
                        TINY,
                        "--eval",
                        *sets,
                        "--recipe",
                        tmp_path / "recipe.json",
                        "--out",
                        tmp_path / "out",
                        *more,
                    ],
                )
            ),
        )
        status = cli.run_script(study.main)
        out, err = capfd.readouterr()
        return (
            status,
            out,
            [
                line
                for line in err.replace("\r", "\n").split("\n")
                if line.strip() and "%|" not in line
            ],
        )

    return started


def times(folder):
    """When each file below was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_small_study_from_start_to_end_and_again(tmp_path, small):
    """Everything is measured once: a second start writes the same tables from what is there, a third measures what was taken away."""
    out, arms = tmp_path / "out", MAIN | {"a = 2.0": 2.0}
    status, printed, said = small(arms, "--jobs", "2")
    assert status == 0 and said == [], said
    tables, text = json.loads((out / "study.json").read_text()), (out / "study.md").read_text()
    assert (
        printed.strip() == text.strip()
        and tables["pictures"] == {"typical": 6, "balanced": 6}
        and tables["recipe"]["steps"] == 2
    )
    found = tables["tables"]["One question"]["0.35"]
    assert list(found) == ["typical", "balanced"] and all(
        [line["arm"] for line in lines] == list(arms) for lines in found.values()
    )
    assert all(
        "interval" in line and np.isfinite(line["interval"]).all()
        for lines in found.values()
        for line in lines[2:]
    )
    folders = {name: Arm(str(TINY), name, 0, None).folder(out) for name in arms}
    of_arm = {
        name: json.loads((folder / "scores.json").read_text()) for name, folder in folders.items()
    }
    assert of_arm["base"] != of_arm["a = 2.0"] != of_arm["bdhs"] and all(
        len(one["counts"]) == 6 for scores in of_arm.values() for one in scores.values()
    )
    for name, method in (("control", "sft"), ("bdhs", "bdhs")):
        settings = json.loads((folders[name] / "run" / "config.json").read_text())["settings"]
        assert (settings["method"], settings["steps"], settings["seed"], settings["control"]) == (
            method,
            2,
            0,
            False,
        )

    before = times(out / "arms")
    assert small(arms, "--jobs", "2")[:2] == (0, printed)
    assert (
        times(out / "arms") == before
        and json.loads((out / "study.json").read_text()) == tables
        and (out / "study.md").read_text() == text
    )

    gone = folders["bdhs"] / "scores.json"
    gone.unlink()
    assert small(arms, "--jobs", "1")[:2] == (0, printed)
    after = times(out / "arms")
    assert {path for path in before if after[path] != before[path]} - {folders["bdhs"] / "log"} == {
        gone
    }
    assert json.loads(gone.read_text()) == of_arm["bdhs"] and (out / "study.md").read_text() == text


def test_an_arm_that_fails_is_one_line_that_names_its_log(tmp_path, small):
    """Nothing is summed up; what went wrong stands in the log."""
    status, printed, said = small({"broken": "--method sft --colour red"}, "--jobs", "1")
    log = Arm(str(TINY), "broken", 0, None).folder(tmp_path / "out") / "log"
    assert status == 2 and printed == "" and len(said) == 1 and str(log) in said[0], said
    assert (
        "--colour" in log.read_text()
        and not (tmp_path / "out" / "study.md").exists()
        and not (log.parent / "scores.json").exists()
    )
