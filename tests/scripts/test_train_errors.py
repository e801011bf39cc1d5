"""Input that train.py refuses: one line that names file, record and remedy, and status 2."""

import json
import shutil
from functools import partial

import pytest
from conftest import TINY
from PIL import Image
from running import BRIEF, assert_refused, brief, run_inside, write_json
from safetensors.torch import load_file, save_file

from minialign.training import run_folder


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """Return a function that runs train.py inside this process, in an empty working directory."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return partial(run_inside, monkeypatch, capfd, "train.py")


@pytest.fixture
def refuses(tmp_path, train):
    """Return a function that runs train.py and asserts that it refuses before any work.

    Nothing but the one line is printed, and no folder is made.
    """

    def assert_train_refuses(words, *expected):
        outcome = train(*words, "--out", tmp_path / "out")
        assert_refused(outcome, *expected)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "work" / "runs").exists()

    return assert_train_refuses


def copy_images(records, folder):
    """Copy the images of records to folder/images."""
    (folder / "images").mkdir()
    for record in records:
        shutil.copy(TINY / "train" / "images" / record["image"], folder / "images")


@pytest.fixture
def supervised(tmp_path):
    """Return three supervised records, whose images lie in tmp_path/images."""
    records = json.loads((TINY / "train" / "instruct.json").read_text())[:3]
    copy_images(records, tmp_path)
    return records


@pytest.fixture
def pairs(tmp_path):
    """Return three records with rejected responses, whose images lie in tmp_path/images."""
    records = json.loads((TINY / "train" / "povid.json").read_text())[:3]
    copy_images(records, tmp_path)
    return records


@pytest.fixture
def data(tmp_path):
    """Return a function that writes records to tmp_path/data.json and returns its options.

    There are no evaluation sets, which would be read first.
    """

    def write(records):
        return ["--data", write_json(tmp_path / "data.json", records), "--eval"]

    return write


def save_cut_jpeg(image, path):
    """Save an image as a JPEG whose end is missing. Its header is complete, so it can be opened."""
    Image.open(image).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-500])


# --- evaluation sets ---


def test_a_question_of_an_evaluation_set_that_cannot_be_asked(tmp_path, supervised, data, refuses):
    """Another set would be asked first, and the run would end when the turn comes to this one."""
    folder = tmp_path / "own"
    folder.mkdir()
    copy_images(supervised, folder)
    question = {"image": supervised[0]["image"], "text": "USER: Why?", "label": "yes"}
    write_json(folder / "pope_own.json", [question])
    refuses([*data(supervised), folder], "pope_own.json, record 1: the question is written in")


# --- images ---


def test_a_missing_image(supervised, data, refuses):
    supervised[1]["image"] = "gone.png"
    refuses(data(supervised), "data.json", "record 2", "gone.png", "--images")


def test_a_file_that_is_no_image(tmp_path, supervised, data, refuses):
    (tmp_path / "images" / "text.png").write_text("not an image")
    supervised[0]["image"] = "text.png"
    refuses(data(supervised), "data.json, record 1", "text.png", "convert")


def test_an_image_that_is_cut_short(tmp_path, supervised, data, refuses):
    content = (tmp_path / "images" / supervised[0]["image"]).read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(content[: len(content) // 2])
    supervised[0]["image"] = "cut.png"
    refuses(data(supervised), "cut.png", "complete")


def test_an_image_whose_header_is_complete(tmp_path, supervised, data, refuses):
    folder = tmp_path / "images"
    save_cut_jpeg(folder / supervised[0]["image"], folder / "late.jpg")
    supervised[0]["image"] = "late.jpg"
    refuses(data(supervised), "data.json, record 1", "late.jpg", "complete")


def test_a_cut_image_of_the_data_is_found_before_any_work(
    tmp_path, supervised, data, refuses, monkeypatch
):
    """The last image is decoded before anything is written or evaluated."""
    folder = tmp_path / "images"
    save_cut_jpeg(folder / supervised[2]["image"], folder / "late.jpg")
    supervised[2]["image"] = "late.jpg"
    monkeypatch.setattr(run_folder.RunFolder, "start", lambda *_: pytest.fail("the run started"))
    refuses(data(supervised), "late.jpg", "complete")


def test_a_cut_image_of_an_evaluation_set_is_found_before_any_work(
    tmp_path, supervised, refuses, monkeypatch
):
    folder = tmp_path / "images"
    save_cut_jpeg(folder / supervised[0]["image"], folder / "late.jpg")
    question = {"image": "late.jpg", "text": "Is there a cup?", "label": "yes"}
    write_json(tmp_path / "pope_random.jsonl", question)
    monkeypatch.setattr(run_folder.RunFolder, "start", lambda *_: pytest.fail("the run started"))
    refuses(["--limit", "2", "--eval", tmp_path], "pope_random.jsonl, record 1", "late.jpg")


# --- records ---


def test_a_data_file_that_is_cut_short(tmp_path, supervised, refuses):
    path = write_json(tmp_path / "data.json", supervised)
    path.write_text(path.read_text()[:300])
    refuses(["--data", path], "data.json", "line 1", "complete")


def test_a_folder_instead_of_a_data_file(tmp_path, refuses):
    refuses(["--data", tmp_path], tmp_path, "directory")


def test_a_record_without_conversations(supervised, data, refuses):
    del supervised[1]["conversations"]
    refuses(data(supervised), "data.json", "record 2", "conversations")


def test_an_empty_answer(supervised, data, refuses):
    supervised[1]["conversations"][1]["value"] = "  "
    refuses(data(supervised), "data.json", "record 2", "empty", "remove")


def test_a_prompt_that_is_too_long(supervised, data, refuses):
    """The context of the tiny model is 512."""
    supervised[1]["conversations"][0]["value"] = "<image>\n" + "cup " * 600
    refuses(data(supervised), supervised[1]["id"], "512", "shorten")


def test_a_rejected_response_that_equals_the_chosen_one(pairs, data, refuses):
    pairs[1]["rejected_conversations"] = pairs[1]["conversations"]
    expected = ("data.json", "record 2", pairs[1]["id"], "same")
    refuses(["--method", "dpo", *data(pairs)], *expected)
    refuses(["--method", "reward", *data(pairs)], *expected)


@pytest.mark.parametrize("method", ["dpo", "mixed-dpo", "distortion", "reward", "rloo", "ppo"])
def test_a_method_on_pairs_without_rejected_responses(supervised, data, refuses, method):
    words = ["--method", method, *data(supervised)]
    refuses(words, supervised[0]["id"], "rejected", method)


def test_gamma_without_rejected_responses(supervised, data, refuses):
    """Eq. 5 averages over the rejected response of the data and the sampled one."""
    words = ["--method", "online-bdhs", "--gamma", ".5", *data(supervised)]
    refuses(words, supervised[0]["id"], "rejected")


def test_an_unknown_format(pairs, data, refuses):
    refuses(["--format", "xml", *data(pairs)], "--format", "xml", "povid")


def test_another_format(pairs, data, refuses):
    expected = ("data.json", "record 1", "rlhf-v", "'text'")
    refuses(["--format", "rlhf-v", *data(pairs)], *expected)


# --- options ---


@pytest.mark.parametrize(
    "option, value, bounds",
    [
        ("--beta", "0", "above 0"),
        ("--beta", "-.1", "above 0"),
        ("--rho", "1.01", "from 0 to 1"),
        ("--rho", "-.1", "from 0 to 1"),
        ("--rounds", "0", "at least 1"),
        ("--mix", "1.5", "from 0 to 1"),
        ("--mix", "-1", "from 0 to 1"),
        ("--gamma", "1.5", "from 0 to 1"),
        ("--gamma", "-1", "from 0 to 1"),
        ("--noise-steps", "0", "from 1 to 999"),
        ("--noise-steps", "1000", "from 1 to 999"),
        ("--lr", "inf", "above 0"),
        ("--lora-rank", "100000000", "from 0 to 65536"),
    ],
)
def test_a_number_out_of_bounds(refuses, option, value, bounds):
    refuses([option, value], option, value, bounds)


def test_an_unknown_option(refuses):
    refuses(["--colour", "red"], "--colour", "--help")


@pytest.mark.parametrize("method", ["magic", "kto"])
def test_an_unknown_method(refuses, method):
    refuses(["--method", method], method, "bdhs", "rloo")


def test_a_path_that_is_not_utf8(refuses):
    refuses(["--data", "d\udcff/povid.json"], "not UTF-8")


def test_resume_without_a_folder(train):
    assert_refused(train("--resume"), "--resume", "--out")


@pytest.mark.parametrize("place", ["run", "run/adapter"])
def test_an_export_into_the_folder_of_the_run(tmp_path, train, place):
    folder = tmp_path / "run"
    export = tmp_path / place

    outcome = train(*BRIEF, "--out", folder, "--export", export)

    line = f"{export}: lies inside the folder of the run, {folder}; give another --export"
    assert outcome.status == 2
    assert outcome.messages[-1] == f"train.py: {line}"
    assert not folder.exists()


# --- models ---


@pytest.fixture
def model(tmp_path):
    """Return a copy of the tiny model that a test may damage."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    return tmp_path / "model"


