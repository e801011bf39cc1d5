"""Readers of preference and instruction data: what they give, and one line with file, record and remedy for what is wrong."""

import copy
import json

import pytest

from minialign.data.formats import FORMATS
from minialign.data.records import Record, read_records
from minialign.utils.files import InputError


def llava(**changes):
    """A LLaVA-Instruct record of one turn, its fields replaced; None leaves a field out."""
    record = {
        "id": "7",
        "image": "a.png",
        "conversations": turns("<image>\nWhat is it?", " A cup. "),
    } | changes
    return {key: value for key, value in record.items() if value is not None}


def turns(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.fixture()
def folder(tmp_path):
    """A folder with images/a.png and b.png; readers look at names only, not into pictures."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    (tmp_path / "images" / "b.png").write_bytes(b"")
    return tmp_path


def read(folder, *records, name="data.json", images=None, **options):
    path = folder / name
    text = (
        "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
        if name.endswith("l")
        else json.dumps(records)
    )
    path.write_text(text, encoding="utf-8")
    return read_records([path], images, **options)


def refused(folder, *records, **options):
    """The message of the BadInput: one line that names the file."""
    with pytest.raises(InputError) as error:
        read(folder, *records, **options)
    message = str(error.value)
    assert len(message.splitlines()) == 1 and str(folder) in message
    return message


def annotation(**ratings):
    """VLFeedback's annotation of one response: h, e and v for its three aspects, each with a rationale."""
    names = {"h": "Helpfulness", "e": "Ethical Considerations", "v": "Visual Faithfulness"}
    return {
        names[key]: {"Rating": rating, "Rationale": "So it is."} for key, rating in ratings.items()
    }


def vlfeedback(*annotations, responses=("A.", "B.", "C.")):
    return {
        "id": "7",
        "prompt": "What is it?",
        "img_path": "a.png",
        "models": ["x", "y", "z"],
        "completions": {
            "annotations": list(annotations),
            "model": ["x", "y", "z"][: len(annotations)],
            "response": list(responses[: len(annotations)]),
        },
    }


# One record of every format as it is published (FORMATS.md, section 1), all asking "What is it?" about a.png, with the answers "A cup." and "A dog.".
COMPARED = {"question": "What is it?", "chosen": "A cup.", "rejected": "A dog."}
EXAMPLES = {
    "llava": llava(),
    "povid": llava(rejected_conversations=turns("<image>\nWhat is it?", "A dog.")),
    "llava-rlhf": llava(
        conversations=turns("<image>\nWhat is it?"),
        output_1={"from": "llava", "value": "A dog."},
        output_2={"from": "llava", "value": "A cup."},
        preference=2,
    ),
    "rlhf-v": {"idx": 7, "image_path": "a.png", "text": json.dumps(COMPARED)},
    "rlaif-v": {
        "ds_name": "RLAIF-V",
        "idx": 7,
        "image_path": "a.png",
        "origin_split": "{}",
        **COMPARED,
    },
    "internvl": {"id": 7, "image": "a.png", **COMPARED},
    "vlfeedback": vlfeedback(
        annotation(h="3", e="5", v="4"),
        annotation(h="2", e="5", v="1"),
        annotation(h="4", e="N/A", v="5"),
        responses=("A pot.", "A dog.", "A cup."),
    ),
    "trl": {
        "id": "7",
        "images": ["a.png"],
        "prompt": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "text": None},
                    {"type": "text", "text": "What is it?"},
                ],
            }
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cup."}]}],
        "rejected": [{"role": "assistant", "content": "A dog."}],
    },
    "pairs": {
        "id": "7",
        "image": "a.png",
        "prompt": "<image>\nWhat is it?",
        "chosen": "A cup.",
        "rejected": "A dog.",
        "rounds": 1,
        "visible": [3],
    },
}


def test_every_format_has_an_example():
    assert set(EXAMPLES) == set(FORMATS)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("format", EXAMPLES)
def test_every_format_is_recognised_or_named(folder, format, name):
    """Each published shape gives the same record, from JSON and JSONL, told by its fields or by name, alone and after others of its kind."""
    expected = Record(
        "7",
        EXAMPLES[format].get("image", ["a.png"] if format == "trl" else "a.png"),
        (str(folder / "images" / "a.png"),),
        ("<image>\nWhat is it?",),
        "A cup.",
        None if format == "llava" else "A dog.",
    )
    for named in (None, format):
        assert (
            read(folder, EXAMPLES[format], EXAMPLES[format], name=name, format=named)
            == [expected] * 2
        )


