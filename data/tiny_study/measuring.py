"""What is measured of a model on one evaluation set, image by image."""

from dataclasses import astuple

import torch
from tiny_world.grammar import is_well_formed

from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.packing import PackedExample
from minialign.evaluation.evaluation_sets import EvaluationSet, read_folder
from minialign.evaluation.pope import counts_as_yes
from minialign.evaluation.results import SetAnswers, ask_set, score_set
from minialign.logprobs import response_logps
from minialign.models.loading import VLM

BATCH_SIZE = 50  # captions whose log-probs are computed at a time


def measure_set(vlm: VLM, base_vlm: VLM, folder, contrast: float) -> dict:
    """Measure a model on the evaluation set in a folder.

    Returns the scores as evaluation.json has them, and lists with a value for each image:
        counts: what its caption says, the fields of CaptionCounts.
        captions: the caption.
        well_formed: whether the tiny world could have written it.
        text_logps: its log-prob under the base model without the image, and its number of tokens.
        pope_of_images: the right answers to questions about the image, and their number.
    """
    evaluation_set = read_folder(folder)
    answers = ask_set(vlm, evaluation_set, contrast=contrast)
    scores, counts = score_set(evaluation_set, answers)
    requests = [row["prompt"] for row in evaluation_set.captions]

    well_formed = []
    for caption, request in zip(answers.captions, requests, strict=True):
        well_formed.append(is_well_formed(caption, request))
    return scores | {
        "counts": [astuple(caption) for caption in counts],
        "captions": answers.captions,
        "well_formed": well_formed,
        "text_logps": text_only_logps(base_vlm, requests, answers.captions),
        "pope_of_images": count_right_answers(evaluation_set, answers),
    }


@torch.no_grad()
def text_only_logps(vlm: VLM, requests: list[str], captions: list[str]) -> list[list[float]]:
    """Return how likely a model finds captions without their images.

    Returns for each caption its log-prob in nats and its number of tokens, the end token included.
    The prompt holds the request alone, as in the model's training on texts.
    """
    rows = []
    for request, caption in zip(requests, captions, strict=True):
        prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, [request])
        caption_ids = encode_response(vlm.tokenizer, vlm.template, caption)
        rows.append(PackedExample.of(prompt_ids, [], [caption_ids]))

    logps_of_captions = []
    for start in range(0, len(rows), BATCH_SIZE):
        logps, num_tokens = response_logps(vlm.model, rows[start : start + BATCH_SIZE])  # (B, 1)
        logps_of_captions += torch.cat([logps, num_tokens], dim=1).tolist()
    return logps_of_captions


def count_right_answers(evaluation_set: EvaluationSet, answers: SetAnswers) -> list[list[int]]:
    """Return for each image with a caption how many answers to POPE are right, and how many all."""
    counts = {row["image"]: [0, 0] for row in evaluation_set.captions}
    for split, rows in evaluation_set.pope.items():
        for row, answer in zip(rows, answers.pope[split], strict=True):
            count = counts.setdefault(row["image"], [0, 0])
            count[0] += counts_as_yes(answer) == (row["label"] == "yes")
            count[1] += 1
    return [counts[row["image"]] for row in evaluation_set.captions]
