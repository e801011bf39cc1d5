"""BDHS: its rounds by hand and against the slow reference, and when it draws again."""

from dataclasses import replace

import pytest
from bdhs_helpers import (
    NOISE,
    NUM_IMAGE_TOKENS,
    ONE_ROUND,
    QUICK,
    GivenCosines,
    cuts_of,
    drawn_choices,
    make_sampler,
    sample_pairs,
    script_completions,
    unusual_records,
)
from conftest import set_device_memory

import sample
from minialign import reference, reference_bdhs
from minialign.data.chat_templates import encode_prompt
from minialign.generation.decoding import SamplingParams, prefill
from minialign.methods.base import encode_example
from minialign.pairs import bdhs
from minialign.pairs.bdhs import BdhsConfig, bdhs_sampler, generate_continuations, split_sentences
from minialign.training.options import parse_options

# --- completing sentences (Eq. 7)


def test_the_context_of_a_sentence_is_the_true_text_before_its_cut(vlm, records, monkeypatch):
    """Each request has read the chosen response up to its cut, and never an earlier completion."""
    decodings = script_completions(monkeypatch, vlm, " wrong.")
    record = records[0]

    (pair,) = sample_pairs(vlm, [record], ONE_ROUND)

    (requests,) = decodings
    num_sentences = len(split_sentences(record.chosen))
    assert len(requests) == len(pair["cuts"]) == num_sentences > 1
    example = encode_example(vlm, record, [record.chosen])
    (chosen_ids,) = example.responses
    prefix_length = len(example.prompt_ids) - 2 + NUM_IMAGE_TOKENS  # in positions
    num_masked = NUM_IMAGE_TOKENS - len(pair["visible"])
    for request, cut in zip(requests, pair["cuts"], strict=True):
        context = chosen_ids[: request.position - prefix_length]
        assert vlm.tokenizer.decode(context) == record.chosen[:cut].rstrip()
        # A masked image token has a position but no cache position.
        num_read = len(request.cache_positions) + len(request.input_ids) - 1
        assert num_read == request.position - num_masked
    for kept in pair["rejected"].split(" wrong.")[:-1]:
        assert kept.strip() in record.chosen


def test_a_completion_stops_at_the_first_token_with_a_full_stop(vlm, records, monkeypatch):
    """With the real model: stop tokens come last, and every other completion has full length."""
    completions = []

    def recording(*args):
        completions.extend(generate_continuations(*args))
        return completions

    monkeypatch.setattr(bdhs, "generate_continuations", recording)

    make_sampler(vlm, replace(ONE_ROUND, rho=0.5)).pairs(records[:8])

    assert len(completions) >= 8
    for ids in completions:
        is_stop = [i == vlm.tokenizer.eos or "." in vlm.tokenizer.token_text(i) for i in ids]
        assert not any(is_stop[:-1])
        assert is_stop[-1] or len(ids) == QUICK.max_new_tokens


def test_a_completion_stops_at_the_end_token_too(vlm, records, monkeypatch):
    """Eq. 7, with an end token as likely as a full stop: some completions end with it."""
    (full_stop,) = vlm.tokenizer.encode(".", after="text")
    end_id = vlm.tokenizer.eos
    vlm.model.lm_head.weight.data[end_id] = vlm.model.lm_head.weight.data[full_stop]
    completions = []

    def recording(*args):
        completions.extend(generate_continuations(*args))
        return completions

    monkeypatch.setattr(bdhs, "generate_continuations", recording)

    make_sampler(vlm, replace(ONE_ROUND, rho=0.5)).pairs(records[:8])

    ended = [ids for ids in completions if end_id in ids]
    assert len(ended) >= 3
    for ids in ended:
        assert ids.index(end_id) == len(ids) - 1


def test_a_guided_round_equals_the_reference(vlm, records):
    """All sentences of all records in one batch, against one after the other without a cache.

    A random number within rounding (1e-6) of a boundary would make a difference: odds of about 1
    in 5,000.
    """
    config = replace(ONE_ROUND, rho=0.95)
    some_records = unusual_records(records)

    pairs = sample_pairs(vlm, some_records, config)

    num_swapped = 0
    for record, pair in zip(some_records, pairs, strict=True):
        drawn = drawn_choices(record, config, 1)
        features = vlm.encode_images(record.paths)
        expected = reference_bdhs.guided_rejected(vlm, record, features, drawn)
        assert pair["rejected"] == expected
        assert pair["visible"] == drawn.visible
        assert pair["cuts"] == cuts_of(drawn)
        assert pair["rounds"] == 1
        for sentence in drawn.sentences:
            num_swapped += not record.chosen[sentence.start :].startswith(sentence.kept)
    # Among them were contexts that differ from the cache, so that several tokens are read again.
    assert num_swapped > 0


