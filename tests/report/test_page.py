"""The page as a whole: one file, safe with any text, and with a word where something is missing."""

import json
import shutil
import subprocess

import pytest
from report_runs import (
    LOG,
    SETTINGS,
    SUMMARY,
    PageReader,
    caption_line,
    scores,
    write_run,
)

from minialign.report.page import write_report
from minialign.utils.files import InputError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = (
    "a cup <script>document.title = 'hacked'</script> a dog "
    "</span></style><img src=x onerror=\"document.title='hacked'\"> {{7*7}} \u202e \x00 &lt;b&gt;"
)
EVALUATION = {
    "base": {"typical": scores(0.5)},
    "control": {"typical": scores(0.5)},
    "aligned": {"typical": scores(0.0)},
}


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """Return the path of a page about a run whose captions, names and files attack the reader."""
    folder = tmp_path_factory.mktemp("report") / "<b>run"
    lines = [caption_line(base=HOSTILE, control=HOSTILE, aligned="a cup")]
    lines[0] |= {"prompt": HOSTILE, "image": "../<img src=x>.png"}
    pair = {"id": HOSTILE, "image": HOSTILE, "prompt": HOSTILE, "chosen": HOSTILE}
    pair |= {"rejected": HOSTILE, "rounds": 1, "similarity": 0.5, "visible": [1], "seed": 0}
    pair |= {"cuts": [3], "completed": [HOSTILE[3:]]}
    words = [{"text": HOSTILE, "nats": 2.5, "instead": HOSTILE}]
    write_run(
        folder,
        {"data": [HOSTILE]},
        log=[LOG[0] | {"<script>": 1.0}, LOG[1] | {"<script>": float("nan")}],
        captions=lines,
        pairs=[pair],
        reliance=[lines[0] | {"words": words}],
        evaluation=EVALUATION,
        summary=SUMMARY,
    )
    return write_report([folder])


def test_hostile_text_stays_text(hostile_page):
    """There is no script and no other address than those of pictures inside the page."""
    page = PageReader(hostile_page.read_text(encoding="utf-8"))

    assert "<script>document.title = 'hacked'</script>" in page.text
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "link", "form", "b")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")


def test_the_page_says_what_the_models_said(hostile_page):
    page = PageReader(hostile_page.read_text(encoding="utf-8"))

    assert "not in the picture: dog" in page.text
    assert "no object is missed, and no mention is wrong" in page.text
    assert "What is missing or not finite is left out: 1 value." in page.text
    assert "+2.5" in page.text


