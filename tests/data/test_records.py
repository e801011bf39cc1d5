"""Records are read from several files, checked against their images, and limited at random."""

import json

import pytest
from data_folder import EXAMPLES, DataFolder, annotation, changed, conversation, llava, vlfeedback

from minialign.data.records import Record, check_record_images, read_records
from minialign.utils.files import InputError


@pytest.fixture()
def folder(tmp_path):
    return DataFolder(tmp_path)


# Prompts and images.


@pytest.mark.parametrize(
    "prompt",
    [3, [{"role": "assistant", "content": "What?"}], "  ", [], ["What?", "A cup."], ["What?", 3]],
)
def test_a_prompt_that_is_no_text_is_refused(folder, prompt):
    pair = {
        "id": "7",
        "image": "a.png",
        "prompt": prompt,
        "chosen": "A cup.",
        "rejected": "A dog.",
    }
    assert "prompt" in folder.error_of(pair)


def test_earlier_answers_are_cleaned_like_the_last_one(folder):
    """The same answer has the same ids wherever it stands. Exported data has its end tokens."""
    texts = ("What is it?", " A cup.</s> ", "Where? ", "there <|im_end|>\n", "Sure?", " Yes </s> ")

    (record,) = folder.read(llava(conversations=conversation(*texts)))

    assert record.turns == ("<image>\nWhat is it?", "A cup.", "Where? ", "there", "Sure?")
    assert record.chosen == "Yes"


def test_an_earlier_answer_of_an_end_token_alone_is_refused(folder):
    turns = conversation("What is it?", " </s>", "Where?", "There.")
    assert "an earlier answer is empty" in folder.error_of(llava(conversations=turns))


def test_images_are_next_to_the_file_or_in_a_given_folder(folder):
    image_folder = folder.path / "other"
    image_folder.mkdir()
    (image_folder / "c.png").touch()

    (record,) = folder.read(llava(image="c.png"), image_folder=image_folder)

    assert record.paths == (str(image_folder / "c.png"),)
    assert "--images" in folder.error_of(llava(image="c.png"))


def test_a_lone_surrogate_is_named(folder):
    message = folder.error_of(llava(conversations=conversation("What?", "A \ud83d.")))
    assert "lone surrogate" in message


# Records without an image.

TEXT_ONLY = changed(llava(id="8"), image=None, conversations=conversation("Hello?", "Hello."))


@pytest.mark.parametrize("image", [None, "", []])
def test_records_without_an_image_are_refused_or_left_out(folder, image, capsys):
    """llava_v1_5_mix665k has such records among the others."""
    records = [llava(), {**TEXT_ONLY, "image": image}, llava(id="9", image="b.png"), TEXT_ONLY]

    message = folder.error_of(*records)
    assert "record 2 (id 8)" in message
    assert "2 of 4 records" in message
    assert "--skip-text-only" in message

    read = folder.read(*records, skip_text_only=True)
    assert [record.id for record in read] == ["7", "9"]
    (note,) = capsys.readouterr().err.splitlines()
    assert note == f"{folder.path / 'data.json'}: 2 of 4 records left out, they name no image"


def test_records_without_an_image_may_come_first_in_every_format(folder):
    """They do not decide for the file, although their fields are fewer."""
    for format, record in EXAMPLES.items():
        if format in ("llama-factory", "trl", "trl-implicit"):
            continue  # their example has the placeholder, which asks for an image
        text = json.dumps(record).replace("<image>", "")
        text_only = json.loads(text.replace('"a.png"', "null"))
        (read,) = folder.read(text_only, record, text_only, skip_text_only=True)
        assert read.paths == (folder.image_path("a.png"),)


def test_a_placeholder_without_an_image_is_an_error(folder):
    broken = changed(llava(), image=None)
    for skip in (False, True):
        message = folder.error_of(broken, skip_text_only=skip)
        assert "names an image for the <image>" in message