@pytest.mark.parametrize("other", EXAMPLES)
@pytest.mark.parametrize("format", EXAMPLES)
def test_a_record_of_another_format_is_refused(folder, format, other):
    """The first record decides for its file: another shape is named, or what it lacks, and never read as something else."""
    if other != format:
        message = refused(folder, EXAMPLES[format], EXAMPLES[other])
        assert (
            f"record 2 (id 7): looks like {other}, expected {format} (" in message
            and "--format" in message
        )


def test_files_of_several_formats_are_joined(folder, capsys):
    for format, record in EXAMPLES.items():
        (folder / f"{format}.json").write_text(json.dumps([record]))
    records = read_records([folder / f"{format}.json" for format in EXAMPLES], None)
    assert [record.rejected for record in records] == [None] + ["A dog."] * 8
    assert capsys.readouterr().err.splitlines() == [
        "8 of 9 records have the images and the prompt of an earlier one"
    ]


def test_a_named_format_reads_what_it_needs(folder):
    """POVID's records are LLaVA-Instruct with more: named so, they are supervised data."""
    assert read(folder, EXAMPLES["povid"], format="llava") == read(folder, EXAMPLES["llava"])
    message = refused(folder, EXAMPLES["llava"], format="povid")
    assert "record 1 (id 7), read as povid: no field 'rejected_conversations'" in message
    with pytest.raises(InputError, match="'nlf'.*" + ".*".join(FORMATS)):
        read(folder, llava(), format="nlf")


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"id": 1},
        {"question_id": 1, "image": "a.png", "text": "Is there a cup?", "label": "yes"},
        {"messages": []},
        [],
        3,
        None,
    ],
)
def test_what_no_format_has_is_refused(folder, record):
    """The message lists the formats by the fields that tell them."""
    message = refused(folder, record)
    assert "record 1" in message and (
        "not a JSON object" in message or "vlfeedback (prompt, completions)" in message
    )


@pytest.mark.parametrize("format", [format for format in EXAMPLES if format != "llava"])
def test_equal_responses_are_refused(folder, format):
    """A comparison of a text with itself, spaces around it apart, is an error: in a preference file it should not be. VLFeedback's is a tie, and counted."""
    same = json.loads(json.dumps(EXAMPLES[format]).replace("A dog.", " A cup. "))
    same.pop("rounds", None)
    if format == "vlfeedback":
        assert len(read(folder, EXAMPLES[format], same)) == 1
    else:
        assert (
            "record 2 (id 7)" in (message := refused(folder, EXAMPLES[format], same))
            and "are the same" in message
        )


def test_sampled_pairs_without_another_answer_are_ties(folder, capsys):
    """BDHS writes a pair for every record: where no round said anything else, there is nothing to prefer, and this is told."""
    pair = EXAMPLES["pairs"]
    assert (
        len(
            read(
                folder,
                pair,
                pair | {"rejected": "A cup."},
                pair | {"rejected": ""},
            )
        )
        == 1
    )
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and "2 of 3 records left out" in notes[0] and "data.json" in notes[0]


@pytest.mark.parametrize(
    "annotations, best",
    [
        (
            [annotation(h="1", v="3"), annotation(h="N/A", v="3"), annotation(h="2", v="1")],
            ("B.", "C."),
        ),  # means 2, 3, 1.5
        (
            [
                annotation(h="5", e="5", v="1"),
                annotation(h="4", e="3.5", v="4"),
                annotation(h=2, e="N/A", v=""),
            ],
            ("B.", "C."),
        ),  # 3.67, 3.83, 2
        (
            [annotation(h="N/A"), annotation(h="4"), annotation(h="5")],
            ("C.", "B."),
        ),  # an unrated response is no candidate
        (
            [annotation(h="4"), annotation(h="4"), annotation(h="2")],
            ("A.", "C."),
        ),  # the first of two best
        ([annotation(h="4", v="2"), annotation(h="2", v="4"), annotation(e="3")], None),
        ([annotation(h="4"), annotation(h="N/A"), annotation(h="nan", v="inf")], None),
        ([annotation(h="N/A"), {}, {"Helpfulness": None}], None),
        ([], None),
    ],
)
def test_vlfeedback_takes_best_against_worst(folder, annotations, best, capsys):
    """Aspects that are numbers are averaged; where nothing is better the record is left out, and counted."""
    clear = vlfeedback(annotation(h="2"), annotation(h="1"))
    records = read(
        folder,
        clear | {"id": "6", "prompt": "Where is it?"},
        vlfeedback(*annotations),
    )
    assert [(record.chosen, record.rejected) for record in records] == [("A.", "B.")] + [best] * (
        best is not None
    )
    assert capsys.readouterr().err.splitlines() == (
        []
        if best
        else [
            f"{folder / 'data.json'}: 1 of 2 records left out, their responses are tied, the same or unrated"
        ]
    )