def test_a_model_that_is_not_there(tmp_path, supervised, data, refuses):
    words = ["--model", tmp_path / "nowhere", *data(supervised)]
    refuses(words, "nowhere", "no such folder")
    words = ["--model", TINY / "model" / "config.json", *words[2:]]
    refuses(words, f"config.json: is a file; give its folder, {TINY / 'model'}")


def test_a_model_that_is_named_as_on_the_hub(refuses):
    name = "liuhaotian/llava-v1.5-7b"
    words = ["--model", name, "--data", TINY / "train" / "povid.json"]
    refuses(words, f"{name}: no such folder")


def test_a_model_without_weights(model, supervised, data, refuses):
    (model / "model.safetensors").unlink()
    refuses(["--model", model, *data(supervised)], "model.safetensors")


def test_a_template_that_the_tokenizer_does_not_know(supervised, data, refuses):
    refuses(["--template", "chatml", *data(supervised)], "chatml", "--template")


def test_a_template_without_a_place_for_a_system_text(tmp_path, supervised, data, refuses):
    """The line names the option, or the file and the record."""
    plain = write_json(tmp_path / "plain.json", {"user_turn": "{} ASSISTANT:"})
    words = ["--template", plain, *data(supervised)]
    refuses([*words, "--system", "Be brief."], "--system", "no place for the system text")
    supervised[1]["system"] = "Be brief."
    words = ["--template", plain, *data(supervised)]
    refuses(words, "data.json, record 2", "no place for the system text 'Be brief.'")


