"""sample.py as a user meets it: pairs, answer and score, restarts, and input that it refuses."""

import json
import shutil
import signal
from functools import partial
from operator import itemgetter

import pytest
from conftest import TINY
from PIL import Image
from processes import run_process, run_until, start_process
from running import assert_refused, run_inside, write_json

import sample as sample_script
from minialign.generation.decoding import decode
from minialign.logprobs import batches_that_fit
from minialign.utils.files import read_jsonl
from minialign.utils.interrupts import Interrupted


@pytest.fixture
def sample(tmp_path, monkeypatch, capfd):
    """Return a function that runs sample.py inside this process, in an empty working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return partial(run_inside, monkeypatch, capfd, "sample.py")


@pytest.fixture
def refuses(tmp_path, sample):
    """Return a function that runs sample.py and asserts that it refuses, and leaves no files."""

    def assert_sample_refuses(words, *expected, started=False):
        assert_refused(sample(*words), *expected, started=started)
        assert not (tmp_path / "out").exists()
        assert not list((tmp_path / "work").iterdir())

    return assert_sample_refuses


@pytest.fixture
def records(tmp_path):
    """Return three supervised records, whose images lie in tmp_path/images."""
    records = json.loads((TINY / "train" / "instruct.json").read_text())[:3]
    (tmp_path / "images").mkdir()
    for record in records:
        shutil.copy(TINY / "train" / "images" / record["image"], tmp_path / "images")
    return records


@pytest.fixture
def data(tmp_path):
    """Return a function that writes records to tmp_path/data.json and returns its options."""

    def write(records):
        return ["--data", write_json(tmp_path / "data.json", records)]

    return write


# --- results ---


def test_a_killed_sampling_resumes_to_the_same_pairs(tmp_path):
    """Groups are formed from the full list of records, so a restart changes no group."""
    words = "--limit 24 --group 4 --rho .97 --rounds 2 --max-new-tokens 16".split()
    whole = tmp_path / "whole.jsonl"
    killed = tmp_path / "killed.jsonl"
    unfinished = tmp_path / "killed.jsonl.part"
    whole_run = start_process("sample.py", *words, "--out", whole)
    run_until(unfinished, 5, signal.SIGKILL, "sample.py", *words, "--out", killed)
    assert whole_run.wait().status == 0
    assert not killed.exists()

    # 1. Work in progress is not overwritten.
    assert run_process("sample.py", *words, "--out", killed).status == 2

    # 2. Resumed, it gives the same pairs, and draws the contact sheet.
    assert run_process("sample.py", *words, "--out", killed, "--resume").status == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert (tmp_path / "killed.png").exists()
    assert not unfinished.exists()


def test_kept_and_dropped_pairs_are_those_of_a_sampling_without_keep(
    tmp_path, sample, records, data
):
    """Only their scores are new. The sheet shows the kept ones."""
    words = [*data(records), *("--rounds", "1"), *("--max-new-tokens", "8")]
    assert sample(*words, "--out", tmp_path / "all.jsonl").status == 0
    pairs = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]

    path = tmp_path / "pairs.jsonl"
    outcome = sample(*words, "--keep", ".3", "--by-score", "policy", "--out", path)

    assert outcome.status == 0, outcome.stderr
    assert "1 pairs kept of 3" in outcome.stderr
    assert "1 of them drawn in" in outcome.stderr
    (kept,) = read_jsonl(path)
    dropped = read_jsonl(tmp_path / "pairs.dropped.jsonl")
    assert kept["score"] >= max(pair["score"] for pair in dropped)
    unscored = [without_scores(pair) for pair in [kept, *dropped]]
    assert sorted(unscored, key=itemgetter("id")) == pairs


@pytest.mark.parametrize("keep", ["", "--keep .5 --by-score policy"])
def test_a_missing_contact_sheet_is_drawn_when_resumed(tmp_path, sample, records, data, keep):
    """The process was stopped behind the pairs, before it removed the unfinished file."""
    path = tmp_path / "pairs.jsonl"
    sheet = tmp_path / "pairs.png"
    unfinished = tmp_path / "pairs.jsonl.part"
    words = [*data(records), *("--rounds", "1"), *("--max-new-tokens", "4"), *keep.split()]
    words += ["--out", path]
    assert sample(*words).status == 0
    pairs = path.read_bytes()
    drawn = sheet.read_bytes()
    sheet.unlink()
    unfinished.write_bytes(pairs)

    outcome = sample(*words, "--resume")

    assert outcome.status == 0, outcome.stderr
    assert f"pairs in {path}, sampled earlier; " in outcome.stderr
    assert sheet.read_bytes() == drawn
    assert path.read_bytes() == pairs
    assert not unfinished.exists()
    assert "is finished already" in sample(*words, "--resume").stderr


def without_scores(pair):
    """Return a pair without the fields of its scores."""
    return {name: value for name, value in pair.items() if not name.startswith("score")}


def test_pairs_of_the_data_are_written_in_the_form_of_sampled_ones(tmp_path, sample):
    """POVID's. With --keep 1 all are scored, and none is dropped."""
    rows = json.loads((TINY / "train" / "povid.json").read_text())[:2]
    path = tmp_path / "pairs.jsonl"
    words = ["--by", "data", "--data", write_json(tmp_path / "povid.json", rows)]
    words += ["--images", TINY / "train" / "images"]

    outcome = sample(*words, "--keep", "1", "--by-score", "policy", "--out", path)

    assert outcome.status == 0, outcome.stderr
    for row, pair in zip(rows, read_jsonl(path), strict=True):
        assert pair["prompt"] == row["conversations"][0]["value"]
        assert pair["chosen"] == row["conversations"][1]["value"]
        assert pair["rejected"] == row["rejected_conversations"][1]["value"]
        assert pair["score"] == pytest.approx(
            pair["score_chosen"] - pair["score_rejected"], abs=2e-4
        )