def test_a_file_of_ties_alone_is_refused(folder):
    assert "ties" in refused(folder, vlfeedback(annotation(h="2"), annotation(h="2")))


def test_llava_rlhf_has_its_outputs_after_the_last_question(folder):
    """In the published file a last gpt turn stands where the outputs go; earlier answers are context."""
    record = EXAMPLES["llava-rlhf"] | {"preference": 1}
    for texts in (("What?", "A pot.", "Which?"), ("What?", "A pot.", "Which?", "replaced")):
        (one,) = read(folder, record | {"conversations": turns(*texts)})
        assert (one.turns, one.chosen, one.rejected) == (
            ("<image>\nWhat?", "A pot.", "Which?"),
            "A dog.",
            "A cup.",
        )


def test_internvl_takes_several_pictures(folder):
    (record,) = read(folder, EXAMPLES["internvl"] | {"image": ["a.png", "b.png"]})
    assert record.paths == (
        str(folder / "images" / "a.png"),
        str(folder / "images" / "b.png"),
    ) and record.turns == ("<image>\n<image>\nWhat is it?",)
    (record,) = read(
        folder,
        EXAMPLES["internvl"]
        | {"image": ["a.png", "b.png"], "question": "Is <image> like <image>?"},
    )
    assert record.turns == ("Is <image> like <image>?",)
    assert "2 in all" in refused(
        folder,
        EXAMPLES["internvl"] | {"image": ["a.png", "b.png"], "question": "<image>\nWhat is it?"},
    )


def test_trl_messages_in_parts_and_in_turns(folder):
    """Parts keep their order; contents that are texts get the placeholders in front."""
    image, text = {"type": "image"}, {"type": "text", "text": "Same?"}
    for content, asked in (
        ([image, image, text], "<image>\n<image>\nSame?"),
        ([image, text, image], "<image>\nSame?\n<image>"),
        ("Same?", "<image>\n<image>\nSame?"),
    ):
        prompt = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": [text]},
        ]
        (record,) = read(folder, EXAMPLES["trl"] | {"images": ["a.png", "b.png"], "prompt": prompt})
        assert record.turns == (asked, "No.", "Same?") and len(record.paths) == 2
    system = [{"role": "system", "content": "Be brief."}, *EXAMPLES["trl"]["prompt"]]
    assert "turn 1 of 'prompt'" in refused(folder, EXAMPLES["trl"] | {"prompt": system})
    assert "one message each" in refused(
        folder, EXAMPLES["trl"] | {"chosen": EXAMPLES["trl"]["chosen"] * 2}
    )


def test_repeated_prompts_are_counted(folder, capsys):
    """The same question about the same picture, whatever the answers; another picture or question is another prompt."""
    pair, other = EXAMPLES["internvl"], EXAMPLES["internvl"] | {"image": "b.png"}
    assert (
        len(
            read(
                folder,
                pair,
                other,
                pair | {"chosen": "A mug."},
                pair | {"question": "Which?"},
                pair,
            )
        )
        == 5
    )
    assert capsys.readouterr().err.splitlines() == [
        "2 of 5 records have the images and the prompt of an earlier one"
    ]


def test_notes_go_to_standard_error(folder, capsys):
    read(folder, llava(), llava())
    out, err = capsys.readouterr()
    assert (
        out == "" and err == "1 of 2 records have the images and the prompt of an earlier one\n"
    )


def changed(value):
    """Copies of a JSON value with one thing in it dropped or retyped, at every depth."""
    for wrong in (
        None,
        True,
        3,
        "",
        "x",
        "\ud800",
        "<image>",
        [],
        [3],
        {},
        {"type": "text"},
        "[" * 9999,
    ):
        yield copy.deepcopy(wrong)
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            less = copy.copy(value)
            del less[key]
            yield less
            for other in changed(value[key]):
                less = copy.copy(value)
                less[key] = other
                yield less


