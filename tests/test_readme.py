"""The README says what the stored run says."""
import json
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
import seeds  # noqa: E402
import train  # noqa: E402


def test_the_readmes_table_is_the_stored_runs():
    """Every row of the table that data/seeds.py makes of data/tiny/results.json stands in the README, and its command beside it."""
    stored, readme = json.loads((ROOT / "data" / "tiny" / "results.json").read_text()), (ROOT / "README.md").read_text()
    rows = list(seeds.lines(stored["runs"]))
    assert len(rows) == 2 + 9 and all(row in readme for row in rows)
    assert stored["command"] in readme


def test_the_stored_run_used_the_recipe():
    """Three alignment seeds, at least 200 pictures a set: 4 POPE questions a picture and split."""
    stored = json.loads((ROOT / "data" / "tiny" / "results.json").read_text())
    assert len(stored["runs"]) >= 3
    assert all(scores["pope"]["random"]["n"] >= 800 for run in stored["runs"].values() for arm in run.values() for scores in arm.values())


def test_the_readmes_table_of_methods_is_the_stored_runs():
    """Every method that is measured on pictures, each on its own row, as data/seeds.py --methods printed it."""
    stored, readme = json.loads((ROOT / "data" / "tiny" / "methods.json").read_text()), (ROOT / "README.md").read_text()
    rows = list(seeds.method_lines(stored["runs"]))
    assert set(stored["runs"]) == set(train.METHODS) - {"reward"} and all(row in readme for row in rows)
    assert stored["command"] in readme