def test_an_explained_pair_is_the_pair_of_the_file(tmp_path, sample, records, data):
    """It is in the second group, and its first rounds are too similar."""
    words = [*data(records), *("--rounds", "3", "--epsilon", "-1"), *("--max-new-tokens", "8")]
    words += ["--group", "2"]
    assert sample(*words, "--out", tmp_path / "pairs.jsonl").status == 0
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]

    outcome = sample(*words, "--explain", records[2]["id"])

    assert outcome.status == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert json.loads(lines[-1]) == pairs[2]
    assert pairs[2]["rounds"] == 3
    assert [line for line in lines if line.startswith("Round")] == [
        "Round 1 of at most 3",
        "Round 2 of at most 3",
        "Round 3 of at most 3",
    ]
    assert not list((tmp_path / "work").iterdir())


def test_answer_prints_the_answer_alone():
    image = TINY / "tune" / "typical" / "images" / "0001.png"

    outcome = run_process(
        "sample.py",
        "answer",
        *("--image", image),
        *("--prompt", "Where is the cup?"),
        *("--max-new-tokens", "12"),
    )

    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.strip()
    assert outcome.stdout.endswith("\n")
    assert "<" not in outcome.stdout  # no special token


def test_an_explained_answer_is_the_same_answer(sample):
    """Below it stands a table of its words."""
    image = TINY / "tune" / "typical" / "images" / "0001.png"
    words = ["answer", "--image", image, "--prompt", "Where is the cup?", "--max-new-tokens", "4"]

    answer = sample(*words).stdout
    explained = sample(*words, "--explain").stdout

    assert explained.startswith(f"{answer}\n")
    table = explained.partition("instead\n")[2]
    rows = table.partition("the whole answer")[0].splitlines()
    shown_words = [row.split()[0] for row in rows]
    assert "".join(shown_words) == "".join(answer.split())


def test_an_end_token_with_a_text_is_not_printed(tmp_path, sample):
    """A template may close answers with an ordinary token, here the full stop."""
    image = TINY / "tune" / "typical" / "images" / "0001.png"
    words = ["answer", "--image", image, "--prompt", "Where is the cup?"]
    fields = {"user_turn": "USER: {} ASSISTANT:", "response_prefix": " ", "end_token": "."}
    template = write_json(tmp_path / "template.json", fields)

    answer = sample(*words).stdout
    ended_answer = sample(*words, "--template", template).stdout

    assert answer.count(".") == 1
    assert ended_answer == answer.replace(".", "")


def test_an_interrupted_answer_ends_its_line(sample, monkeypatch):
    """On a terminal the message would stand behind the last word."""
    image = TINY / "tune" / "typical" / "images" / "0001.png"

    def interrupted_decode(*arguments):
        """Yield the first token alone."""
        yield next(decode(*arguments))
        raise Interrupted

    monkeypatch.setattr("sample.decode", interrupted_decode)
    outcome = sample("answer", "--image", image, "--prompt", "Is there a cup?")

    assert outcome.status == 130
    assert outcome.stdout in ("Yes\n", "No\n")


