"""A field that changes what a record means is refused if the record's format does not read it."""

import pytest
from data_folder import EXAMPLES, DataFolder, llava


@pytest.fixture()
def folder(tmp_path):
    return DataFolder(tmp_path)


def test_a_format_is_advised_only_if_it_reads_the_rest(folder):
    """Pairs of instruction, chosen and rejected are in no format, though they look like TRL's."""
    record = {"images": ["a.png"], "chosen": "A cup.", "rejected": "A dog."}

    message = folder.error_of(record | {"instruction": "What is it?"})

    assert "does not read 'instruction', and field 'chosen' is not a list" in message
    assert "--format" not in message
    message = folder.error_of(record | {"prompt": "What is it?", "instruction": "Be brief."})
    assert "does not read 'instruction'; --format trl leaves out such fields" in message


@pytest.mark.parametrize(
    "format, field",
    [
        ("llava", "output_2"),
        ("llava", "rejected_answer"),
        ("llava", "rejected_2"),
        ("llava", "Rejected-Response"),
        ("llava", "response_2"),
        ("llava", "negative"),
        ("llava", "label"),
        ("llava", "tools"),
        ("llava", "video"),
        ("llava", "messages"),
        ("llava", "image_2"),
        ("llava", "video_path"),
        ("llava", "kto_tag"),
        ("llava-pair", "rejected_response"),
        ("llava-pair", "rejected_conversations_2"),
        ("povid", "rejected"),
        ("llava-rlhf", "rejected"),
        ("llama-factory", "output_1"),
        ("internvl", "prompt"),
        ("internvl", "system_prompt"),
        ("rlaif-v", "rejected_1"),
        ("rlaif-v", "answer_negative"),
        ("pairs", "history"),
        ("pairs", "systemMessage"),
    ],
)
def test_a_field_that_says_what_is_learned_is_never_dropped(folder, format, field, capsys):
    """It is refused by name. Whoever names the format asks for less, and reads how much less."""
    record = EXAMPLES[format]
    with_field = {**record, field: ["x"]}
    message = folder.error_of(record, with_field)
    assert "record 2 (id 7)" in message
    assert field in message or "looks like" in message
    capsys.readouterr()

    assert folder.read(record, with_field, format=format) == folder.read(record, record)
    note = capsys.readouterr().err.splitlines()[0]
    assert f"field {field!r} of 1 of 2 records left out" in note


@pytest.mark.parametrize(
    "field",
    [
        "rejected_images",
        "rejectedImage",
        "Rejected-Image",
        "negative_images",
        "image_rejected",
        "rejected_img_path",
        "rejected_response_images",
        "rejected_image_2",
        "rejected_answer_image",
        "negative_image_1",
    ],
)
@pytest.mark.parametrize("format", ["llava-pair", "internvl", "rlaif-v", "pairs"])
def test_a_pair_about_two_images_is_refused_even_if_its_format_is_named(folder, format, field):
    """Left out, both answers would be learned about the first image."""
    record = {**EXAMPLES[format], field: ["b.png"]}

    for options in ({}, {"format": format}):
        message = folder.error_of(EXAMPLES[format], record, **options)
        assert "record 2 (id 7)" in message
        assert repr(field) in message


def test_other_images_of_an_answer_that_is_not_read_are_left_out(folder, capsys):
    """A supervised record has one answer, so its image is the only one."""
    record = llava(rejected_response="A dog.", rejected_images=["b.png"])

    assert folder.read(record, format="llava") == folder.read(llava())
    assert "field 'rejected_images' of 1 of 1 records left out" in capsys.readouterr().err


@pytest.mark.parametrize("blank", [None, "", [], {}])
def test_blank_fields_say_nothing(folder, blank):
    assert folder.read({**llava(), "output_2": blank, "system": blank}) == folder.read(llava())


def test_other_fields_may_be_there(folder):
    """Scores, names of models and the like do not change what a record says."""
    more = {"rejected_score": 1, "chosen_model": "x", "ds_name": "y", "answer": "z", "width": 3}
    more |= {"image_id": 4, "image_size": [1, 1], "output_tokens": 5, "label_smoothing": 0.1}
    for format, record in EXAMPLES.items():
        assert folder.read({**record, **more}) == folder.read(record), format


def test_an_answer_that_is_disapproved_is_not_learned(folder):
    """LLaMA-Factory writes `kto_tag: false` beside an answer, which is no blank field."""
    assert "does not read 'kto_tag'" in folder.error_of({**llava(), "kto_tag": False})


@pytest.mark.parametrize("field", ["rejected_images", "rejected_image", "image_paths"])
def test_a_field_may_name_the_images_of_the_record_again(folder, field):
    """The example in ms-swift's documentation does. Both answers are about the same image."""
    pair = EXAMPLES["llava-pair"]
    for same_images in ("a.png", ["a.png"]):
        assert folder.read({**pair, field: same_images}) == folder.read(pair)
    for other_images in ("b.png", ["b.png"], ["a.png", "b.png"]):
        assert f"does not read {field!r}" in folder.error_of({**pair, field: other_images})
