"""What a run of train.py leaves: the files and fields that its users rely on, for every method."""

import json
from functools import partial

import pytest
from conftest import TINY
from processes import run_process
from running import (
    assert_adapter_was_trained,
    brief,
    files_in,
    read_log,
    run_inside,
    write_json,
)
from safetensors.torch import load_file

from minialign.evaluation.kept_answers import read_answers_at, read_captions
from minialign.pairs.reward_model import load_reward_model

STEP_FIELDS = {"step", "loss", "lr", "grad_norm", "seconds"}
PAIR_FIELDS = STEP_FIELDS | {
    "logp_chosen",
    "logp_rejected",
    "ref_logp_chosen",
    "ref_logp_rejected",
    "margin",
    "accuracy",
}
POLICY_GRADIENT_FIELDS = STEP_FIELDS | {"reward", "kl", "entropy", "length"}


@pytest.fixture
def train(monkeypatch, capfd):
    """Return a function that runs train.py inside this process."""
    return partial(run_inside, monkeypatch, capfd, "train.py")


# --- a run with a control and an evaluation set ---


@pytest.fixture(scope="module")
def evaluation_set(tmp_path_factory):
    """Return a small evaluation set: four captions, and ten questions of each split of POPE."""
    source = TINY / "tune" / "typical"
    folder = tmp_path_factory.mktemp("evaluation") / "typical"
    folder.mkdir()
    (folder / "images").symlink_to(source / "images")
    annotations = json.loads((source / "captions.json").read_text())
    annotations["captions"] = annotations["captions"][:4]
    write_json(folder / "captions.json", annotations)
    for path in source.glob("pope_*.jsonl"):
        questions = path.read_text().splitlines(keepends=True)[:10]
        (folder / path.name).write_text("".join(questions))
    return folder


@pytest.fixture(scope="module")
def bdhs_run(tmp_path_factory, evaluation_set):
    """Run three steps on BDHS pairs with a control and one evaluation set.

    Returns the folder and what was printed.
    """
    folder = tmp_path_factory.mktemp("bdhs") / "run"
    outcome = run_process(
        "train.py",
        *"--limit 8 --steps 3 --batch-size 4 --control".split(),
        *("--eval", evaluation_set),
        *("--out", folder),
    )
    assert outcome.status == 0, outcome.stderr
    return folder, outcome.stdout


def test_a_line_of_the_log_has_its_fields_in_order(bdhs_run):
    folder, _ = bdhs_run
    text = (folder / "metrics.jsonl").read_text().splitlines()[0]
    assert list(json.loads(text)) == [
        "step",
        "loss",
        "logp_chosen",
        "logp_rejected",
        "ref_logp_chosen",
        "ref_logp_rejected",
        "margin",
        "accuracy",
        "lr",
        "grad_norm",
        "seconds",
    ]


def test_the_first_step_has_margin_zero(bdhs_run):
    """Policy and reference are equal: the loss is log 2. They differ by rounding, 1e-5 a token."""
    folder, _ = bdhs_run
    first = read_log(folder)[0]
    assert abs(first["loss"] - 0.693147) < 1e-4
    assert abs(first["margin"]) < 1e-3


def test_evaluation_holds_every_variant_and_score(bdhs_run):
    folder, _ = bdhs_run
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert list(evaluation) == ["base", "control", "aligned"]
    assert list(evaluation["base"]) == ["typical"]

    scores = evaluation["aligned"]["typical"]
    assert set(scores) == {"chair_i", "chair_s", "recall", "colour", "pope", "words", "repeats"}
    assert set(scores["pope"]) == {"random", "popular", "adversarial"}
    assert scores["pope"]["random"]["n"] == 10


def test_kept_answers_give_the_figures_of_the_table(bdhs_run):
    """Mentions and answers in the files give every score again, to the last digit."""
    folder, _ = bdhs_run
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert read_answers_at(folder).scores() == evaluation
    captions = read_captions(folder / "captions.jsonl")
    assert len(captions) == 4  # the images of the evaluation set
    assert list(captions[0]["answers"]) == ["base", "control", "aligned"]


def test_the_summary_has_seconds_and_counts(bdhs_run):
    folder, _ = bdhs_run
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {"seconds", "steps", "pairs", "peak_memory_mb"}
    assert set(summary["seconds"]) == {"load", "sample", "reference", "train", "evaluate"}
    assert summary["steps"] == 3


def test_the_config_has_settings_and_versions(bdhs_run):
    folder, _ = bdhs_run
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == {"settings", "template", "checkpoint", "similarity", "versions"}
    assert config["checkpoint"]
    assert config["template"] == "vicuna"
    assert config["settings"]["beta"] == 0.5
    assert set(config["versions"]) == {"minialign", "torch", "python"}


def test_a_sampled_pair_has_its_fields(bdhs_run):
    folder, _ = bdhs_run
    pair = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    assert set(pair) == {
        "id",
        "image",
        "prompt",
        "chosen",
        "rejected",
        "rounds",
        "similarity",
        "visible",
        "cuts",
        "completed",
        "seed",
    }


def test_the_table_and_the_folder_are_printed(bdhs_run):
    folder, stdout = bdhs_run
    *table, outcome, last_line = stdout.splitlines()
    assert "typical  aligned  " in stdout
    assert max(map(len, table)) <= 100
    assert "| typical | aligned |" in (folder / "evaluation.md").read_text()
    assert f"model and logs are in {folder}" in outcome
    assert str(folder / "report.html") in last_line


def test_the_report_shows_the_run(bdhs_run):
    """What it shows in detail is tested in tests/report."""
    folder, _ = bdhs_run
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "python train.py --method bdhs --limit 8" in page
    assert "word by word:" in page
    assert "data:image/png" in page


