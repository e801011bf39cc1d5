"""Corruption: changes by rule are checked against the annotations, answers of a model are given."""

import contextlib
import copy
import io
import re
from collections import Counter
from dataclasses import replace

import pytest
from conftest import TINY

from minialign.data.records import Record, read_records
from minialign.evaluation import answers as answers_module
from minialign.evaluation.vocabulary import Vocabulary
from minialign.evaluation.words import any_phrase
from minialign.pairs import annotators, corruption
from minialign.pairs.annotators import GroundTruthAnnotator
from minialign.pairs.corruption import MLLMCorrupter, RuleCorrupter, rejection_reason
from minialign.pairs.pair_files import sample_pair_file
from minialign.utils import distributed

CHOSEN = "There is a red cup on a table."  # 8 words


@pytest.mark.parametrize(
    "text, reason",
    [
        ("There is a blue cup on a table.", None),
        # 15 words, where 16 are allowed.
        ("There is a red cup and there is a dog on a table, as it seems.", None),
        ("A blue cup lies.", None),  # 4 words, the fewest that are allowed
        ("I'm sorry, but I can't help with that request.", "refusal"),
        ("I can’t change what the picture really shows.", "refusal"),
        ("I won’t write that of this picture here.", "refusal"),
        ("I won't write that of this picture here.", "refusal"),
        ("As an AI, I will not invent false things here.", "refusal"),
        ("I cannot see the picture, so there it stays.", "refusal"),
        ("i can not see the picture, so there it stays.", "refusal"),
        (CHOSEN, "copy"),
        ("there is a RED  cup on\na table. ", "copy"),
        ("", "no answer"),
        (" \n", "no answer"),
        ("A blue cup.", "no answer"),
        ("There is a blue cup on a table. " * 2 + "Yes.", "no answer"),  # 17 words
        ("Here is the changed answer:\n\nThere is a blue cup on a table.", "no answer"),
    ],
)
def test_why_a_rewritten_response_is_of_no_use(text, reason):
    assert rejection_reason(CHOSEN, text) == reason


def test_cannot_is_no_refusal_if_the_chosen_response_says_it_too():
    chosen = "I cannot tell what the man holds."

    assert rejection_reason(chosen, "I cannot tell what the woman holds.") is None


# --- by rule ---


@pytest.fixture(scope="module")
def truth():
    """Return the annotations of the shipped training images."""
    return GroundTruthAnnotator(TINY / "train" / "captions.json")


@pytest.fixture()
def own_truth(truth):
    """Return annotations that a test may change."""
    return GroundTruthAnnotator(truth.path)


def corrupt(truth, record, seed=0):
    """Return the rejected response that the rule makes for a record."""
    (pair,) = RuleCorrupter(None, truth, seed).pairs([record])
    return pair["rejected"]


def make_record(chosen):
    """Return a record about the first training image."""
    return Record("r", "0001.png", (), ("<image>\nWhat?",), chosen)


def split_facts(truth, text):
    """Return the objects, colors and places in a text, and the text without them and articles."""
    words = [*truth.places, *truth.vocabulary.colors]
    words += [" ".join(name) for name in truth.vocabulary.names]
    facts = "|".join(words)
    rest = re.sub(rf"\b(?:{facts}|a|an|A|An)\b", "_", text)
    return re.findall(rf"\b(?:{facts})\b", text), rest


def test_one_or_two_facts_change_to_others_of_their_kind_and_nothing_else(truth, records):
    """An object becomes one that is not in the image, a color or a place becomes another one.

    Over the shipped records one and two changes occur, and all three kinds of facts.
    """
    captions = []
    for record in records[:500]:
        is_false = truth.judge(record, record.chosen).num_wrong > 0
        if not is_false and not re.match("Yes|No", record.chosen):
            captions.append(record)
    all_objects = set(truth.vocabulary.names.values())
    numbers_of_changes = set()
    changed_kinds = set()

    for record in captions:
        facts, rest = split_facts(truth, record.chosen)
        new_facts, new_rest = split_facts(truth, corrupt(truth, record))

        changes = []
        for before, after in zip(facts, new_facts, strict=True):
            if before != after:
                changes.append((before, after))
        present = {item["name"] for item in truth.objects[record.image]}
        for before, after in changes:
            if before in truth.vocabulary.colors:
                changed_kinds.add("color")
                assert after in truth.vocabulary.colors
            elif before in truth.places:
                changed_kinds.add("place")
                assert after in truth.places
            else:
                changed_kinds.add("object")
                assert before in all_objects
                assert after in all_objects - present
        assert new_rest == rest
        numbers_of_changes.add(len(changes))

    assert numbers_of_changes == {1, 2}
    assert changed_kinds == {"color", "place", "object"}


