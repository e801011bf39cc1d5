"""Conversations have one meaning, whichever program wrote them down."""

import pytest
from data_folder import EXAMPLES, DataFolder, changed, conversation, llava

IMAGE_PART = {"type": "image"}


@pytest.fixture()
def folder(tmp_path):
    return DataFolder(tmp_path)


def spoken(*texts, speakers=("user", "assistant"), keys=("role", "content")):
    """Return messages in which the speakers take turns."""
    speaker_key, text_key = keys
    messages = []
    for i, text in enumerate(texts):
        messages.append({speaker_key: speakers[i % 2], text_key: text})
    return messages


def answer(text):
    """Return the message of an answer."""
    return {"role": "assistant", "content": text}


LLAVA_KEYS = ("from", "value")
TEXTS = ("<image>What is it?", "A pot.", "Sure?", "A cup.")
TURNS = ("<image>\nWhat is it?", "A pot.", "Sure?")


# Who writes conversations how.


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "a.png", "conversations": conversation(*TEXTS)},
        # VL-RLHF
        {
            "image": "a.png",
            "conversations": spoken(*TEXTS, keys=LLAVA_KEYS),
        },
        # LLaMA-Factory
        {"images": ["a.png"], "messages": spoken(*TEXTS)},
        {"images": ["a.png"], "conversations": conversation(*TEXTS), "system": "", "tools": ""},
        {"images": "a.png", "messages": spoken(*TEXTS, speakers=("Human", "GPT"))},
        # a system text that says nothing
        {"image": ["a.png"], "messages": [{"role": "system", "content": " "}, *spoken(*TEXTS)]},
        # the placeholder as a part
        {
            "images": ["a.png"],
            "messages": spoken([{"type": "text", "text": "What is it?"}, IMAGE_PART], *TEXTS[1:]),
        },
    ],
)
def test_supervised_conversations(folder, fields):
    (record,) = folder.read({"id": "7", **fields})
    assert record.turns == TURNS
    assert record.chosen == "A cup."
    assert record.rejected is None
    assert record.paths == (folder.image_path("a.png"),)


QUESTIONS = conversation(*TEXTS[:3])
FULL = conversation(*TEXTS)


@pytest.mark.parametrize(
    "fields",
    [
        # LLaVA-Instruct with a second answer: a text, a message, a list of one, all of it again
        {"image": "a.png", "conversations": FULL, "rejected": "A dog."},
        {"image": "a.png", "conversations": FULL, "rejected": {"from": "gpt", "value": "A dog."}},
        {"image": "a.png", "conversations": FULL, "rejected": [answer("A dog.")]},
        {
            "image": "a.png",
            "conversations": FULL,
            "rejected": conversation(*TEXTS[:3], "A dog."),
        },
        # LLaMA-Factory, with its two ways to name speakers
        {
            "images": ["a.png"],
            "conversations": QUESTIONS,
            "chosen": {"from": "gpt", "value": "A cup."},
            "rejected": {"from": "gpt", "value": "A dog."},
        },
        {
            "images": ["a.png"],
            "messages": spoken(*TEXTS[:3]),
            "chosen": answer("A cup."),
            "rejected": answer("A dog."),
        },
        {"image": "a.png", "conversations": QUESTIONS, "chosen": "A cup.", "rejected": "A dog."},
        # ms-swift
        {"images": ["a.png"], "messages": spoken(*TEXTS), "rejected_response": "A dog."},
        {
            "images": ["a.png"],
            "messages": spoken(*TEXTS),
            "rejected_messages": spoken(*TEXTS[:3], "A dog."),
        },
        # TRL: one message, texts, all of it again with and without a prompt
        {
            "images": ["a.png"],
            "prompt": spoken(*TEXTS[:3]),
            "chosen": [answer("A cup.")],
            "rejected": [answer("A dog.")],
        },
        {
            "image": "a.png",
            "prompt": spoken(*TEXTS[:3]),
            "chosen": "A cup.",
            "rejected": "A dog.",
        },
        {
            "images": ["a.png"],
            "prompt": spoken(*TEXTS[:3]),
            "chosen": spoken(*TEXTS),
            "rejected": spoken(*TEXTS[:3], "A dog."),
        },
        {
            "images": ["a.png"],
            "chosen": spoken(*TEXTS),
            "rejected": spoken(*TEXTS[:3], "A dog."),
        },
    ],
)
def test_pairs(folder, fields):
    (record,) = folder.read({"id": "7", **fields})
    assert record.turns == TURNS
    assert (record.chosen, record.rejected) == ("A cup.", "A dog.")
    assert record.paths == (folder.image_path("a.png"),)