# --- writing whole responses


def whole_response(vlm, record, drawn):
    """Return the whole response of the slow reference under the mask that was drawn."""
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
    features = vlm.encode_images(record.paths)
    ids = reference.generate(
        vlm.model,
        prompt_ids,
        features,
        [],
        drawn.uniforms[0],
        {vlm.tokenizer.eos},
        set(drawn.visible),
    )
    return vlm.tokenizer.decode(ids).strip()


def test_the_last_round_writes_the_whole_response_under_the_mask(vlm, records):
    """All responses are too similar: round 3 starts from the prompt and ends with the end token."""
    pairs = sample_pairs(vlm, records[:3], QUICK, GivenCosines(1.0))

    for record, pair in zip(records[:3], pairs, strict=True):
        drawn = drawn_choices(record, QUICK, 3)
        assert pair["rejected"] == whole_response(vlm, record, drawn)
        assert pair["rounds"] == 3
        assert pair["visible"] == drawn.visible
        assert pair["cuts"] == []
        assert pair["similarity"] == 1.0


def test_only_the_end_token_stops_a_whole_response(vlm, records, monkeypatch):
    """A full stop ends a guided completion (Eq. 7), but not a whole response."""
    decodings = script_completions(monkeypatch, vlm, " One. Two.")

    (pair,) = sample_pairs(vlm, records[:1], replace(QUICK, rounds=2), GivenCosines(1.0))

    guided, whole = decodings
    assert all(len(request.stop_ids) > 1 for request in guided)
    assert [request.stop_ids for request in whole] == [{vlm.tokenizer.eos}]
    assert pair["rejected"] == "One. Two."


def test_unguided_every_round_writes_the_whole_response(vlm, records, monkeypatch):
    """No cuts in any round, and no full stop that ends it."""
    config = replace(QUICK, guided=False)

    pairs = sample_pairs(vlm, records[:2], config)

    for record, pair in zip(records[:2], pairs, strict=True):
        drawn = drawn_choices(record, config, 1)
        assert pair["rejected"] == whole_response(vlm, record, drawn)
        assert pair["rounds"] == 1
        assert pair["visible"] == drawn.visible
        assert pair["cuts"] == []

    decodings = script_completions(monkeypatch, vlm, " One. Two.")
    (pair,) = sample_pairs(vlm, records[:1], config, GivenCosines(1.0))
    assert len(decodings) == 3
    for (request,) in decodings:
        assert request.stop_ids == {vlm.tokenizer.eos}
    assert pair["rejected"] == "One. Two."
    assert pair["rounds"] == 3
    assert pair["cuts"] == []


# --- drawing again (Sec. 3.4.3)


def test_a_response_that_is_not_below_epsilon_is_drawn_again(vlm, records):
    """Cosines 0.97 (equal to eps_s), 0.99 and 0.5: the third round is returned."""
    config = replace(QUICK, rounds=5)

    (pair,) = sample_pairs(vlm, records[:1], config, GivenCosines(0.97, 0.99, 0.5))

    draws = [drawn_choices(records[0], config, round_number) for round_number in (1, 2, 3)]
    assert pair["rounds"] == 3
    assert pair["similarity"] == 0.5
    assert pair["visible"] == draws[2].visible
    assert pair["cuts"] == cuts_of(draws[2])
    # Each round has a new mask and new cuts.
    assert len({str((drawn.visible, cuts_of(drawn))) for drawn in draws}) == 3


def test_a_single_round_is_guided_and_returned_whatever_its_similarity(vlm, records):
    (pair,) = sample_pairs(vlm, records[:1], ONE_ROUND, GivenCosines(1.0))

    assert pair["rounds"] == 1
    assert len(pair["cuts"]) == len(split_sentences(records[0].chosen))
    assert pair["similarity"] == 1.0


def test_only_records_that_are_too_similar_are_drawn_again(vlm, records):
    pairs = sample_pairs(vlm, records[:3], QUICK, GivenCosines(0.0, 1.0, 0.0, 0.0))

    assert [pair["rounds"] for pair in pairs] == [1, 2, 1]
    assert [pair["id"] for pair in pairs] == [record.id for record in records[:3]]