def test_a_used_pair_says_something_false_that_the_chosen_response_does_not(truth, records):
    """A third of the shipped captions are false in places. None of these is made true."""
    pairs = RuleCorrupter(None, truth, 0).pairs(records[:300])

    used = Counter()
    for record, pair in zip(records, pairs, strict=False):
        num_wrong = truth.judge(record, pair["chosen"]).num_wrong
        if pair["corrupted"] == "used":
            assert truth.judge(record, pair["rejected"]).num_wrong > num_wrong
        used[pair["corrupted"], num_wrong > 0] += 1
    assert used["used", True] > 20
    assert used["copy", True] > 5
    assert used["copy", False] == 0


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        ("No.", "No."),  # to turn it round would correct it
        ("There is no dog.", "There is no dog."),  # true of any other object that is not there
        ("I see no dog, but a lamp.", r"I see no dog, but an? (?!lamp|dog)\w+\."),
    ],
)
def test_what_is_false_or_denied_stays(truth, chosen, rejected):
    """The image shows a lamp and no dog."""
    record = replace(make_record(chosen), turns=("<image>\nIs there a lamp?",))

    assert re.fullmatch(rejected, corrupt(truth, record))


def test_articles_follow_the_new_words(own_truth):
    """The tiny world has no word that needs "an", so this test brings some."""
    names = ("orange", "apple", "lamp", "umbrella", "pear")
    own_truth.vocabulary.names = {(name,): name for name in names}
    record = make_record("An orange is here. A lamp is there, and a pear.")

    texts = {corrupt(own_truth, record, seed) for seed in range(60)}

    assert len(texts) > 10
    assert {text.split()[0] for text in texts} == {"An", "A"}
    for text in texts:
        assert not re.search(r"\b[Aa] [aou]|\b[Aa]n [^aou]", text)


def test_other_articles_stay_as_they_are(truth):
    """Only a false fact may distinguish the rejected response: not the spelling of "an hour"."""
    record = make_record("It takes an hour to clean a lamp and a uniform.")

    for seed in range(10):
        text = corrupt(truth, record, seed)
        assert re.fullmatch(r"It takes an hour to clean a \w+ and a uniform\.", text)


def test_a_word_that_is_an_object_and_a_color_is_exchanged_once(own_truth):
    """COCO has such a word: orange."""
    own_truth.vocabulary.names = {("orange",): "orange", ("umbrella",): "umbrella"}
    own_truth.vocabulary.colors = {"orange", "red"}
    record = make_record("There is an orange here.")

    texts = {corrupt(own_truth, record, seed) for seed in range(20)}

    assert texts <= {"There is an umbrella here.", "There is a red here."}


def test_a_name_of_several_words_is_exchanged_as_a_whole(own_truth):
    own_truth.vocabulary.names = {
        ("toilet",): "toilet",
        ("toilet", "seat"): "toilet",
        ("cup",): "cup",
        ("dog",): "dog",
    }
    own_truth.objects = {"0001.png": [{"name": "toilet"}]}
    record = make_record("There is a toilet seat.")

    texts = {corrupt(own_truth, record, seed) for seed in range(10)}

    assert texts == {"There is a cup.", "There is a dog."}


def test_a_plural_becomes_a_plural(own_truth):
    """The image shows a lamp. The vocabulary has no plural of sheep, and "men" for a person."""
    names = "lamp lamps cup cups dog dogs sheep person people men".split()
    objects = "lamp lamp cup cup dog dog sheep person person person".split()
    own_truth.vocabulary.names = {(word,): name for word, name in zip(names, objects, strict=True)}

    texts = {corrupt(own_truth, make_record("Two lamps."), seed) for seed in range(40)}
    texts_of_men = {corrupt(own_truth, make_record("Two men."), seed) for seed in range(40)}

    assert texts == {"Two cups.", "Two dogs.", "Two people."}
    assert texts_of_men == {"Two cups.", "Two dogs.", "Two people."}


