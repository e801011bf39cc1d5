"""Every published format gives the same Record, and is told from the others by its fields."""

from pathlib import Path

import pytest
from data_folder import (
    EXAMPLES,
    DataFolder,
    annotation,
    changed,
    conversation,
    llava,
    vlfeedback,
)

from minialign.data.formats import FORMATS
from minialign.data.records import Record, read_records
from minialign.utils.files import InputError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture()
def folder(tmp_path):
    return DataFolder(tmp_path)


# Which format a record has.


def test_every_format_has_an_example_and_a_line_in_the_readme():
    assert set(EXAMPLES) == set(FORMATS)
    readme = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    for name in FORMATS:
        assert f"`{name}`" in readme


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("format", EXAMPLES)
def test_every_format_is_detected_or_named(folder, format, name):
    """A format gives the same Record from JSON and JSONL, whether it is detected or named."""
    image = "a.png"
    if "images" in EXAMPLES[format]:
        image = ["a.png"]
    rejected = "A dog."
    if format == "llava":
        rejected = None
    expected = Record(
        id="7",
        image=image,
        paths=(folder.image_path("a.png"),),
        turns=("<image>\nWhat is it?",),
        chosen="A cup.",
        rejected=rejected,
    )
    example = EXAMPLES[format]

    detected = folder.read(example, example, name=name)
    named = folder.read(example, example, name=name, format=format)

    assert detected == [expected, expected]
    assert named == [expected, expected]


@pytest.mark.parametrize("other", EXAMPLES)
@pytest.mark.parametrize("format", EXAMPLES)
def test_a_record_of_another_format_is_refused(folder, format, other):
    """The first record decides for its file. A record of another format is refused by name."""
    if other != format:
        message = folder.error_of(EXAMPLES[format], EXAMPLES[other])
        assert f"record 2 (id 7): looks like {other}, expected {format} (" in message
        assert "--format" in message


def test_files_of_several_formats_are_joined(folder, capsys):
    paths = []
    for format, record in EXAMPLES.items():
        paths.append(folder.write([record], f"{format}.json"))

    records = read_records(paths, None)

    assert [record.rejected for record in records] == [None] + ["A dog."] * 11
    notes = capsys.readouterr().err.splitlines()
    assert notes == ["11 of 12 records have the images and the prompt of an earlier one"]


def test_a_named_format_reads_the_fields_that_it_needs(folder):
    """POVID's records are those of LLaVA-Instruct and more. Named so, they are supervised data."""
    assert folder.read(EXAMPLES["povid"], format="llava") == folder.read(EXAMPLES["llava"])

    message = folder.error_of(EXAMPLES["llava"], format="povid")
    assert "record 1 (id 7), read as povid: no field 'rejected_conversations'" in message

    with pytest.raises(InputError, match="'nlf'.*" + ".*".join(FORMATS)):
        folder.read(llava(), format="nlf")


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"id": 1},
        {"question_id": 1, "image": "a.png", "text": "Is there a cup?", "label": "yes"},
        {"train": [llava()], "test": [llava()]},
        {"image": "a.png", "question": None},
    ],
)
def test_a_record_of_no_known_format_is_refused(folder, record):
    """The message lists the formats by the fields that identify them."""
    message = folder.error_of(record)
    assert "record 1" in message
    assert "vlfeedback (prompt, completions)" in message


@pytest.mark.parametrize("record", [[], 3, None])
def test_a_record_that_is_no_object_is_refused(folder, record):
    message = folder.error_of(record)
    assert "record 1" in message
    assert "not a JSON object" in message


# What single formats mean.


def test_llava_instruct(folder):
    (record,) = folder.read(llava())
    assert record == Record(
        id="7",
        image="a.png",
        paths=(folder.image_path("a.png"),),
        turns=("<image>\nWhat is it?",),
        chosen="A cup.",
        rejected=None,
    )


def test_several_turns_keep_their_context(folder):
    """The last answer is scored. What came before is context."""
    texts = ("What is it?\n<image>", "A cup.", "Which color?", "Red.")

    (record,) = folder.read(llava(conversations=conversation(*texts)))

    assert record.turns == ("<image>\nWhat is it?", "A cup.", "Which color?")
    assert record.chosen == "Red."


def test_a_rejected_answer_to_another_question_is_refused(folder):
    """Both answers are scored after the chosen conversation, so they must answer one question."""
    other = conversation("<image>\nHow many are there?", "Three.")
    assert "different prompts" in folder.error_of(llava(rejected_conversations=other))


@pytest.mark.parametrize("last_turn", [(), ("replaced",)])
def test_llava_rlhf_has_its_outputs_after_the_last_question(folder, last_turn):
    """In the published file a last gpt turn stands in the place of the outputs."""
    turns = conversation("What?", "A pot.", "Which?", *last_turn)

    (record,) = folder.read(changed(EXAMPLES["llava-rlhf"], preference=1.0, conversations=turns))

    assert record.turns == ("<image>\nWhat?", "A pot.", "Which?")
    assert record.chosen == "A dog."
    assert record.rejected == "A cup."


