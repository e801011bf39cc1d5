"""What the study measures of a model, image by image, against slow computations."""

import json
import sys

import pytest
import torch
from conftest import ROOT, TINY
from small_sets import write_small_set

from minialign import reference
from minialign.data.chat_templates import (
    decode_response,
    encode_prompt,
    encode_response,
    stop_ids,
)
from minialign.evaluation.evaluation_sets import EvaluationSet
from minialign.evaluation.results import SetAnswers
from minialign.models.loading import load_vlm

sys.path.insert(0, str(ROOT / "data"))
from tiny_study import measuring  # noqa: E402
from tiny_study.measuring import (  # noqa: E402
    count_right_answers,
    measure_set,
    text_only_logps,
)
from tiny_world.grammar import is_well_formed  # noqa: E402


def slow_text_logp(vlm, request, caption):
    """Return the log-prob of a caption after its request alone, and its number of tokens."""
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, [request])
    caption_ids = encode_response(vlm.tokenizer, vlm.template, caption)
    with torch.no_grad():
        logp = reference.response_logp(vlm.model, prompt_ids, [], caption_ids)
    return [float(logp), len(caption_ids)]


def test_log_probs_without_the_image_equal_the_slow_ones(vlm, monkeypatch):
    """Three captions of different lengths do not fit into one batch of two."""
    monkeypatch.setattr(measuring, "BATCH_SIZE", 2)
    requests = ["Describe it.", "What is in this picture?", "Describe what is in it."]
    captions = ["A red cup.", "There is a blue bowl at the top left.", "Yes."]

    logps = text_only_logps(vlm, requests, captions)

    for i, (request, caption) in enumerate(zip(requests, captions, strict=True)):
        assert logps[i] == pytest.approx(slow_text_logp(vlm, request, caption), abs=1e-4)
    assert len({num_tokens for _, num_tokens in logps}) == 3


def test_right_answers_are_counted_for_each_image_over_all_splits():
    """ "No" and "yes" may be in a sentence. An image without a caption has no place in the list."""
    evaluation_set = EvaluationSet(
        images=None,
        captions=[{"image": "b.png"}, {"image": "a.png"}, {"image": "unasked.png"}],
        vocabulary=None,
        pope={
            "random": [
                {"image": "a.png", "label": "yes"},
                {"image": "b.png", "label": "no"},
                {"image": "without_caption.png", "label": "no"},
            ],
            "popular": [{"image": "a.png", "label": "no"}, {"image": "a.png", "label": "yes"}],
        },
        pope_files={},
    )
    answers = SetAnswers(
        captions=["", "", ""],
        pope={"random": ["Yes.", "Yes, it is.", "No."], "popular": ["No, there is none.", "No."]},
    )

    counts = count_right_answers(evaluation_set, answers)

    assert counts == [[0, 1], [2, 3], [0, 0]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return what is measured of a model on two images, the captions file, and both models.

    The measured model has halved logits, so that its log-probs are not those of the base.
    """
    folder = tmp_path_factory.mktemp("sets") / "balanced"
    write_small_set("balanced", folder, num_images=2)
    base_vlm = load_vlm(TINY / "model")
    vlm = load_vlm(TINY / "model")
    vlm.model.lm_head.weight.data *= 0.5
    rows = json.loads((folder / "captions.json").read_text())["captions"]
    return measure_set(vlm, base_vlm, folder, contrast=0.0), rows, vlm, base_vlm, folder


def test_captions_are_greedy_and_in_the_order_of_the_file(measured):
    scores, rows, vlm, _, folder = measured

    for row, caption in zip(rows, scores["captions"], strict=True):
        prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, ["<image>\n" + row["prompt"]])
        image_features = vlm.encode_images([folder / "images" / row["image"]])
        ids = reference.generate(
            vlm.model, prompt_ids, image_features, [], None, stop_ids(vlm.tokenizer, vlm.template)
        )
        assert caption == decode_response(vlm.tokenizer, vlm.template, ids)


def test_values_of_images_make_up_the_scores(measured):
    """CHAIR_i and POPE's accuracy are those of all images together."""
    scores, rows, _, base_vlm, _ = measured

    mentions = sum(counts[0] for counts in scores["counts"])
    absent = sum(counts[1] for counts in scores["counts"])
    assert absent / mentions == scores["chair_i"]
    assert [asked for _, asked in scores["pope_of_images"]] == [12, 12]  # 4 in each split
    right = sum(right for right, _ in scores["pope_of_images"])
    accuracies = [split["accuracy"] for split in scores["pope"].values()]
    assert right / 24 == pytest.approx(sum(accuracies) / 3)
    for i, row in enumerate(rows):
        caption = scores["captions"][i]
        assert scores["well_formed"][i] == is_well_formed(caption, row["prompt"])
        expected = slow_text_logp(base_vlm, row["prompt"], caption)
        assert scores["text_logps"][i] == pytest.approx(expected, abs=1e-3)