@pytest.mark.parametrize(
    "chosen, rejected",
    [
        # The last word decides: "sports ball" is no plural.
        ("Look: sports ball.", {"Look: cup.", "Look: skis."}),
        ("Two sports balls.", {"Two cups."}),
    ],
)
def test_the_last_word_of_a_name_says_whether_it_is_a_plural(own_truth, chosen, rejected):
    """The singular of a name that is a plural, "skis", is no plural of it."""
    objects = {
        "sports ball": ["sports ball", "sports balls"],
        "cup": ["cup", "cups"],
        "skis": ["ski", "skis"],
    }
    own_truth.vocabulary = Vocabulary({"objects": objects}, "captions.json")
    own_truth.objects = {"0001.png": [{"name": "sports ball"}]}

    texts = {corrupt(own_truth, make_record(chosen), seed) for seed in range(20)}

    assert texts == rejected


def test_a_name_that_is_a_plural_becomes_another_name_where_no_plural_is_known(own_truth):
    """The synonyms of COCO are singular. Its name "skis" was never exchanged."""
    own_truth.vocabulary.names = {("skis",): "skis", ("cup",): "cup", ("dog",): "dog"}
    own_truth.objects = {"0001.png": [{"name": "skis"}]}

    texts = {corrupt(own_truth, make_record("Here are skis."), seed) for seed in range(20)}

    assert texts == {"Here are cup.", "Here are dog."}


def test_the_words_that_state_facts_are_collected_once(truth, records, monkeypatch):
    """A pattern of COCO's words takes milliseconds, which 100,000 records would wait for."""
    corrupter = RuleCorrupter(None, truth, 0)
    num_patterns = 0

    def count_patterns(phrases):
        nonlocal num_patterns
        num_patterns += 1
        return any_phrase(phrases)

    monkeypatch.setattr(corruption, "any_phrase", count_patterns)
    monkeypatch.setattr(annotators, "any_phrase", count_patterns)

    corrupter.pairs(records[:5])

    assert num_patterns == 0


@pytest.mark.parametrize(
    "chosen, rejected", [("Yes.", "No."), ("No.", "Yes."), ("no", "Yes."), ("YES!", "No.")]
)
def test_a_bare_yes_or_no_is_turned_round(truth, records, chosen, rejected):
    assert corrupt(truth, replace(records[0], chosen=chosen)) == rejected


def test_changes_depend_on_the_seed_and_the_record_alone(truth, records):
    long_records = [record for record in records if len(record.chosen) > 60][:12]

    pairs = RuleCorrupter(None, truth, seed=3).pairs(long_records)

    texts = [pair["rejected"] for pair in pairs]
    one_by_one = [corrupt(truth, record, seed=3) for record in reversed(long_records)]
    other_seed = [corrupt(truth, record, seed=4) for record in long_records]
    other_ids = [corrupt(truth, replace(record, id="other"), seed=3) for record in long_records]
    assert texts == one_by_one[::-1]
    assert texts != other_seed
    assert texts != other_ids


# --- what is of no use is left out, and counted ---


def test_where_nothing_can_be_changed_the_pair_is_left_out(truth, records):
    record = replace(records[0], chosen="It is a lovely day.")

    (pair,) = RuleCorrupter(None, truth, 0).pairs([record])

    assert pair["rejected"] == pair["chosen"]
    assert pair["corrupted"] == "copy"


@pytest.fixture()
def give_answers(monkeypatch):
    """Return a function that replaces the writer's answers by `answer(the text to be changed)`.

    It returns the list of (writer, paths, text, max_new_tokens) that is asked from then on.
    """

    def replace_writer(answer):
        asked = []

        def answer_questions(writer, questions, title, max_new_tokens):
            answers = {}
            for paths, text in questions:
                asked.append((writer, paths, text, max_new_tokens))
                to_change = re.search(r"^Answer: (.*)$", text, re.MULTILINE)[1]
                answers[paths, text] = answer(to_change)
            return answers

        monkeypatch.setattr(corruption, "answer_questions_locally", answer_questions)
        monkeypatch.setattr(answers_module, "leaves_room", lambda writer, paths, text: True)
        return asked

    return replace_writer


