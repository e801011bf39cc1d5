"""The README says what the stored runs say."""
import json
import sys

from conftest import ROOT

from minialign.study import PARTS, markdown

sys.path.insert(0, str(ROOT / "data"))
import methods  # noqa: E402
import train  # noqa: E402

STUDY = json.loads((ROOT / "data" / "tiny" / "study.json").read_text())
README = (ROOT / "README.md").read_text()


def test_the_readmes_central_table_is_the_studys():
    """Every row that minialign.study makes of the first part of data/tiny/study.json, and study.md whole."""
    first = {PARTS[0].title: STUDY["tables"][PARTS[0].title]}
    rows = [line for line in markdown(first) if line.startswith("|")]
    assert len(rows) == 2 + 9 and all(row in README for row in rows)
    assert (ROOT / "data" / "tiny" / "study.md").read_text() == "\n".join(markdown(STUDY["tables"])).strip() + "\n"


def test_the_study_is_of_the_shipped_recipe_on_enough_bases_seeds_and_pictures():
    assert STUDY["recipe"] == json.loads((ROOT / "data" / "tiny" / "recipe.json").read_text()) and len(STUDY["commit"]) == 40
    assert STUDY["commit"][:7] in README
    assert set(STUDY["pictures"]) == {"typical", "shifted", "balanced"} and min(STUDY["pictures"].values()) >= 400
    for lines in STUDY["tables"][PARTS[0].title]["0.35"].values():
        assert {(one["arm"], one["runs"], one["bases"]) for one in lines} == {("base", 3, 3), ("control", 9, 3), ("bdhs", 9, 3)}


def test_the_main_row_has_one_direction_on_every_base():
    """What the README says of shifted and balanced; of typical it does not."""
    for name in ("shifted", "balanced"):
        by_base = {one["arm"]: one["by_base"] for one in STUDY["tables"][PARTS[0].title]["0.35"][name]}
        assert len(by_base["bdhs"]) == 3 and all(ours < other for ours, other in zip(by_base["bdhs"], by_base["control"]))


def test_the_readmes_table_of_methods_is_the_stored_runs():
    """Every method that is measured on pictures, each on its own row, as data/methods.py printed it."""
    stored = json.loads((ROOT / "data" / "tiny" / "methods.json").read_text())
    rows = list(methods.method_lines(stored["runs"]))
    assert set(stored["runs"]) == set(train.METHODS) - {"reward"} and all(row in README for row in rows)
    assert stored["command"] in README