@pytest.mark.parametrize("image_field", ["image", "images", "image_path", "img_path"])
@pytest.mark.parametrize("as_list", [False, True])
def test_every_pair_of_texts_takes_every_name_of_the_image(folder, image_field, as_list):
    image = ["a.png"] if as_list else "a.png"
    for prompt_field in ("question", "prompt"):
        pair = {"chosen": "A cup.", "rejected": "A dog."}
        pair[prompt_field] = "What is it?"
        (record,) = folder.read({image_field: image, **pair})
        assert record.turns == ("<image>\nWhat is it?",)
        assert record.paths == (folder.image_path("a.png"),)


# What is refused, by name.


@pytest.mark.parametrize(
    "messages, problem",
    [
        ([*conversation("What?", "A."), {"from": "system", "value": "Be brief."}], "turn 3"),
        (conversation("What?", "A.")[::-1], "turn 1 of 'conversations' is by 'gpt'"),
        (
            spoken("What?", "A.", speakers=("user", "user")),
            "turn 2 of 'conversations' is by 'user'",
        ),
        (spoken("What?", "A.", speakers=("user", "tool")), "'tool'"),
        (conversation("What?", "A.", "Sure?"), "it has 3"),
        ([{"role": "user"}, answer("A.")], "turn 1"),
        ([{"text": "What?"}, answer("A.")], "turn 1"),
        (spoken([{"type": "video"}], "A."), "neither an image nor a text"),
        (spoken([{"type": "image", "image": "b.png"}], "A."), "name its file in the field"),
        (spoken([{"type": "image_url", "image_url": {"url": "b.png"}}], "A."), "neither an image"),
        ([{"role": "user", "content": "What?", "images": ["b.png"]}, answer("A.")], "'images' of"),
        (spoken("What?", None), "turn 2"),
        (spoken("What?", " "), "chosen response is empty"),
    ],
)
def test_odd_conversations(folder, messages, problem):
    assert problem in folder.error_of(llava(conversations=messages))


@pytest.mark.parametrize(
    "format, changes, problem",
    [
        ("llama-factory", {"rejected": None}, "no field 'rejected'"),
        ("llama-factory", {"chosen": {"from": "human", "value": "A."}}, "by 'human'"),
        ("llama-factory", {"conversations": conversation("What?", "A.")}, "must end with the"),
        ("llava-pair", {"rejected": conversation("Who?", "A.")}, "different prompts"),
        ("llava-pair", {"rejected": ""}, "rejected response is empty"),
        ("llava-pair", {"rejected": {"from": "gpt", "value": "  "}}, "rejected response is empty"),
        ("llava-pair", {"rejected": 3}, "'rejected' must be a text"),
        ("llava-pair", {"rejected": ["A dog.", "A pot."]}, "not a message"),
        ("trl-implicit", {"rejected": spoken("Who?", "A.")}, "different prompts"),
        ("trl-implicit", {"chosen": [answer("A.")]}, "turn 1 of 'chosen'"),
        ("trl", {"prompt": spoken("What?", "A.")}, "must end with a question"),
    ],
)
def test_odd_pairs(folder, format, changes, problem):
    assert problem in folder.error_of(changed(EXAMPLES[format], **changes))
