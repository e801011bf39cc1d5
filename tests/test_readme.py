"""The README says what the stored runs say."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
import methods  # noqa: E402
from study import PARTS, brief, markdown  # noqa: E402

import train  # noqa: E402

SITTINGS = {
    name: json.loads((ROOT / "data" / "tiny" / f"{name}.json").read_text())
    for name in ("study", "study-2")
}
STUDY = SITTINGS["study"]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", SITTINGS)
def test_the_markdown_is_the_jsons(name):
    assert (ROOT / "data" / "tiny" / f"{name}.md").read_text() == "\n".join(
        markdown(SITTINGS[name]["tables"])
    ).strip() + "\n"


def test_the_readmes_rows_are_the_studys():
    """Each is, to the letter, one that data/study.py says in brief; the main table's are the first sitting's; of every arm there is one but of those that won nothing."""
    known = {
        line
        for sitting in SITTINGS.values()
        for strengths in sitting["tables"].values()
        for line in brief(strengths)
    }
    rows = [
        line
        for line in README[
            README.index("## What it shows") : README.index("## Every method")
        ].split("\n")
        if line.startswith("|") and "---" not in line
    ]
    arms = {arm for part in PARTS[:-1] for arm in part.arms}
    assert (
        len(rows) > 30
        and set(rows) <= known
        and {row.split(" | ")[1] for row in rows} == arms | {"arm"}
    )
    assert rows[:4] == [
        line for line in brief(STUDY["tables"][PARTS[0].title]) if "---" not in line
    ]


@pytest.mark.parametrize("name", SITTINGS)
def test_the_study_is_of_the_shipped_recipe_on_enough_pictures(name):
    study = SITTINGS[name]
    assert (
        study["recipe"] == json.loads((ROOT / "data" / "tiny" / "recipe.json").read_text())
        and len(study["commit"]) == 40
    )
    assert (
        set(study["pictures"]) == {"typical", "shifted", "balanced"}
        and min(study["pictures"].values()) >= 400
    )


def test_the_main_row_stands_on_enough_bases_and_seeds():
    assert STUDY["commit"][:7] in README
    for lines in STUDY["tables"][PARTS[0].title]["0.35"].values():
        assert {(one["arm"], one["runs"], one["bases"]) for one in lines} == {
            ("base", 3, 3),
            ("control", 9, 3),
            ("bdhs", 9, 3),
        }


def test_the_main_row_has_one_direction_on_every_base():
    """What the README says of shifted and balanced, in both sittings; of typical it does not."""
    for name, sitting in (
        (name, sitting) for name in ("shifted", "balanced") for sitting in SITTINGS.values()
    ):
        by_base = {
            one["arm"]: one["by_base"] for one in sitting["tables"][PARTS[0].title]["0.35"][name]
        }
        assert len(by_base["bdhs"]) == 3 and all(
            ours < other for ours, other in zip(by_base["bdhs"], by_base["control"])
        )


def test_the_readmes_table_of_methods_is_the_stored_runs():
    """Every method that is measured on pictures, each on its own row, as data/methods.py printed it."""
    stored = json.loads((ROOT / "data" / "tiny" / "methods.json").read_text())
    rows = list(methods.method_lines(stored["runs"]))
    assert set(stored["runs"]) == set(train.METHODS) - {"reward"} and all(
        row in README for row in rows
    )
    assert stored["command"] in README
