"""Names are explained where a run uses them."""

import pytest
from report_runs import scores, write_run

from minialign.report.run_files import read_run
from minialign.report.terms import POPE, TINY_SETS, describe_control, explain_terms


def test_only_names_that_occur_are_explained(tmp_path):
    evaluation = {"base": {"mine": scores(0.5)}}
    run = read_run(write_run(tmp_path / "run", {"eval": ["mine"]}, evaluation=evaluation))

    sentences = explain_terms(run)

    assert any("CHAIR" in sentence for sentence in sentences)
    assert not {describe_control(run), POPE, TINY_SETS} & set(sentences)


@pytest.mark.parametrize("variant", ["base", "control"])
def test_the_control_and_the_questions_are_explained(tmp_path, variant):
    pope = {"pope": {"random": {"accuracy": 0.5, "yes": 0.5}}}
    run = read_run(write_run(tmp_path / "run", evaluation={variant: {"typical": pope}}))

    sentences = explain_terms(run)

    assert {POPE, TINY_SETS} <= set(sentences)
    assert (describe_control(run) in sentences) == (variant == "control")


@pytest.mark.parametrize(
    "method, gains",
    [
        ("bdhs", "the rejected answers"),
        ("online-dpo", "the ranking of its own answers"),
        ("distill", "the targets of the distillation"),
        ("rloo", "the rewards of its own answers"),
    ],
)
def test_what_the_control_lacks_depends_on_the_method(tmp_path, method, gains):
    run = read_run(write_run(tmp_path / "run", {"method": method}))

    assert describe_control(run) == (
        "control: the same model, trained on the chosen answers alone. "
        f"What the aligned model gains beyond the control comes from {gains}."
    )


def test_of_a_method_of_another_version_only_the_control_is_explained(tmp_path):
    run = read_run(write_run(tmp_path / "run", {"method": "of another version"}))

    assert describe_control(run) == (
        "control: the same model, trained on the chosen answers alone."
    )
