"""Teacher-forced distortion (Sec. 3.3): every token is predicted under noise from the true text."""

from dataclasses import replace
from functools import partial

import torch
from bdhs_helpers import noisy_features
from conftest import TINY

from minialign import reference
from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.records import read_records
from minialign.logprobs import batches_that_fit
from minialign.pairs import distortion, image_batches
from minialign.pairs.distortion import DistortionSampler, likeliest_tokens, predict_under_noise
from minialign.pairs.pair_files import sample_pair_file
from minialign.utils.seeding import seeded_generator

NOISE_STEPS = 700


@torch.no_grad()
def reference_prediction(vlm, record, response, *key):
    """Predict the tokens of a response one by one, each from the true tokens before it."""
    features = noisy_features(vlm, record, NOISE_STEPS, *key)
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
    predicted = []
    for t in range(len(response)):
        logits = reference.next_token_logits(vlm.model, prompt_ids, features, response[:t])
        predicted.append(int(logits[-1].argmax()))
    return predicted


def test_every_token_is_predicted_from_the_true_ones(vlm, records):
    """Three records of different length together, against the slow loop."""
    # Arrange
    some_records = [records[0], records[1], replace(records[2], id="short", chosen="A red cup.")]
    prompts = []
    responses = []
    for record in some_records:
        prompts.append(encode_prompt(vlm.tokenizer, vlm.template, record.turns))
        responses.append(encode_response(vlm.tokenizer, vlm.template, record.chosen)[-14:])

    # Act
    predicted = predict_under_noise(
        vlm,
        prompts,
        [record.paths for record in some_records],
        responses,
        noise_steps=NOISE_STEPS,
        generators=[seeded_generator(9, record.id) for record in some_records],
    )

    # Assert
    for record, response, ids in zip(some_records, responses, predicted, strict=True):
        assert ids == reference_prediction(vlm, record, response, 9, record.id)
        # Without a difference, the test could not tell true from predicted context.
        assert ids[:-1] != response[:-1]


def test_rows_that_do_not_fit_together_are_read_apart(vlm, records, monkeypatch):
    """Of a large batch only so many rows are read at once, and the tokens are the same."""
    prompts = [encode_prompt(vlm.tokenizer, vlm.template, record.turns) for record in records[:2]]
    responses = [[8, 9, 10], [8, 9]]
    batch_sizes = []

    def read_batch(model, rows):
        batch_sizes.append(len(rows))
        return likeliest_tokens(model, rows)

    def predict():
        return predict_under_noise(
            vlm,
            prompts,
            [record.paths for record in records[:2]],
            responses,
            noise_steps=NOISE_STEPS,
            generators=[seeded_generator(0, record.id) for record in records[:2]],
        )

    monkeypatch.setattr(distortion, "likeliest_tokens", read_batch)
    together = predict()
    monkeypatch.setattr(image_batches, "batches_that_fit", partial(batches_that_fit, max_tokens=1))

    assert predict() == together
    assert batch_sizes == [2, 1, 1]


def test_predicted_tokens_are_those_of_the_first_part(vlm, monkeypatch):
    """It stands on another GPU, and finds token 7 most likely everywhere."""
    monkeypatch.setattr(distortion, "same_in_all_parts", lambda ids: torch.full_like(ids, 7))

    predicted = predict_under_noise(
        vlm,
        [[5]],
        [()],
        [[8, 9, 10]],
        noise_steps=NOISE_STEPS,
        generators=[seeded_generator(0)],
    )

    assert predicted == [[7, 7, 7]]


def test_distorted_pairs_can_be_read_back(vlm, records, tmp_path):
    """A rejected text has no end tokens, the group changes nothing, and training reads the file."""
    some_records = records[:3]
    path = tmp_path / "pairs.jsonl"
    sampler = DistortionSampler(vlm, NOISE_STEPS, 2)

    pairs = sample_pair_file(sampler, some_records, path, group_size=2)

    for record, pair in zip(some_records, pairs, strict=True):
        response = encode_response(vlm.tokenizer, vlm.template, record.chosen)
        ids = reference_prediction(vlm, record, response, 2, record.id, "noise")
        ids = [token_id for token_id in ids if token_id != vlm.tokenizer.eos]
        assert pair["rejected"] == vlm.tokenizer.decode(ids).strip()
        assert pair["rejected"] != record.chosen
        assert list(pair) == ["id", "image", "prompt", "chosen", "rejected", "noise", "seed"]
        assert pair["noise"] == NOISE_STEPS
        assert pair["seed"] == 2
        assert sampler.pairs([record]) == [pair]
    read = read_records([path], TINY / "train" / "images")
    for record, pair, read_record in zip(some_records, pairs, read, strict=True):
        assert read_record.id == record.id
        assert read_record.turns == record.turns
        assert read_record.chosen == record.chosen
        assert read_record.rejected == pair["rejected"]
