"""Names are explained where a run uses them."""

import pytest
from report_runs import scores, write_run

from minialign.report.run_files import read_run
from minialign.report.terms import CONTROL, POPE, TINY_SETS, explain_terms


def test_only_names_that_occur_are_explained(tmp_path):
    evaluation = {"base": {"mine": scores(0.5)}}
    run = read_run(write_run(tmp_path / "run", {"eval": ["mine"]}, evaluation=evaluation))

    sentences = explain_terms(run)

    assert any("CHAIR" in sentence for sentence in sentences)
    assert not {CONTROL, POPE, TINY_SETS} & set(sentences)


@pytest.mark.parametrize("variant", ["base", "control"])
def test_the_control_and_the_questions_are_explained(tmp_path, variant):
    pope = {"pope": {"random": {"accuracy": 0.5, "yes": 0.5}}}
    run = read_run(write_run(tmp_path / "run", evaluation={variant: {"typical": pope}}))

    sentences = explain_terms(run)

    assert {POPE, TINY_SETS} <= set(sentences)
    assert (CONTROL in sentences) == (variant == "control")