@pytest.mark.parametrize("format", EXAMPLES)
def test_a_broken_record_gives_a_line_or_a_record(folder, format, monkeypatch):
    """Each field dropped or retyped, at every depth: a valid record, or one line that names the file and the record; never a traceback."""
    refusals = read_all = 0
    for record in changed(EXAMPLES[format]):
        monkeypatch.setattr(
            "minialign.data.records.read_json", lambda path: [EXAMPLES[format], record]
        )  # thousands of files would take their time
        for named in (None, format):
            try:
                some = read_records([folder / "data.json"], None, format=named)[1:]
            except InputError as error:
                message, refusals = str(error), refusals + 1
                assert (
                    len(message.splitlines()) == 1
                    and f"{folder / 'data.json'}, record 2" in message
                    and len(message) < 900
                )
            else:
                for one in some:
                    texts = ["id" + one.id, *one.turns, one.chosen] + [one.rejected] * (
                        format != "llava"
                    )
                    assert (
                        all(
                            isinstance(text, str) and text.strip() and text.encode()
                            for text in texts
                        )
                        and one.chosen != one.rejected
                    )
                    assert (
                        len(one.turns) % 2
                        and "".join(one.turns).count("<image>") == len(one.paths) == 1
                    )
                read_all += 1
    assert refusals > 50 and read_all


@pytest.mark.parametrize(
    "record",
    [
        llava(id={"a": 1}),
        llava(id="two\nlines", image="missing.png"),
        llava(image="missing\u2028.png"),
        llava(image="a" * 5000),
        llava(image="a\0.png"),
        llava(id="\ud800"),
        EXAMPLES["rlhf-v"] | {"text": "9" * 9999},
        EXAMPLES["llava-rlhf"] | {"preference": 0},
        EXAMPLES["llava-rlhf"] | {"preference": True},
        EXAMPLES["vlfeedback"] | {"completions": {"annotations": [{}], "response": []}},
    ],
)
def test_odd_values_end_in_one_line(folder, record):
    refused(folder, record)


def test_llava_instruct(folder):
    (record,) = read(folder, llava())
    assert record == Record(
        "7", "a.png", (str(folder / "images" / "a.png"),), ("<image>\nWhat is it?",), "A cup.", None
    )


def test_several_turns_keep_their_context(folder):
    """The last answer is scored, what came before is context, the picture stands in the first turn."""
    (record,) = read(
        folder,
        llava(conversations=turns("What is it?\n<image>", "A cup.", "Which colour?", "Red.")),
    )
    assert (
        record.turns == ("What is it?\n<image>", "A cup.", "Which colour?")
        and record.chosen == "Red."
    )


def test_a_missing_placeholder_is_put_in_front(folder):
    (record,) = read(folder, llava(conversations=turns("What is it?", "A cup.", "Where?", "Here.")))
    assert record.turns == ("<image>\nWhat is it?", "A cup.", "Where?")


def test_pictures_lie_in_images_beside_the_file_or_where_told(folder):
    (folder / "other").mkdir()
    (folder / "other" / "c.png").write_bytes(b"")
    assert read(folder, llava(image="c.png"), images=folder / "other")[0].paths == (
        str(folder / "other" / "c.png"),
    )
    assert "--images" in refused(folder, llava(image="c.png"))


def test_several_files_come_in_order(folder):
    for name, id in (("one.json", "1"), ("two.json", "2")):
        (folder / name).write_text(json.dumps([llava(id=id)]))
    assert [
        record.id for record in read_records([folder / "two.json", folder / "one.json"], None)
    ] == ["2", "1"]


def test_limit_is_a_seeded_subset_in_file_order(folder):
    many = [llava(id=str(n), conversations=turns(f"What is {n}?", "A cup.")) for n in range(30)]
    whole = [record.id for record in read(folder, *many)]
    some, again, other = (
        [record.id for record in read(folder, *many, limit=10, seed=seed)] for seed in (0, 0, 1)
    )
    assert some == again != other and len(some) == 10
    assert some == sorted(some, key=whole.index) and some != whole[:10] and set(some) < set(whole)
    assert [record.id for record in read(folder, *many, limit=99)] == whole