def test_a_browser_shows_the_page(hostile_page, tmp_path):
    """Chromium reads it without a script of the captions being run."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]

    done = subprocess.run(
        [browser, *words, "--dump-dom", hostile_page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert "<title>Report of the run &lt;b&gt;run</title>" in done.stdout
    assert "<h2>Curves</h2>" in done.stdout


@pytest.mark.parametrize("method", ["sft", "rloo", "reward", "distill", "of another version"])
def test_a_run_that_kept_nothing_has_words_in_place_of_charts(tmp_path, method):
    folder = write_run(tmp_path / "run", {"method": method}, log=[])

    page = PageReader(write_report([folder]).read_text(encoding="utf-8"))

    assert "The run is not finished." in page.text
    assert "Nothing is measured yet" in page.text
    assert "There is nothing to draw" in page.text
    assert ("No answers were kept" in page.text) == (method != "reward")


def test_a_run_without_evaluation_sets_says_so(tmp_path):
    folder = write_run(tmp_path / "run", summary=SUMMARY, evaluation={"base": {}, "aligned": {}})

    page = PageReader(write_report([folder]).read_text(encoding="utf-8"))

    assert "the run had no evaluation set" in page.text
    assert "1 min 31 s in all" in page.text


def test_several_runs_stand_side_by_side(tmp_path):
    folders = []
    for beta in (0.1, 0.5):
        folder = tmp_path / f"beta {beta}"
        folders.append(write_run(folder, {"beta": beta}, evaluation=EVALUATION, summary=SUMMARY))

    path = write_report(folders, tmp_path / "both.html")

    page = PageReader(path.read_text(encoding="utf-8"))
    assert "Settings that differ" in page.text
    assert "beta0.10.5" in page.text
    assert page.text.count("Before and after") == 2
    assert "step 0\nrun 1: 0.7 loss\nrun 2: 0.7 loss" in page.text


def test_settings_without_an_effect_do_not_differ(tmp_path):
    """The loss DPO does not damage images, and distillation reads no loss."""
    settings = {
        "dpo": {"method": "dpo", "loss": "dpo", "damage": 0.9},
        "mdpo": {"method": "dpo", "loss": "mdpo", "damage": 0.9, "damage_noise": 9},
        "distill": {"method": "distill", "loss": "dpo", "damage": 0.9},
    }
    folders = [write_run(tmp_path / name, settings[name]) for name in settings]

    page = PageReader(write_report(folders).read_text(encoding="utf-8"))

    assert "lossdpomdpo-" in page.text
    assert "damage_noise-9-" in page.text
    assert "damage0.9" not in page.text


def test_a_run_that_lacks_an_option_of_today_is_compared(tmp_path):
    """It has no rank, on which the effect of alpha depends."""
    folders = []
    for alpha in (8, 16):
        settings = {"method": "dpo", "lora_alpha": alpha}
        folders.append(write_run(tmp_path / f"alpha {alpha}", settings))
        config = json.loads((folders[-1] / "config.json").read_text())
        config["settings"].pop("lora_rank", None)
        (folders[-1] / "config.json").write_text(json.dumps(config))

    page = PageReader(write_report(folders).read_text(encoding="utf-8"))

    assert "lora_alpha816" in page.text


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json; name the folder of a run"):
        write_report([tmp_path])


@pytest.mark.parametrize(
    "name, content",
    [
        ("evaluation.json", {"base": {"typical": {"chair_i": "half"}}, "aligned": {}}),
        ("evaluation.json", {"base": {"typical": [1]}, "aligned": {"typical": [1]}}),
        ("evaluation.json", {"base": [], "aligned": []}),
        ("evaluation.json", {"aligned": {"typical": {"pope": [0.5]}}}),
        ("evaluation.json", {"aligned": {"typical": {"pope": {"random": 0.5}}}}),
        ("evaluation.json", {"aligned": {"typical": {"pope": {"random": {"yes": True}}}}}),
        ("evaluation.json", {"aligned": {"typical": {"recall": float("nan")}}}),
        ("summary.json", {"steps": 3}),
        ("summary.json", SUMMARY | {"pairs": "40"}),
        ("config.json", {"settings": SETTINGS | {"method": ["bdhs"]}}),
        ("config.json", {"settings": SETTINGS | {"method": "mixed-dpo", "mix": "x", "top_p": 1}}),
        ("metrics.jsonl", [{"step": "first", "loss": 0.5}]),
        ("pairs.jsonl", [{"rejected": 1}]),
        ("reliance.jsonl", [{"words": []}]),
    ],
)
@pytest.mark.parametrize("num_others", [0, 1])
def test_a_damaged_file_is_named(tmp_path, name, content, num_others):
    """With several runs on the page, other parts of it read the file first."""
    captions = [caption_line(base="a cup", aligned="a cup")]
    others = [write_run(tmp_path / "other", {"mix": 0.1})][:num_others]
    folder = write_run(tmp_path / "run", captions=captions, summary=SUMMARY)
    lines = content if isinstance(content, list) else [content]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    folders = [*others, folder]
    with pytest.raises(InputError, match=f"run/{name}"):
        write_report(folders)
    assert not (folders[0] / "report.html").exists()


def test_a_step_that_is_no_number_is_named(tmp_path):
    folder = write_run(tmp_path / "run", log=[{"step": 0}, {"step": "first"}])

    with pytest.raises(InputError, match="metrics.jsonl, record 2: 'step' is not a number; remove"):
        write_report([folder])


def test_a_table_says_what_it_subtracts_and_of_how_many(tmp_path):
    lines = [caption_line("1.png", base="a dog", aligned="a cup")]
    pope = {"random": {"accuracy": 0.5, "yes": 0.5, "n": 1200}}
    evaluation = {name: {"typical": scores(0.5) | {"pope": pope}} for name in ("base", "aligned")}
    folder = write_run(tmp_path / "run", captions=lines, evaluation=evaluation)

    page = PageReader(write_report([folder]).read_text(encoding="utf-8"))

    assert "Set “typical”: 1 image to describe; questions of POPE: random 1,200" in page.text
    assert "aligned minus base" in page.text
    assert "before rounding" in page.text


def test_an_earlier_page_is_overwritten_and_no_other_file(tmp_path):
    """A file of the user's may be named by mistake, such as one of the run."""
    folder = tmp_path / "run"
    write_run(folder, log=LOG)
    page = write_report([folder])
    assert write_report([folder]) == page
    data = tmp_path / "data.json"
    data.write_text("[]")

    with pytest.raises(InputError, match="data.json: exists already and is no report"):
        write_report([folder], data)

    assert data.read_text() == "[]"
