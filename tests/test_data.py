"""Readers of preference and instruction data: what they give, and one line with file, record and remedy for what is wrong."""
import json

import pytest

from minialign.data import Record, read_records
from minialign.files import BadInput


def llava(**changes):
    """A LLaVA-Instruct record of one turn, its fields replaced; None leaves a field out."""
    record = {"id": "7", "image": "a.png", "conversations": turns("<image>\nWhat is it?", " A cup. ")} | changes
    return {key: value for key, value in record.items() if value is not None}


def turns(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.fixture()
def folder(tmp_path):
    """A folder with images/a.png; readers look at names only, not into pictures."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    return tmp_path


def read(folder, *records, name="data.json", images=None, **options):
    path = folder / name
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records) if name.endswith("l") else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return read_records([path], images, **options)


def refused(folder, *records, **options):
    """The message of the BadInput: one line that names the file."""
    with pytest.raises(BadInput) as error:
        read(folder, *records, **options)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_llava_instruct(folder):
    record, = read(folder, llava())
    assert record == Record("7", "a.png", (str(folder / "images" / "a.png"),), ("<image>\nWhat is it?",), "A cup.", None)


def test_povid(folder):
    record, = read(folder, llava(rejected_conversations=turns("<image>\nWhat is it?", "A dog.")))
    assert (record.chosen, record.rejected) == ("A cup.", "A dog.")


def test_our_own_pairs_as_json_lines(folder):
    pair = {"id": "7", "image": "a.png", "prompt": "<image>\nWhat is it?", "chosen": "A cup.", "rejected": "A dog.", "rounds": 1}
    for name in ("pairs.jsonl", "pairs.json"):
        record, = read(folder, pair, name=name)
        assert (record.turns, record.chosen, record.rejected) == (("<image>\nWhat is it?",), "A cup.", "A dog.")


def test_several_turns_keep_their_context(folder):
    """The last answer is scored, what came before is context, the picture stands in the first turn."""
    record, = read(folder, llava(conversations=turns("What is it?\n<image>", "A cup.", "Which colour?", "Red.")))
    assert record.turns == ("What is it?\n<image>", "A cup.", "Which colour?") and record.chosen == "Red."


def test_a_missing_placeholder_is_put_in_front(folder):
    record, = read(folder, llava(conversations=turns("What is it?", "A cup.", "Where?", "Here.")))
    assert record.turns == ("<image>\nWhat is it?", "A cup.", "Where?")


def test_pictures_lie_in_images_beside_the_file_or_where_told(folder):
    (folder / "other").mkdir()
    (folder / "other" / "b.png").write_bytes(b"")
    assert read(folder, llava(image="b.png"), images=folder / "other")[0].paths == (str(folder / "other" / "b.png"),)
    assert "--images" in refused(folder, llava(image="b.png"))


def test_several_files_come_in_order(folder):
    for name, id in (("one.json", "1"), ("two.json", "2")):
        (folder / name).write_text(json.dumps([llava(id=id)]))
    assert [record.id for record in read_records([folder / "two.json", folder / "one.json"], None)] == ["2", "1"]


def test_limit_is_a_seeded_subset_in_file_order(folder):
    many = [llava(id=str(n)) for n in range(30)]
    whole = [record.id for record in read(folder, *many)]
    some, again, other = ([record.id for record in read(folder, *many, limit=10, seed=seed)] for seed in (0, 0, 1))
    assert some == again != other and len(some) == 10
    assert some == sorted(some, key=whole.index) and some != whole[:10] and set(some) < set(whole)
    assert [record.id for record in read(folder, *many, limit=99)] == whole


@pytest.mark.parametrize("record, told", [
    (llava(conversations=None), "conversations"),
    (llava(image=None), "image"),
    (llava(image=3), "image"),
    (llava(conversations=[]), "pairs of human and gpt"),
    (llava(conversations="text"), "pairs of human and gpt"),
    (llava(conversations=turns("What?", "A cup.", "And?")), "has 3"),
    (llava(conversations=turns("What?", "A cup.")[::-1]), "turn 1"),
    (llava(conversations=[{"from": "human", "value": "What?"}, {"from": "gpt", "value": None}]), "turn 2"),
    (llava(conversations=[{"from": "human", "value": "What?"}, "A cup."]), "turn 2"),
    (llava(conversations=turns("What?", "  ")), "chosen response is empty"),
    (llava(rejected_conversations=turns("What is it?", "")), "rejected response is empty"),
    (llava(rejected_conversations=turns("What?")), "has 1"),
    (llava(image="missing.png"), "missing.png"),
    ({"id": "7", "image": "a.png", "prompt": "What?", "chosen": "A cup."}, "rejected"),
    ({"id": "7", "image": "a.png", "prompt": "What?", "chosen": 3, "rejected": "A dog."}, "chosen"),
    (["not", "an", "object"], "not a JSON object"),
])
def test_bad_records_are_named(folder, record, told):
    """The second record is the bad one: the message has file, number, id if there is one, and what is wrong."""
    message = refused(folder, llava(), record)
    assert "record 2" in message and told in message
    assert "(id 7)" in message or not isinstance(record, dict)


@pytest.mark.parametrize("text, told", [('[{"id": "7", "ima', "complete"), ("{}", "list"), ("[]", "list"), ('"x"', "list"), ("", "complete")])
def test_bad_files_are_named(folder, text, told):
    (folder / "data.json").write_text(text)
    with pytest.raises(BadInput, match=told) as error:
        read_records([folder / "data.json"], None)
    assert "data.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_torn_and_foreign_files(folder):
    (folder / "torn.jsonl").write_text(json.dumps(llava()) + '\n\n{"id": "8", "im')
    (folder / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    for path, told in ((folder / "none.json", "no such file"), (folder / "torn.jsonl", "line 3"), (folder / "latin.json", "UTF-8"), (folder / "images", "cannot be read")):
        with pytest.raises(BadInput, match=told) as error:
            read_records([path], None)
        assert path.name in str(error.value) and "\n" not in str(error.value)


def test_json_lines_end_at_line_feeds_only(folder):
    """U+2028, U+0085 and others may stand raw in a JSON string; str.splitlines would tear the record there."""
    text = "one\u2028two\x85three\u2029four"
    record, = read(folder, {"id": "7", "image": "a.png", "prompt": "What?", "chosen": text, "rejected": "A dog."}, name="pairs.jsonl")
    assert record.chosen == text


@pytest.mark.parametrize("prompt", [
    3,
    [{"role": "user", "content": "What?"}],
    "  ",
])
def test_a_prompt_that_is_no_text_is_refused(folder, prompt):
    assert "prompt" in refused(folder, {"id": "7", "image": "a.png", "prompt": prompt, "chosen": "A cup.", "rejected": "A dog."})


@pytest.mark.parametrize("texts", [("<image>\n<image>\nWhat?", "A cup."), ("What?", "It is <image>.", "And?", "A cup."), ("<image>\nWhat?", "A cup.", "<image> And?", "A dog.")])
def test_more_placeholders_than_pictures_are_refused(folder, texts):
    """A record has one picture, so one <image>, and none in an answer."""
    assert "<image>" in refused(folder, llava(conversations=turns(*texts)))


def test_a_rejected_answer_to_another_question_is_refused(folder):
    """Both answers are scored after the chosen conversation's turns: the rejected one must answer the same question."""
    refused(folder, llava(rejected_conversations=turns("<image>\nHow many are there?", "Three.")))


def test_a_record_without_an_id_has_the_same_name_from_everywhere(folder, monkeypatch):
    """BDHS's draws depend on (seed, record id, round) alone: not on the folder the command was started from."""
    here, = read(folder, llava(id=None))
    monkeypatch.chdir(folder)
    there, = read_records(["data.json"], None)
    assert here.id == there.id