@pytest.mark.parametrize(
    "format, changes, told",
    [
        ("llava", {"conversations": None}, "conversations"),
        ("llava", {"image": None}, "no field 'image'"),
        ("llava", {"image": 3}, "image"),
        ("llava", {"conversations": []}, "pairs of human and gpt"),
        ("llava", {"conversations": "text"}, "not a list"),
        ("llava", {"conversations": turns("What?", "A cup.", "And?")}, "has 3"),
        ("llava", {"conversations": turns("What?", "A cup.")[::-1]}, "turn 1"),
        (
            "llava",
            {
                "conversations": [
                    {"from": "human", "value": "What?"},
                    {"from": "gpt", "value": None},
                ]
            },
            "turn 2",
        ),
        ("llava", {"conversations": [{"from": "human", "value": "What?"}, "A cup."]}, "turn 2"),
        ("llava", {"conversations": turns("What?", "  ")}, "chosen response is empty"),
        ("llava", {"image": "missing.png"}, "missing.png"),
        (
            "povid",
            {"rejected_conversations": turns("What is it?", "")},
            "rejected response is empty",
        ),
        ("povid", {"rejected_conversations": turns("What?")}, "has 1"),
        ("povid", {"rejected_conversations": None}, "rejected_conversations"),
        ("llava-rlhf", {"preference": None}, "preference"),
        ("llava-rlhf", {"output_2": {}}, "value"),
        ("rlhf-v", {"text": "{'question': 3}"}, "not the JSON"),
        ("rlhf-v", {"text": '{"question": "What?"}'}, "chosen"),
        ("rlaif-v", {"rejected": None}, "rejected"),
        ("internvl", {"image": []}, "image"),
        ("vlfeedback", {"img_path": None}, "img_path"),
        ("trl", {"chosen": []}, "one message each"),
        ("pairs", {"rejected": None}, "rejected"),
        ("pairs", {"chosen": 3}, "chosen"),
    ],
)
def test_bad_records_are_named(folder, format, changes, told):
    """The second record is the bad one: the message has file, number, id and what is wrong."""
    record = {
        key: value for key, value in (EXAMPLES[format] | changes).items() if value is not None
    }
    message = refused(folder, EXAMPLES[format], record)
    assert "record 2 (id 7)" in message and told in message


@pytest.mark.parametrize(
    "text, told",
    [
        ('[{"id": "7", "ima', "complete"),
        ("{}", "list"),
        ("[]", "list"),
        ('"x"', "list"),
        ("", "complete"),
    ],
)
def test_bad_files_are_named(folder, text, told):
    (folder / "data.json").write_text(text)
    with pytest.raises(InputError, match=told) as error:
        read_records([folder / "data.json"], None)
    assert "data.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_torn_and_foreign_files(folder):
    (folder / "torn.jsonl").write_text(json.dumps(llava()) + '\n\n{"id": "8", "im')
    (folder / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    for path, told in (
        (folder / "none.json", "no such file"),
        (folder / "torn.jsonl", "line 3"),
        (folder / "latin.json", "UTF-8"),
        (folder / "images", "cannot be read"),
    ):
        with pytest.raises(InputError, match=told) as error:
            read_records([path], None)
        assert path.name in str(error.value) and "\n" not in str(error.value)


def test_json_lines_end_at_line_feeds_only(folder):
    """U+2028, U+0085 and others may stand raw in a JSON string; str.splitlines would tear the record there."""
    text = "one\u2028two\x85three\u2029four"
    (record,) = read(
        folder,
        {"id": "7", "image": "a.png", "prompt": "What?", "chosen": text, "rejected": "A dog."},
        name="pairs.jsonl",
    )
    assert record.chosen == text


@pytest.mark.parametrize(
    "prompt",
    [
        3,
        [{"role": "user", "content": "What?"}],
        "  ",
    ],
)
def test_a_prompt_that_is_no_text_is_refused(folder, prompt):
    assert "prompt" in refused(
        folder,
        {"id": "7", "image": "a.png", "prompt": prompt, "chosen": "A cup.", "rejected": "A dog."},
    )


@pytest.mark.parametrize(
    "texts",
    [
        ("<image>\n<image>\nWhat?", "A cup."),
        ("What?", "It is <image>.", "And?", "A cup."),
        ("<image>\nWhat?", "A cup.", "<image> And?", "A dog."),
    ],
)
def test_more_placeholders_than_pictures_are_refused(folder, texts):
    """A record has one picture, so one <image>, and none in an answer."""
    assert "<image>" in refused(folder, llava(conversations=turns(*texts)))


def test_a_rejected_answer_to_another_question_is_refused(folder):
    """Both answers are scored after the chosen conversation's turns: the rejected one must answer the same question."""
    refused(folder, llava(rejected_conversations=turns("<image>\nHow many are there?", "Three.")))


def test_a_record_without_an_id_has_the_same_name_from_everywhere(folder, monkeypatch):
    """BDHS's draws depend on (seed, record id, round) alone: not on the folder the command was started from."""
    (here,) = read(folder, llava(id=None))
    monkeypatch.chdir(folder)
    (there,) = read_records(["data.json"], None)
    assert here.id == there.id
