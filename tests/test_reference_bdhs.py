"""These tests hold the reference of BDHS to values by hand, and the fast code equal to it.

Texts are equal character for character. Both sides draw the same random numbers. With other seeds
one of the 600 or so numbers could lie within rounding (1e-6) of a boundary between two tokens, and
give another token: at most one run in 150, with ten boundaries a number.
"""

import math
from dataclasses import replace

import pytest
import torch

from minialign import reference_bdhs
from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.diffusion import diffuse
from minialign.pairs.bdhs import BdhsConfig, BdhsSampler
from minialign.pairs.distortion import predict_under_noise
from minialign.pairs.sentences import choose_cut, split_sentences
from minialign.pairs.similarity import ModelEmbeddings
from minialign.utils.seeding import seeded_generator

TEXTS = [
    "A cup.",
    "There is a red cup on the table. It is full.",
    "Yes, there is a dog. No, it is not red.",
    "No.",
    "yes",
    "Nothing is here. North of it is a lamp.",
    "Wow! Look.  A cup\nis here. 3.5 m",
    "Is it red?! No. It is (not) blue... or so",
    "A",
    "Ünï cödé is here, it is.",
]


@pytest.fixture(scope="module")
def texts_of_records(records):
    """Return records of real captions and answers, and of texts with unusual sentences."""
    chosen = [*TEXTS[2:4], TEXTS[6], TEXTS[9]]
    unusual = []
    for i, text in enumerate(chosen):
        unusual.append(replace(records[0], id=f"unusual {i}", chosen=text))
    several_turns = (records[1].turns[0], records[1].chosen, "And what else?")
    return [*records[:4], *unusual, replace(records[1], id="turns", turns=several_turns)]


# --- The parts of Algorithm 1, worked by hand


def test_one_step_of_diffusion_worked_by_hand():
    """At N = 0 there is one factor: beta_0 = sigmoid(-6) x 0.00499 + 0.00001 = 2.2338e-5."""
    pixels = torch.tensor([1.0, -1.0, 0.5])

    noisy = reference_bdhs.diffuse(pixels, 0, torch.Generator().manual_seed(0))

    noise = torch.randn(3, generator=torch.Generator().manual_seed(0))
    expected = math.sqrt(1 - 2.2338e-5) * pixels + math.sqrt(2.2338e-5) * noise
    torch.testing.assert_close(noisy, expected, rtol=0, atol=1e-6)


def test_sentences_worked_by_hand():
    text = "Wow! Look.  A cup\nis here. 3.5 m"

    sentences = [text[start:end] for start, end in reference_bdhs.split_sentences(text)]

    assert sentences == ["Wow!", "Look.", "A cup\nis here.", "3.5 m"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A red cup.", {"A", "A red"}),
        ("Yes, it is.", {"Yes,", "Yes, it", "No,", "No, it"}),
        ("Nothing is here.", {"Nothing", "Nothing is"}),  # not a no
        ("Cup.", {""}),  # a lone word goes
        ("No.", {"No", "Yes"}),  # but for a lone yes or no
    ],
)
def test_kept_parts_worked_by_hand(text, expected):
    """Fifty draws find all kept parts, each of which has a probability of 1/4 or more.

    With other seeds one of four is missed with a probability of 4 x 0.75^50 = 2.3e-6.
    """
    kept = set()
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        kept.add(reference_bdhs.cut_sentence(text, 0, len(text), generator).kept)

    assert kept == expected


def test_guided_response_worked_by_hand(vlm, records, monkeypatch):
    """Completions end at their first full stop, and gaps between the sentences stay.

    The first sentence keeps "A", the second nothing, so its completion loses its leading space.
    """
    record = replace(records[0], chosen="A cup.\n\nIt is red.")
    completions = [" lamp... And", " Dogs. Cats."]
    monkeypatch.setattr(reference_bdhs, "complete", lambda *args, **kwargs: completions.pop(0))
    sentences = [
        reference_bdhs.CutSentence(start=0, end=6, cut=2, kept="A"),
        reference_bdhs.CutSentence(start=8, end=18, cut=8, kept=""),
    ]
    choices = reference_bdhs.RoundChoices(visible=[], sentences=sentences, uniforms=[None, None])

    rejected = reference_bdhs.guided_rejected(vlm, record, [], choices)

    assert rejected == "A lamp.\n\nDogs."


def test_cosine_worked_by_hand():
    assert reference_bdhs.cosine(torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0])) == (
        pytest.approx(0.6)
    )


# --- The parts of Algorithm 1, equal to the reference


@pytest.mark.parametrize("text", TEXTS)
def test_sentences_equal_the_reference(text):
    assert split_sentences(text) == reference_bdhs.split_sentences(text)


@pytest.mark.parametrize("text", TEXTS)
def test_cuts_equal_the_reference(text):
    """Fifty draws of every sentence reach every cut, swapped or not."""
    for start, end in split_sentences(text):
        for seed in range(50):
            fast = choose_cut(text, start, end, generator=torch.Generator().manual_seed(seed))

            generator = torch.Generator().manual_seed(seed)
            slow = reference_bdhs.cut_sentence(text, start, end, generator)
            assert (fast.start, fast.end, fast.cut) == (slow.start, slow.end, slow.cut)
            assert fast.kept == slow.kept