def test_the_control_can_be_left_out(tmp_path, train):
    """The tiny recipe trains one for bdhs."""
    words = "--limit 4 --steps 1 --batch-size 2 --max-new-tokens 4 --rounds 1 --eval".split()

    with_control = train(*words, "--out", tmp_path / "with")
    without_control = train(*words, "--no-control", "--out", tmp_path / "without")

    assert with_control.status == 0
    assert (tmp_path / "with" / "control").exists()
    assert without_control.status == 0
    assert not (tmp_path / "without" / "control").exists()


# --- every method ---


@pytest.mark.parametrize(
    "words, fields",
    [
        ("sft", STEP_FIELDS | {"logp_chosen"}),
        ("dpo --loss ipo --distill-weight 2", PAIR_FIELDS | {"divergence", "support"}),
        ("online-dpo", PAIR_FIELDS | {"same", "tied", "offline"}),
        ("mixed-dpo --loss slic", PAIR_FIELDS | {"same", "tied", "offline"}),
        ("bdhs --by noise --unguided", PAIR_FIELDS),
        ("online-bdhs --gamma .3", PAIR_FIELDS | {"rounds", "same"}),
        ("distortion", PAIR_FIELDS | {"changed"}),
        ("rloo", POLICY_GRADIENT_FIELDS),
        ("ppo", POLICY_GRADIENT_FIELDS | {"value_loss"}),
        ("grpo --passes 2", POLICY_GRADIENT_FIELDS),
        ("distill --divergence reverse", STEP_FIELDS | {"support"}),
        ("distill --on reference --by noise", STEP_FIELDS | {"support"}),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_every_method_leaves_the_documented_files(tmp_path, train, reward_folder, words, fields):
    """Two steps on eight records leave settings, log, summary, scores and a trained adapter."""
    folder = tmp_path / "run"
    method, *options = words.split()
    if method in ("rloo", "ppo", "grpo"):
        options += ["--reward", reward_folder]

    outcome = train(*brief(method), *options, "--out", folder)

    # 1. What was said.
    assert outcome.status == 0, outcome.stderr
    assert f"{method} is done, nothing was measured" in outcome.stdout
    assert f"; model and logs are in {folder}" in outcome.stdout

    # 2. Settings, log and summary.
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["method"] == method
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(text) for text in texts]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(fields <= set(line) for line in lines)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert 1 <= summary["pairs"] <= 8

    # 3. Without evaluation sets there are no scores.
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert set(evaluation) - {"control"} == {"base", "aligned"}
    assert evaluation["base"] == {}
    assert evaluation["aligned"] == {}

    # 4. The adapter, and no unfinished file.
    assert_adapter_was_trained(folder / "adapter")
    names = {path.split("/")[-1] for path in files_in(folder)}
    assert names <= {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "evaluation.json",
        "report.html",
        "adapter_config.json",
        "adapter_model.safetensors",
        "pairs.jsonl",
        "reference.safetensors",
        "targets.safetensors",
    }


# --- reward models ---


def test_a_reward_run_leaves_an_adapter_and_a_head(reward_folder):
    assert files_in(reward_folder) == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "evaluation.json",
        "report.html",
        "score.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert_adapter_was_trained(reward_folder / "adapter")
    assert load_file(reward_folder / "score.safetensors")["weight"].any()


def test_a_reward_run_logs_scores(reward_folder):
    log = read_log(reward_folder)
    assert len(log) == 2
    fields = STEP_FIELDS | {"score_chosen", "score_rejected", "margin", "accuracy"}
    assert fields - {"seconds"} <= set(log[0])


def test_a_reward_run_measures_training_pairs_and_held_out_ones(reward_folder):
    """Of eight pairs one is held out. Before training all scores are 0, so all pairs are ties."""
    evaluation = json.loads((reward_folder / "evaluation.json").read_text())
    assert list(evaluation) == ["base", "aligned"]
    for scores in evaluation.values():
        assert scores["train"]["n"] == 7
        assert scores["held-out"]["n"] == 1
    assert evaluation["base"]["train"]["ties"] == 1.0
    assert evaluation["base"]["train"]["first"] is None
    assert evaluation["aligned"]["train"]["ties"] < 1


def test_a_reward_model_remembers_its_template(tmp_path, train):
    folder = tmp_path / "run"

    outcome = train(*brief("reward"), "--template", "vicuna_v1", "--out", folder)

    assert outcome.status == 0, outcome.stderr
    assert load_reward_model(folder, TINY / "model").vlm.template == "vicuna_v1"


# --- records at the limit of the context ---


@pytest.mark.parametrize("method", ["rloo", "online-bdhs"])
def test_a_response_cut_off_by_the_context_does_not_end_the_run(
    tmp_path, train, reward_folder, method
):
    """The prompts leave three tokens for a response. What is sampled there has no end token."""
    rows = json.loads((TINY / "train" / "povid.json").read_text())[:4]
    for row in rows:
        question = {"from": "human", "value": "<image>\n" + "Describe the picture. " * 109}
        row["conversations"] = [question, {"from": "gpt", "value": "Yes."}]
        row["rejected_conversations"] = [question, {"from": "gpt", "value": "No."}]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    reward = ["--reward", reward_folder] if method == "rloo" else []

    outcome = train(
        *brief(method),
        *("--data", tmp_path / "long.json"),
        *("--images", TINY / "train" / "images"),
        *reward,
        *("--out", tmp_path / "out"),
    )

    assert outcome.status == 0, outcome.stderr
