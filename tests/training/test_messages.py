"""What a run says when it ends."""

import json

from minialign.training.messages import describe_change, print_skipped_prompts


def scores(**chair_i):
    """Return variant -> set -> scores, with one set that has captions and one that has none."""
    return {name: {"typical": {"chair_i": x}, "asked": {}} for name, x in chair_i.items()}


def test_the_sentence_names_the_control():
    """By hand: shares of 1/2, 1/4 and 1/3. A set without captions is not mentioned."""
    sentence = describe_change(scores(base=0.5, control=1 / 3, aligned=0.25), "bdhs", "runs/1")

    assert sentence == (
        "bdhs took the share of mentioned objects that are not there "
        "from 50.0 to 25.0 % (control 33.3) on typical; model and logs are in runs/1"
    )


def test_the_sentence_without_a_control():
    sentence = describe_change(scores(base=0.5, aligned=0.25), "bdhs", "runs/1")

    assert "from 50.0 to 25.0 % on typical; " in sentence


def test_the_sentence_without_captions():
    sentence = describe_change({"base": {}, "aligned": {}}, "sft", "runs/1")

    assert sentence == "sft is done; model and logs are in runs/1"


def test_skipped_prompts_are_averaged_over_the_steps(tmp_path, capsys):
    """By hand: (0.5 + 0) / 2 = 25 %. A metric that the log does not have is not mentioned."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"same": share}) + "\n" for share in (0.5, 0.0)))

    print_skipped_prompts(path)

    printed = capsys.readouterr().err
    assert printed.startswith("25.0 % of the sampled prompts gave no two different responses")
    assert "ties" not in printed
