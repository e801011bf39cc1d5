"""Each image has one <image> in the questions of its record, and no placeholder of another kind."""

import pytest
from data_folder import EXAMPLES, DataFolder, changed, conversation, llava


@pytest.fixture()
def folder(tmp_path):
    return DataFolder(tmp_path)


def test_a_missing_placeholder_is_put_in_front(folder):
    turns = conversation("What is it?", "A cup.", "Where?", "Here.")
    (record,) = folder.read(llava(conversations=turns))
    assert record.turns == ("<image>\nWhat is it?", "A cup.", "Where?")


@pytest.mark.parametrize(
    "question",
    [
        "<image>What is it?",
        "<image>\n\nWhat is it?",
        " <image> What is it? ",
        "What is it?\n<image>",
        "What is it? <image>\n",
        "What is <image>it?",
        "What is it?",
        " What is it?\n",
    ],
)
def test_a_single_placeholder_comes_to_the_front(folder, question):
    """So do LLaVA's training code and the chat templates of the hub, with the spaces around it."""
    (record,) = folder.read(llava(conversations=conversation(question, "A cup.")))
    assert record.turns == ("<image>\nWhat is it?",)


def test_a_placeholder_stays_in_its_own_question(folder):
    """LLaVA's training code moves it within its turn, and not to another one."""
    turns = conversation("Hello.", "Hello.", "What is it? <image>", "A cup.")
    (record,) = folder.read(llava(conversations=turns))
    assert record.turns == ("Hello.", "Hello.", "<image>\nWhat is it?")


@pytest.mark.parametrize(
    "texts",
    [
        ("<image>\n<image>\nWhat?", "A cup."),
        ("What?", "It is <image>.", "And?", "A cup."),
        ("<image>\nWhat?", "A cup.", "<image> And?", "A dog."),
    ],
)
def test_more_placeholders_than_images_are_refused(folder, texts):
    """A record with one image has one <image>, and none in an answer."""
    assert "<image>" in folder.error_of(llava(conversations=conversation(*texts)))


@pytest.mark.parametrize(
    "placeholder",
    [
        "<ImageHere>",
        "<imagehere>",
        "<|image|>",
        "<|image_pad|>",
        "<|image_1|>",
        "<image_1>",
        "<image1>",
        "<image 1>",
        "<IMAGE>",
        "<image_placeholder>",
        "<IMG_CONTEXT>",
        "<|vision_start|>",
        "<start_of_image>",
        "<im_patch>",
        "<im_start>",
        "<im_end>",
    ],
)
def test_placeholders_of_other_programs_are_refused(folder, placeholder):
    """They would stay in the question as text, which no model was trained with."""
    for question in (f"{placeholder} What is it?", f"<image>\nWhat is {placeholder}?"):
        message = folder.error_of(llava(conversations=conversation(question, "A cup.")))
        assert f"a question has {placeholder!r}, another program's placeholder" in message
        assert "write <image>" in message

    pair = changed(EXAMPLES["internvl"], image=["a.png", "b.png"])
    question = f"{placeholder} and {placeholder}, differ?"
    assert repr(placeholder) in folder.error_of(changed(pair, question=question))


@pytest.mark.parametrize(
    "text",
    ["<img>", "<img src='a'>", "<images>", "<image_>", "<image->", "image 1", "<|im_start|>x"],
)
def test_html_and_words_are_no_placeholders(folder, text):
    question = f"What does {text} mean?"
    (record,) = folder.read(llava(conversations=conversation(question, "A cup.")))
    assert record.turns == (f"<image>\n{question}",)
