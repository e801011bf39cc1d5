"""The words of an answer, with what the picture adds to them."""

import pytest
from report_runs import PageReader, caption_line, write_run

from minialign.report.chosen_reliance import write_reliance
from minialign.report.reliance_words import reliance_of, reliance_words, shaded_word
from minialign.report.run_files import read_run


@pytest.mark.parametrize(
    "nats, instead, shown, style",
    [
        (0.1, "cup", "cup", None),
        (0.1, "pen", "cuppen", "word adds-0"),
        (3.2, "cup", "cup+3.2", "word adds-3"),
        (-7.0, "pen", "cup−7.0pen", "word takes-4"),
    ],
)
def test_a_word_shows_what_differs_without_the_picture(nats, instead, shown, style):
    page = PageReader(shaded_word("cup", nats, instead))

    assert page.text == shown
    assert page.elements[0][1].get("class") == style


def test_words_join_to_the_answer():
    texts = ["A", " cup", ".", ""]
    words = [{"text": text, "nats": 0.0, "instead": text} for text in texts]

    assert PageReader(reliance_words(words)).text == "word by word:A cup. "


def test_a_run_keeps_the_words_of_the_pictures_that_it_shows(tmp_path, vlm):
    """They join to the answer that was kept."""
    line = caption_line(base="a dog", aligned="There is a red cup.")
    folder = write_run(tmp_path / "run", captions=[line])

    write_reliance(folder, vlm)

    run = read_run(folder)
    words = reliance_of(run, line)
    assert run.reliance[0]["prompt"] == line["prompt"]
    assert "".join(word["text"] for word in words) == "There is a red cup."
    assert [word["text"] for word in words][:3] == ["There", " is", " a"]


@pytest.mark.parametrize("has_prompts", [True, False])
def test_an_image_with_two_prompts_has_the_words_of_each_answer(tmp_path, has_prompts):
    """Runs of earlier versions did not write the prompt. Then the words tell the answer."""
    lines = []
    rows = []
    for prompt, answer in (("First?", "a cup"), ("Second?", "a dog")):
        lines.append(caption_line(base="a dog", aligned=answer) | {"prompt": prompt})
        row = {"set": "typical", "image": "0001.png", "words": [{"text": answer}]}
        rows.append(row | ({"prompt": prompt} if has_prompts else {}))
    run = read_run(write_run(tmp_path / "run", captions=lines, reliance=rows))

    assert [reliance_of(run, line)[0]["text"] for line in lines] == ["a cup", "a dog"]
    assert reliance_of(run, lines[0] | {"image": "0002.png"}) == []


def test_a_run_without_captions_keeps_no_words(tmp_path, vlm):
    folder = write_run(tmp_path / "run")

    write_reliance(folder, vlm)

    assert read_run(folder).reliance == []