def test_a_broken_image_of_a_record_that_no_file_has_is_named_by_its_id(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("no image")
    turns = ("<image>\nWhat is there?",)
    record = Record(id="7", image="a.png", paths=(str(path),), turns=turns, chosen="A cup.")

    with pytest.raises(InputError, match=r"^record 7: .*a\.png"):
        check_record_images([record])


def test_records_that_are_all_left_out_are_refused(folder):
    assert "no record is left" in folder.error_of(TEXT_ONLY, skip_text_only=True)


def test_the_first_record_without_an_image_is_named_on_one_line(folder):
    assert "(id two lines)" in folder.error_of({**TEXT_ONLY, "id": "two\nlines"})


# Ids.


@pytest.mark.parametrize("id, read_id", [(0, "0"), (7, "7"), ("7", "7"), (2.5, "2.5")])
def test_ids_are_texts_or_numbers(folder, id, read_id):
    (record,) = folder.read(llava(id=id))
    assert record.id == read_id


def test_shared_ids_are_counted(folder, capsys):
    """LLaVA-Instruct repeats the id of an image. 7 and "7" are the same id."""
    other = llava(id=7, conversations=conversation("How many?", "Two."))
    assert len(folder.read(llava(), other)) == 2
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("1 of 2 records have the id of an earlier one with another prompt")


# Several files and many records.


def test_several_files_come_in_order(folder):
    one = folder.write([llava(id="1")], "one.json")
    two = folder.write([llava(id="2")], "two.json")
    records = read_records([two, one], None)
    assert [record.id for record in records] == ["2", "1"]


def test_limit_is_a_seeded_subset_in_file_order(folder):
    raw_records = []
    for i in range(30):
        turns = conversation(f"What is {i}?", "A cup.")
        raw_records.append(llava(id=str(i), conversations=turns))

    def read_ids(**options):
        return [record.id for record in folder.read(*raw_records, **options)]

    all_ids = read_ids()
    ids = read_ids(limit=10, seed=0)
    assert len(ids) == 10
    assert set(ids) < set(all_ids)
    assert ids == sorted(ids, key=all_ids.index)
    assert ids != all_ids[:10]
    assert read_ids(limit=10, seed=0) == ids
    assert read_ids(limit=10, seed=1) != ids
    assert read_ids(limit=99) == all_ids


def test_a_record_without_an_id_has_the_same_name_from_everywhere(folder, monkeypatch):
    """Draws depend on (seed, record id, round), and not on the folder a command is started from."""
    (record,) = folder.read(llava(id=None))
    monkeypatch.chdir(folder.path)
    (record_from_inside,) = read_records(["data.json"], None)
    assert record.id == record_from_inside.id


# Notes on standard error.


def test_repeated_prompts_are_counted(folder, capsys):
    """The same question about the same image, whatever the answers are."""
    pair = EXAMPLES["internvl"]
    other_image = changed(pair, image="b.png")
    other_answer = changed(pair, chosen="A mug.")
    other_question = changed(pair, question="Which?")

    records = folder.read(pair, other_image, other_answer, other_question, pair)

    assert len(records) == 5
    notes = capsys.readouterr().err.splitlines()
    assert notes[0] == "2 of 5 records have the images and the prompt of an earlier one"


def test_notes_go_to_standard_error(folder, capsys):
    folder.read(llava(), llava())
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "1 of 2 records have the images and the prompt of an earlier one\n"


def test_a_file_of_ties_alone_is_refused(folder):
    tie = vlfeedback(annotation(h="2"), annotation(h="2"))
    assert "ties" in folder.error_of(tie)


# Bad files.


@pytest.mark.parametrize(
    "text, problem",
    [
        ('[{"id": "7", "ima', "complete"),
        ("{}", "no known format"),
        ("[]", "list"),
        ('"x"', "list"),
        ("", "holds no records"),
    ],
)
def test_bad_files_are_named(folder, text, problem):
    path = folder.path / "data.json"
    path.write_text(text)
    assert problem in error_of_file(path)


def error_of_file(path):
    """Return the message with which a file is refused, one line that names the file."""
    with pytest.raises(InputError) as error:
        read_records([path], None)
    message = str(error.value)
    assert path.name in message
    assert "\n" not in message
    return message


def test_missing_torn_and_foreign_files(folder):
    torn = folder.path / "torn.jsonl"
    torn.write_text(json.dumps(llava()) + '\n\n{"id": "8", "im')
    latin = folder.path / "latin.json"
    latin.write_bytes('["é"]'.encode("latin-1"))

    assert "no such file" in error_of_file(folder.path / "none.json")
    assert "line 3" in error_of_file(torn)
    assert "UTF-8" in error_of_file(latin)
    assert "cannot be read" in error_of_file(folder.path / "images")


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.txt"])
@pytest.mark.parametrize("byte_order_mark", ["", "\ufeff"])
def test_lists_and_lines_are_read_under_every_name(folder, name, byte_order_mark):
    """The content decides, as for the questions of POPE."""
    path = folder.path / name
    records = [llava(), llava(id="8")]
    lines = "\n".join(json.dumps(record) for record in records)
    for text in (json.dumps(records), json.dumps(records, indent=2), lines):
        path.write_text(byte_order_mark + text, encoding="utf-8")
        assert [record.id for record in read_records([path], None)] == ["7", "8"]


def test_missing_values_of_pandas_say_nothing(folder):
    """Pandas writes NaN, which is not JSON, where a record lacks a field."""
    path = folder.path / "data.json"
    with_nan = {**llava(), "rejected": float("nan")}
    path.write_text(json.dumps([with_nan]))
    (record,) = read_records([path], None)
    assert record.rejected is None


def test_json_lines_end_at_line_feeds_only(folder):
    """A JSON string may contain U+2028, U+0085 and others, where str.splitlines would cut it."""
    text = "one\u2028two\x85three\u2029four"
    pair = {"id": "7", "image": "a.png", "prompt": "What?", "chosen": text, "rejected": "A dog."}
    (record,) = folder.read(pair, name="pairs.jsonl")
    assert record.chosen == text