@pytest.mark.parametrize("text", ["", "  ", "<image>", "<|im_start|>system"])
def test_an_odd_system_text(supervised, data, refuses, text):
    refuses(["--system", text, *data(supervised)], "--system")


def test_a_sentence_encoder_that_is_not_there(tmp_path, supervised, data, refuses):
    words = ["--similarity", tmp_path / "none", *data(supervised)]
    refuses(words, "none", "no such folder; give the folder of a sentence encoder")


# --- reward models and annotators ---


@pytest.fixture
def wide_reward(tmp_path, reward_folder):
    """Return a copy of the reward model whose head is twice as wide as the model, 256."""
    folder = tmp_path / "wide"
    shutil.copytree(reward_folder, folder)
    head = load_file(folder / "score.safetensors")
    head["weight"] = head["weight"].repeat(1, 2)
    save_file(head, folder / "score.safetensors")
    return folder


@pytest.mark.parametrize("method", ["rloo", "ppo"])
def test_a_folder_without_a_reward_model(tmp_path, pairs, data, refuses, method):
    words = ["--method", method, "--reward", tmp_path, *data(pairs)]
    refuses(words, tmp_path / "score.safetensors")


def test_a_reward_model_of_another_width(pairs, data, refuses, wide_reward):
    words = ["--method", "rloo", "--reward", wide_reward, *data(pairs)]
    refuses(words, wide_reward / "score.safetensors", "256", "128")