def test_the_seed_decides_a_sampled_answer(sample):
    """At temperature 2 three seeds give three answers, and each seed gives its answer again."""
    image = TINY / "tune" / "typical" / "images" / "0001.png"
    words = ["answer", "--image", image, "--prompt", "What is in the picture?"]
    words += ["--max-new-tokens", "12", "--temperature", "2"]

    answers = [sample(*words, "--seed", seed).stdout for seed in ("0", "1", "2", "1")]

    assert len(set(answers)) == 3
    assert answers[3] == answers[1]
    assert sample(*words).stdout == answers[0]


def test_score_writes_a_line_a_record(tmp_path):
    """ "Yes." is three tokens with the end token."""
    question = {"from": "human", "value": "<image>\nIs it?"}
    record = {
        "id": "a",
        "image": "0001.png",
        "conversations": [question, {"from": "gpt", "value": "Yes."}],
        "rejected_conversations": [question, {"from": "gpt", "value": "No."}],
    }
    path = write_json(tmp_path / "one.json", [record])
    images = TINY / "tune" / "typical" / "images"

    outcome = run_process("sample.py", "score", "--data", path, "--images", images)

    assert outcome.status == 0, outcome.stderr
    line = json.loads(outcome.stdout)
    assert list(line) == ["id", "logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected"]
    assert line["tokens_chosen"] == 3
    assert line["logp_chosen"] < 0


def test_records_are_scored_in_batches_that_fit(sample, monkeypatch):
    """Where two records do not fit, each is a batch. The log-probs change by rounding alone."""
    words = ["score", "--data", TINY / "train" / "povid.json"]
    read_three = partial(sample_script.read_records, limit=3)
    monkeypatch.setattr(sample_script, "read_records", read_three)
    together = [json.loads(line) for line in sample(*words).stdout.splitlines()]
    batch_sizes = []

    def score_batch(vlm, examples):
        batch_sizes.append(len(examples))
        return score_records(vlm, examples)

    score_records = sample_script.score_records
    monkeypatch.setattr(sample_script, "score_records", score_batch)
    one_row = partial(batches_that_fit, max_tokens=1)
    monkeypatch.setattr(sample_script, "batches_that_fit", one_row)
    apart = [json.loads(line) for line in sample(*words).stdout.splitlines()]

    assert batch_sizes == [1, 1, 1]
    for line, expected in zip(apart, together, strict=True):
        assert line["id"] == expected["id"]
        for name in ("chosen", "rejected"):
            tolerance = 1e-5 * line[f"tokens_{name}"]
            assert line[f"logp_{name}"] == pytest.approx(expected[f"logp_{name}"], abs=tolerance)


# --- images and records that are refused ---


def test_a_missing_image(records, data, refuses):
    records[0]["image"] = "gone.png"
    refuses(data(records), "data.json", "record 1", "gone.png")


@pytest.mark.parametrize("command", ["pairs", "score"])
def test_a_cut_image_is_found_before_any_work(tmp_path, sample, data, command, monkeypatch):
    """A JPEG whose header is complete. Nothing is sampled or scored before it is decoded."""
    record = json.loads((TINY / "train" / "povid.json").read_text())[0]
    (tmp_path / "images").mkdir()
    late = tmp_path / "images" / "late.jpg"
    Image.open(TINY / "train" / "images" / record["image"]).convert("RGB").save(late)
    late.write_bytes(late.read_bytes()[:-500])
    record["image"] = "late.jpg"

    def fail(*_, **__):
        pytest.fail("the work started")

    monkeypatch.setattr(sample_script, "sample_pair_file", fail)
    monkeypatch.setattr(sample_script, "response_logps", fail)
    outcome = sample(command, *data([record]))

    assert_refused(outcome, "late.jpg", "complete")
    assert not list((tmp_path / "work").iterdir())


def test_a_file_that_is_no_image_names_its_record(tmp_path, records, data, refuses):
    (tmp_path / "images" / records[1]["image"]).write_text("hello")

    place = f"data.json, record 2 (id {records[1]['id']})"
    refuses(data(records), place, "not an image")
    refuses([*data(records), "--explain", records[0]["id"]], place, "not an image")


def test_pairs_of_data_without_rejected_responses(records, data, refuses):
    refuses(["--by", "data", *data(records)], records[0]["id"], "--by data needs pairs")


def test_a_folder_without_a_reward_model(tmp_path, records, data, refuses):
    """It is found before anything is sampled."""
    folder = tmp_path / "none"
    words = [*data(records), "--keep", ".5", "--by-score", f"reward:{folder}"]
    refuses(words, f"{folder}/score.safetensors: no such file; give a folder that")