def read_pairs(path):
    """Return the records of a file of pairs, and what reading it printed to standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        records = read_records([path], TINY / "train" / "images")
    return records, printed.getvalue()


def test_a_models_answers_are_used_or_left_out(vlm, records, tmp_path, give_answers):
    """Two of five answers can be used. The others are written as ties, which readers leave out."""
    # Arrange.
    asked_records = []
    for i, record in enumerate(records[:5]):
        asked_records.append(replace(record, chosen=f"There is a cup on table number {i}."))
    texts = [
        " There is a dog on table number 0.\n",
        "Sorry, I would rather not invent any.",
        asked_records[2].chosen,
        "",
        "There is a cup under table number 4.",
    ]
    answers = {}
    for record, text in zip(asked_records, texts, strict=True):
        answers[record.chosen] = text
    give_answers(answers.get)

    # Act.
    corrupter = MLLMCorrupter(vlm, vlm, "somebody")
    path = tmp_path / "pairs.jsonl"
    pairs = sample_pair_file(corrupter, asked_records, path, group_size=2)
    read, printed = read_pairs(path)

    # Assert.
    assert [pair["corrupted"] for pair in pairs] == ["used", "refusal", "copy", "no answer", "used"]
    assert pairs[0]["rejected"] == "There is a dog on table number 0."
    assert "3 of 5" in printed
    assert read == [
        replace(asked_records[0], rejected="There is a dog on table number 0."),
        replace(asked_records[4], rejected="There is a cup under table number 4."),
    ]


def test_the_writer_gets_question_and_answer_and_no_image(vlm, records, give_answers):
    """The writer is another model than the one that is aligned."""
    asked = give_answers(str)

    MLLMCorrupter(vlm, "writer", "somebody", max_new_tokens=7).pairs(records[:1])

    ((writer, paths, text, max_new_tokens),) = asked
    question = records[0].turns[0].replace("<image>", "").strip()
    assert writer == "writer"
    assert paths == ()
    assert max_new_tokens == 7
    assert f"\nQuestion: {question}\nAnswer: {records[0].chosen}\n" in text
    assert "<image>" not in text


def test_a_response_too_long_for_the_writer_is_left_out(vlm, records, monkeypatch):
    """It fits the model to be aligned, and is counted as the other answers of no use are."""

    def answer_questions(writer, questions, title, max_new_tokens):
        return dict.fromkeys(questions, "A cup and a pen.")

    monkeypatch.setattr(corruption, "answer_questions_locally", answer_questions)
    short_record = replace(records[0], chosen="A cup and a dog.")
    long_record = replace(records[1], chosen="A cup. " * 99)

    pairs = MLLMCorrupter(vlm, vlm, "somebody").pairs([short_record, long_record])

    assert [pair["corrupted"] for pair in pairs] == ["used", "too long"]
    assert pairs[1]["rejected"] == pairs[1]["chosen"]


def test_each_process_rewrites_its_own_records(vlm, records, monkeypatch):
    """The processes share the records of a group. So the second one has requests of its own."""
    monkeypatch.setattr(corruption, "rejection_reason", lambda chosen, text: None)
    corrupter = MLLMCorrupter(vlm, vlm, "somebody", max_new_tokens=4)
    expected = corrupter.pairs(records[:2])

    monkeypatch.setattr(distributed, "num_models", lambda: 2)
    monkeypatch.setattr(distributed, "model_index", lambda: 1)
    monkeypatch.setattr(distributed, "_exchange", lambda results, group: [["none"], results])

    assert corrupter.pairs(records[:2]) == expected


@pytest.mark.parametrize("change", ["model", "files"])
def test_a_file_of_pairs_tells_which_model_rewrote(vlm, change):
    """So that a run is not resumed with another one in the same folder."""
    writer = copy.copy(vlm)
    before = MLLMCorrupter(vlm, writer, "somebody").metadata()

    if change == "model":
        writer.model = copy.deepcopy(vlm.model)
        writer.model.lm_head.weight.data.neg_()
    else:
        writer.file_digests = dict.fromkeys(vlm.file_digests, "another")

    assert MLLMCorrupter(vlm, writer, "somebody").metadata() != before