@pytest.mark.parametrize("method", ["online-dpo", "mixed-dpo"])
def test_an_annotator_that_is_not_there(tmp_path, pairs, data, refuses, method):
    words = ["--method", method, "--annotator", tmp_path / "none", *data(pairs)]
    refuses(words, tmp_path / "none")


def test_a_folder_that_is_no_annotator(tmp_path, pairs, data, refuses):
    words = ["--method", "online-dpo", "--annotator", tmp_path, *data(pairs)]
    refuses(words, tmp_path, "config.json")


def test_an_annotator_that_is_no_reward_model(tmp_path, pairs, data, refuses):
    words = ["--method", "online-dpo", "--annotator", f"reward:{tmp_path}", *data(pairs)]
    refuses(words, tmp_path / "score.safetensors")


def test_an_annotator_of_another_width(pairs, data, refuses, wide_reward):
    words = ["--method", "online-dpo", "--annotator", f"reward:{wide_reward}", *data(pairs)]
    refuses(words, wide_reward / "score.safetensors", "256", "128")


def test_a_reward_annotator_without_a_folder(pairs, data, refuses):
    words = ["--method", "online-dpo", "--annotator", "reward:", *data(pairs)]
    refuses(words, "--annotator reward:: name a folder behind the colon")


def test_a_question_too_long_for_the_annotator(supervised, data, refuses):
    """It fits the policy. The annotator is asked it with its criteria, of some 300 tokens."""
    supervised[1]["conversations"][0]["value"] += " Tell me more." * 10
    words = ["--method", "online-dpo", "--annotator", TINY / "model", *data(supervised)]
    refuses(words, supervised[1]["id"], "annotator's context of 512 tokens")


@pytest.mark.parametrize("method", ["online-dpo", "mixed-dpo"])
def test_an_annotator_that_is_never_understood(tmp_path, train, method):
    """The tiny model cannot rank. The run warns in its first step and ends without an adapter."""
    folder = tmp_path / "run"
    words = [*brief(method), "--annotator", TINY / "model", "--out", folder]

    outcome = train(*words)

    assert outcome.status == 2
    warnings = [line for line in outcome.messages if "warning: no sampled pair" in line]
    assert "in 1 steps so far" in warnings[0]
    assert "not understood: " in warnings[0]
    assert outcome.messages[-1].startswith(f"train.py: {folder}/metrics.jsonl: {method} has found")
    assert "not understood: " in outcome.messages[-1]
    assert "is done" not in outcome.stdout
    assert not (folder / "adapter").exists()
    assert not (folder / "summary.json").exists()
    assert train(*words, "--resume").status == 2


def test_data_without_annotations(tmp_path, pairs, data, refuses):
    refuses(["--method", "online-dpo", *data(pairs)], tmp_path / "captions.json")


def test_an_image_without_annotation_is_found_before_any_work(
    tmp_path, pairs, data, refuses, monkeypatch
):
    """Its record may come late in the training, so all of them are looked up in advance."""
    captions = json.loads((TINY / "train" / "captions.json").read_text())
    missing = pairs[1]["image"]
    captions["captions"] = [row for row in captions["captions"] if row["image"] != missing]
    write_json(tmp_path / "captions.json", captions)
    monkeypatch.setattr(run_folder.RunFolder, "start", lambda *_: pytest.fail("the run started"))

    words = ["--method", "online-dpo", *data(pairs)]
    refuses(words, "captions.json", pairs[1]["id"], missing)