def test_a_file_where_the_dropped_pairs_go(tmp_path, records, data, sample):
    dropped = tmp_path / "pairs.dropped.jsonl"
    dropped.write_text("precious")
    words = [*data(records), "--keep", ".5", "--by-score", "policy"]

    assert_refused(sample(*words, "--out", tmp_path / "pairs.jsonl"), f"{dropped}: exists already")

    assert dropped.read_text() == "precious"


def test_score_without_rejected_responses(records, data, refuses):
    refuses(["score", *data(records)], records[0]["id"], "rejected")


# --- options and files that are refused ---


def test_a_number_out_of_bounds(refuses):
    refuses(["--rho", "-1"], "--rho", "-1")


@pytest.mark.parametrize("num_words", [438, 439])
def test_a_question_that_fills_the_context(refuses, num_words):
    """No room is left for an answer: not for its first token, nor for the question's last."""
    image = TINY / "tune" / "typical" / "images" / "0001.png"
    num_tokens = num_words + 74
    expected = f"takes {num_tokens} tokens, but the model's context is 512"
    refuses(["answer", "--image", image, "--prompt", "cup " * num_words], str(image), expected)


def test_more_new_tokens_than_any_model_has(refuses):
    words = ["answer", "--image", "a.png", "--prompt", "?", "--max-new-tokens", "1000000000000"]
    refuses(words, "from 1 to 65536")


def test_an_option_of_another_command(refuses):
    refuses(["score", "--rho", "1"], "--rho")


@pytest.mark.parametrize(
    "words, option, reader",
    [
        ("--by distortion --rho .5", "--rho", "--by attention"),
        ("--by distortion --top-p .5", "--top-p", "--by attention, noise"),
        ("--noise-steps 5", "--noise-steps", "--by noise, distortion"),
        ("--by noise --rho .5", "--rho", "--by attention"),
        ("--by corrupt --similarity s", "--similarity", "--by attention, noise"),
        ("--corrupter m", "--corrupter", "--by corrupt"),
        ("--by corrupt --max-new-tokens 5", "--max-new-tokens", "--corrupter DIR"),
        ("--temperature 0 --top-p .5", "--top-p", "--temperature above 0"),
        ("--by corrupt --explain a", "--explain", "--by attention, noise"),
        ("--explain a --out f", "--out", "--explain prints one pair"),
        ("answer --image i --prompt p --seed 3", "--seed", "--temperature above 0"),
    ],
)
def test_an_option_without_effect(refuses, words, option, reader):
    refuses(words.split(), option, reader)


@pytest.mark.parametrize("command", ["pairs", "score"])
def test_a_system_text_without_effect(records, data, refuses, command):
    for record in records:
        record["system"] = "Name positions."
        record["rejected"] = "A cup."
    words = [command, *data(records), "--system", "Be brief."]
    refuses(words, "--system has no effect: each of the 3 records has a system text of its own")


def test_an_unknown_record_to_explain(records, data, refuses):
    refuses([*data(records), "--explain", "x"], "--explain x", "3 records", records[0]["id"])


def test_a_path_that_is_not_utf8(refuses):
    refuses(["answer", "--image", "\udcff.png", "--prompt", "?"], "not UTF-8")


@pytest.mark.parametrize(
    "image, expected",
    [
        ("gone.png", "gone.png: no such image; give another --image"),
        ("https://example.org/a.png", "is an address or the image itself; give the name of a file"),
    ],
)
def test_an_image_that_is_no_file(refuses, image, expected):
    """There is no folder of images that could be wrong. Nothing else is printed."""
    refuses(["answer", "--image", image, "--prompt", "?"], expected)


def test_resume_without_a_file(refuses):
    refuses(["--resume"], "--resume", "--out")


def test_a_place_that_cannot_be_written(refuses):
    """This is found when the first file is written."""
    words = ["--limit", "2", "--out", "/dev/null/pairs.jsonl"]
    refuses(words, "/dev/null", "--out")


def test_an_input_as_output(tmp_path, records, data, refuses):
    words = ["score", *data(records), "--out", tmp_path / "data.json"]
    refuses(words, "data.json", "exists already")


def test_an_image_where_the_contact_sheet_goes(tmp_path, refuses):
    """The sheet has the name of the pairs with the ending .png."""
    photo = tmp_path / "photo.png"
    photo.write_text("precious")

    words = ["pairs", "--limit", "1", "--out", tmp_path / "photo.jsonl"]
    refuses(words, f"sample.py: {photo}: exists already; give another --out")

    assert photo.read_text() == "precious"


def test_a_model_without_a_tokenizer(tmp_path, refuses):
    shutil.copytree(TINY / "model", tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    refuses(["--model", tmp_path / "model"], "tokenizer.json")