@pytest.mark.parametrize("noise_steps", [0, 1, 500, 999])
def test_diffusion_equals_the_reference(noise_steps):
    """The product of up to 1,000 factors is float64 in both, the pixels are fp32."""
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    fast = diffuse(pixels, noise_steps, torch.Generator().manual_seed(1))

    slow = reference_bdhs.diffuse(pixels, noise_steps, torch.Generator().manual_seed(1))
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-6)


# --- Algorithm 1 as a whole


def reference_pair(vlm, record, config, similarity):
    """Return what the reference's Algorithm 1 gives for a record with seed 0."""
    settings = reference_bdhs.BdhsSettings(
        rho=config.rho,
        epsilon=config.epsilon,
        max_new_tokens=config.max_new_tokens,
        noise_steps=config.noise,
    )
    generators = []
    noise_generators = []
    for round_number in range(1, config.rounds + 1):
        generators.append(seeded_generator(0, record.id, round_number))
        noise_generators.append(seeded_generator(0, record.id, round_number, "noise"))
    return reference_bdhs.bdhs_pair(
        vlm,
        record,
        lambda text: similarity.embed([text])[0],
        settings,
        generators=generators,
        noise_generators=noise_generators,
    )


def check_equal(fast, slow, config):
    """Compare a pair of BdhsSampler with the reference's, its trace included."""
    is_free = config.rounds > 1 and slow.rounds == config.rounds
    cuts = [] if is_free else [sentence.cut for sentence in slow.choices.sentences]
    assert fast["rejected"] == slow.rejected
    assert fast["rounds"] == slow.rounds
    assert fast["similarity"] == pytest.approx(slow.similarity, abs=1e-5)  # six digits are kept
    assert fast["cuts"] == cuts
    if config.noise == 0:
        assert fast["visible"] == slow.choices.visible


def test_one_guided_round_equals_the_reference(vlm, texts_of_records):
    """All sentences of all records decode as one batch. At least one answer has been swapped."""
    config = BdhsConfig(rho=0.95, rounds=1, max_new_tokens=8)
    similarity = ModelEmbeddings(vlm.model, vlm.tokenizer)

    pairs = BdhsSampler(vlm, config, similarity, 0).pairs(texts_of_records)

    num_swapped = 0
    for record, pair in zip(texts_of_records, pairs, strict=True):
        slow = reference_pair(vlm, record, config, similarity)
        check_equal(pair, slow, config)
        for sentence in slow.choices.sentences:
            num_swapped += not record.chosen[sentence.start :].startswith(sentence.kept)
    assert num_swapped > 0


def test_algorithm_1_equals_the_reference(vlm, records):
    """Three rounds with a threshold such that some records need one, some two, and some all."""
    config = BdhsConfig(rho=0.5, rounds=3, epsilon=0.8, max_new_tokens=8)
    similarity = ModelEmbeddings(vlm.model, vlm.tokenizer)

    pairs = BdhsSampler(vlm, config, similarity, 0).pairs(records[:8])

    for record, pair in zip(records, pairs, strict=False):
        check_equal(pair, reference_pair(vlm, record, config, similarity), config)
    assert {pair["rounds"] for pair in pairs} == {1, 2, 3}


def test_bdhs_noise_equals_the_reference(vlm, texts_of_records):
    """Noise on the pixels in place of the mask, another noise each round."""
    config = BdhsConfig(rho=0.0, rounds=2, epsilon=0.8, max_new_tokens=8, noise=500)
    similarity = ModelEmbeddings(vlm.model, vlm.tokenizer)
    some = texts_of_records[2:6]

    pairs = BdhsSampler(vlm, config, similarity, 0).pairs(some)

    for record, pair in zip(some, pairs, strict=True):
        check_equal(pair, reference_pair(vlm, record, config, similarity), config)
    assert {pair["rounds"] for pair in pairs} == {1, 2}


# --- Image distortion


def test_distortion_equals_the_reference(vlm, records):
    """Responses of different lengths in one batch. Some tokens differ from y+, some do not."""
    some = [records[0], records[1], replace(records[2], id="short", chosen="A red cup.")]
    prompts = []
    responses = []
    generators = []
    for record in some:
        prompts.append(encode_prompt(vlm.tokenizer, vlm.template, record.turns))
        responses.append(encode_response(vlm.tokenizer, vlm.template, record.chosen))
        generators.append(seeded_generator(0, record.id, "noise"))

    predicted = predict_under_noise(
        vlm,
        prompts,
        [record.paths for record in some],
        responses,
        noise_steps=500,
        generators=generators,
    )

    num_changed = 0
    num_tokens = 0
    for record, response, predicted_ids in zip(some, responses, predicted, strict=True):
        generator = seeded_generator(0, record.id, "noise")
        assert predicted_ids == reference_bdhs.distorted_ids(vlm, record, 500, generator)
        num_changed += sum(a != b for a, b in zip(response, predicted_ids, strict=True))
        num_tokens += len(response)
    assert 0 < num_changed < num_tokens