@pytest.mark.parametrize(
    "annotations, best, worst",
    [
        # Mean ratings 2, 3 and 1.5.
        (
            [annotation(h="1", v="3"), annotation(h="N/A", v="3"), annotation(h="2", v="1")],
            "B.",
            "C.",
        ),
        # Mean ratings 3.67, 3.83 and 2.
        (
            [
                annotation(h="5", e="5", v="1"),
                annotation(h="4", e="3.5", v="4"),
                annotation(h=2, e="N/A", v=""),
            ],
            "B.",
            "C.",
        ),
        # A response without ratings is no candidate.
        ([annotation(h="N/A"), annotation(h="4"), annotation(h="5")], "C.", "B."),
        # Of two best ones the first counts.
        ([annotation(h="4"), annotation(h="4"), annotation(h="2")], "A.", "C."),
    ],
)
def test_vlfeedback_takes_best_against_worst(folder, annotations, best, worst, capsys):
    """Ratings of aspects are averaged where they are numbers."""
    (record,) = folder.read(vlfeedback(*annotations))
    assert (record.chosen, record.rejected) == (best, worst)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "annotations",
    [
        [annotation(h="4", v="2"), annotation(h="2", v="4"), annotation(e="3")],
        [annotation(h="4"), annotation(h="N/A"), annotation(h="nan", v="inf")],
        [annotation(h="N/A"), {}, {"Helpfulness": None}],
        [],
    ],
)
def test_vlfeedback_without_a_better_response_is_a_tie(folder, annotations, capsys):
    """Ties are left out and counted."""
    ranked = vlfeedback(annotation(h="2"), annotation(h="1"))
    ranked["id"] = "6"

    (record,) = folder.read(ranked, vlfeedback(*annotations))

    assert (record.id, record.chosen, record.rejected) == ("6", "A.", "B.")
    notes = capsys.readouterr().err.splitlines()
    path = folder.path / "data.json"
    expected = f"{path}: 1 of 2 records left out, their responses are tied, the same or unrated"
    assert notes == [expected]


def test_internvl_takes_several_images(folder):
    two_images = changed(EXAMPLES["internvl"], image=["a.png", "b.png"])

    (record,) = folder.read(two_images)
    assert record.paths == (folder.image_path("a.png"), folder.image_path("b.png"))
    assert record.turns == ("<image>\n<image>\nWhat is it?",)

    (record,) = folder.read(changed(two_images, question="Is <image> like <image>?"))
    assert record.turns == ("Is <image> like <image>?",)

    assert "2 in all" in folder.error_of(changed(two_images, question="<image>\nWhat is it?"))


def test_trl_messages_in_parts_and_in_turns(folder):
    """Parts keep their order. Contents that are texts get the placeholders in front."""
    image = {"type": "image"}
    text = {"type": "text", "text": "Same?"}
    contents = {
        "<image>\n<image>\nSame?": [image, image, text],
        "<image>\nSame?\n<image>": [image, text, image],
    }
    for question, content in contents.items():
        assert trl_turns(folder, content) == (question, "No.", "Same?")
    assert trl_turns(folder, "Same?") == ("<image>\n<image>\nSame?", "No.", "Same?")


def trl_turns(folder, content):
    """Return the turns of a TRL record about two images whose first message has this content."""
    prompt = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": [{"type": "text", "text": "Same?"}]},
    ]
    record = changed(EXAMPLES["trl"], images=["a.png", "b.png"], prompt=prompt)
    (record,) = folder.read(record)
    assert len(record.paths) == 2
    return record.turns


def test_trl_messages_of_other_roles_and_numbers_are_refused(folder):
    example = EXAMPLES["trl"]
    tool_message = {"role": "tool", "content": "[]"}
    with_tool_message = changed(example, prompt=[tool_message, *example["prompt"]])
    assert "turn 1 of 'prompt'" in folder.error_of(with_tool_message)

    two_answers = changed(example, chosen=example["chosen"] * 2)
    assert "turn 1 of 'chosen'" in folder.error_of(two_answers)


def test_sampled_pairs_without_another_answer_are_ties(folder, capsys):
    """BDHS writes a pair for every record, also where no round gave another response."""
    pair = EXAMPLES["pairs"]
    same = changed(pair, rejected="A cup.")
    empty = changed(pair, rejected="")

    records = folder.read(pair, same, empty)

    assert len(records) == 1
    (note,) = capsys.readouterr().err.splitlines()
    assert "2 of 3 records left out" in note
    assert "data.json" in note


def test_vlfeedback_has_its_completions_in_a_list_or_in_lists(folder):
    """Parquet files give a list of structs, older versions of datasets two lists."""
    record = EXAMPLES["vlfeedback"]
    completions = record["completions"]
    structs = []
    for response, annotated in zip(
        completions["response"], completions["annotations"], strict=True
    ):
        structs.append({"response": response, "annotations": annotated, "model": "x"})

    assert folder.read({**record, "completions": structs}) == folder.read(record)

    structs[1] = {"response": "A dog."}
    assert "no field 'annotations'" in folder.error_of({**record, "completions": structs})
    assert folder.error_of({**record, "completions": ["A dog."]})


# Fields that several formats share.


def test_fields_that_name_different_images_are_refused(folder):
    pair = EXAMPLES["internvl"]
    assert folder.read({**pair, "images": ["a.png"]})
    assert "'image' and 'images'" in folder.error_of({**pair, "images": ["b.png"]})
    assert "'image' and 'images'" in folder.error_of({**pair, "images": ["a.png", "b.png"]})

    # The image itself beside its name, as in parquet files.
    picture = {"bytes": None, "path": "b.png"}
    (record,) = folder.read({**EXAMPLES["rlaif-v"], "image": picture})
    assert record.image == "a.png"
    assert "data/README.md" in folder.error_of({**pair, "image": picture})
    assert "data/README.md" in folder.error_of({**pair, "image": [picture]})