def test_all_parts_of_a_model_draw_again_for_the_same_records(vlm, records, monkeypatch):
    """This part finds both responses similar. The first part, on another GPU, only one of them."""
    cosines_of_first_part = iter([0.9701, 0.9699, 0.5])
    monkeypatch.setattr(bdhs, "value_of_first_part", lambda cosine: next(cosines_of_first_part))

    pairs = sample_pairs(vlm, records[:2], QUICK, GivenCosines(0.9701))

    assert [pair["rounds"] for pair in pairs] == [2, 1]
    assert [pair["similarity"] for pair in pairs] == [0.5, 0.9699]


# --- what the random numbers depend on


def test_pairs_do_not_depend_on_the_other_records(vlm, records):
    """Neither the order of the records nor their number changes a pair."""
    forward = sample_pairs(vlm, records[:4])
    backward = sample_pairs(vlm, records[:4][::-1])
    alone = sample_pairs(vlm, records[1:2])

    assert forward == backward[::-1]
    assert forward[1:2] == alone


@pytest.mark.parametrize("config", [QUICK, NOISE], ids=["masked", "noisy"])
def test_online_draws_differ_from_step_to_step_and_are_reproducible(vlm, records, config):
    """They depend on (seed, step, record id, round): all of it the same gives the same pair."""
    sampler = make_sampler(vlm, config)

    pairs = sampler.pairs(records[:3], step=4)

    assert make_sampler(vlm, config).pairs(records[1:2], step=4) == pairs[1:2]
    another_step = sampler.pairs(records[:3], step=5)
    offline = sampler.pairs(records[:3])
    another_seed = make_sampler(vlm, config, seed=1).pairs(records[:3], step=4)
    for others in (another_step, offline, another_seed):
        for pair, other in zip(pairs, others, strict=True):
            assert (pair["cuts"], pair["rejected"]) != (other["cuts"], other["rejected"])
    if config is QUICK:
        drawn = drawn_choices(records[0], config, 1, seed=(0, 4))
        assert pairs[0]["visible"] == drawn.visible
        assert pairs[0]["cuts"] == cuts_of(drawn)


def test_records_that_do_not_fit_the_device_together_give_the_same_pairs(vlm, records, monkeypatch):
    """Without memory each record is read alone, in rounds of sentences and in the last one."""
    never_content = GivenCosines(1.0)
    together = sample_pairs(vlm, records[:3], QUICK, never_content)
    num_rows = []

    def recording(model, examples):
        num_rows.append(len(examples))
        return prefill(model, examples)

    monkeypatch.setattr(bdhs, "prefill", recording)
    set_device_memory(monkeypatch, 0)

    assert sample_pairs(vlm, records[:3], QUICK, never_content) == together
    assert num_rows == [1, 1, 1] * 3


# --- settings and result


def test_the_settings_reach_the_decoding(vlm, records, monkeypatch):
    """Number of tokens, temperature and top_p, in every round."""
    settings = []

    def recording(model, cache, requests, sampling):
        settings.append(sampling)
        return generate_continuations(model, cache, requests, sampling)

    monkeypatch.setattr(bdhs, "generate_continuations", recording)
    config = replace(QUICK, temperature=0.7, top_p=0.8)

    sample_pairs(vlm, records[:1], config, GivenCosines(1.0))

    assert settings == [SamplingParams(max_new_tokens=8, temperature=0.7, top_p=0.8)] * 3


@pytest.mark.parametrize("parse", [parse_options, sample.parse_options], ids=["train", "sample"])
def test_the_options_of_a_script_make_its_sampler(vlm, parse):
    """With noise nothing is masked. Without it there are no steps of noise."""
    words = "--rounds 2 --epsilon .8 --temperature .7 --top-p .6".split()
    words += "--max-new-tokens 5 --seed 8".split()
    masked = BdhsConfig(
        rho=0.9, rounds=2, epsilon=0.8, temperature=0.7, top_p=0.6, max_new_tokens=5
    )
    for more_words, expected in (
        ("--rho .9", masked),
        ("--by noise --noise-steps 300", replace(masked, rho=0.0, noise=300)),
        ("--rho .9 --unguided", replace(masked, guided=False)),
    ):
        sampler = bdhs_sampler(parse([*words, *more_words.split()]), vlm)
        assert sampler.config == expected
        assert sampler.seed == 8


def test_a_pair_holds_what_is_promised(vlm, records):
    (pair,) = sample_pairs(vlm, records[:1])

    assert list(pair) == [
        "id",
        "image",
        "prompt",
        "chosen",
        "rejected",
        "rounds",
        "similarity",
        "visible",
        "cuts",
        "completed",
        "seed",
    ]
    assert pair["id"] == records[0].id
    assert pair["image"] == records[0].image
    assert pair["prompt"] == records[0].turns[0]
    assert pair["chosen"] == records[0].chosen
