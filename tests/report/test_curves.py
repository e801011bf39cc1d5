"""The notes below the curves: they say what is in this log, and nothing else."""

from report_runs import LOG, PageReader

from minialign.report.curves import curves_of


def test_the_distance_from_the_reference_is_in_numbers():
    """The means of -2, -2.5 and -3 and of -2 three times are half a nat apart."""
    page = PageReader(curves_of(LOG))

    expected = "the model is 0.5 nats below its reference on average: −2.5 against −2.0."
    assert f"In the last 3 steps {expected}" in page.text


def test_only_a_reward_model_has_a_margin_of_scores():
    policy_page = PageReader(curves_of([{"step": 0, "margin": 0.0}]))
    reward_page = PageReader(curves_of([{"step": 0, "margin": 0.0, "score_chosen": 1.0}]))

    assert "times beta" in policy_page.text
    assert "score" not in policy_page.text
    assert "How far the scores of chosen answers are above" in reward_page.text


def test_the_notes_hold_for_any_reference():
    """A merged reference differs from the model before training. Equal log-probs are a tie."""
    page = PageReader(curves_of([{"step": 0, "margin": 0.7, "accuracy": 0.5}]))

    assert "begins at 0" not in page.text
    assert "It is 0 where the model equals the reference" in page.text
    assert "A margin of 0 counts half." in page.text


def test_the_charts_of_the_control_repeat_no_notes():
    assert "What the optimizer lowers." in PageReader(curves_of(LOG)).text
    assert "What the optimizer lowers." not in PageReader(curves_of(LOG, with_notes=False)).text
