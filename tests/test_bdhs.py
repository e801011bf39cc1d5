"""Bias-Driven Hallucination Sampling: each step of Alg. 1 by hand, the round against its slow twin, and files that restarts leave alone."""

import copy
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import TINY, each_token

import sample
from minialign import reference, reference_bdhs
from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.diffusion import diffuse
from minialign.data.image_processor import preprocess
from minialign.data.images import open_image
from minialign.data.packing import PackedExample
from minialign.data.records import read_records
from minialign.generation.decoding import SamplingParams
from minialign.methods.base import encode_example
from minialign.models.policy import Policy
from minialign.pairs import bdhs
from minialign.pairs.bdhs import (
    BdhsConfig,
    BdhsSampler,
    bdhs_sampler,
    choose_cut,
    sample_round,
    split_sentences,
)
from minialign.pairs.distortion import DistortionSampler, noisy_image_features, predict_under_noise
from minialign.pairs.pair_files import sample_pair_file
from minialign.pairs.similarity import PolicyEmbeddings
from minialign.training.options import parse_options
from minialign.utils.files import InputError
from minialign.utils.seeding import seeded_generator

QUICK = BdhsConfig(rho=0.97, rounds=3, max_new_tokens=8)
NOISE = replace(QUICK, rho=0.0, noise=500)


class Cosines:
    """A similarity that gives these values in turn, then the last for ever."""

    name = "given"

    def __init__(self, *values):
        self.values = list(values)

    def cosine(self, a, b):
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


def sampler_of(vlm, settings=QUICK, similarity=None, seed=0):
    return BdhsSampler(vlm, settings, similarity or Cosines(0.0), seed)


def pairs_of(vlm, records, settings=QUICK, similarity=None):
    return sampler_of(vlm, settings, similarity).pairs(records)


def scripted(monkeypatch, vlm, *texts):
    """Let every decode write these texts in turn, over and over, instead of asking the model; returns what it was asked."""
    asked, turn = [], iter(range(10**6))

    def write(model, cache, starts, *rest):
        asked.append(starts)
        return [vlm.tokenizer.encode(texts[next(turn) % len(texts)], after="text") for _ in starts]

    monkeypatch.setattr(bdhs, "generate_continuations", write)
    return asked


# --- restricting the picture (Eq. 6) ---


def gradients(policy, value):
    parameters = list(policy.parameters().values())
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(torch.autograd.grad(value, parameters, allow_unused=True), parameters)
        ]
    )


@pytest.mark.parametrize("visible", [[], [0], [63], [3, 17, 40], list(range(64))])
def test_leaving_vectors_out_equals_masking_them(vlm, records, visible):
    """Dropped vectors against plain's mask over the whole sequence: token log-probs and all gradients of decoder and projector."""
    policy, example = (
        Policy(vlm.model, 0, 1),
        encode_example(vlm, records[1], [records[1].chosen]),
    )
    features, response = vlm.encode_images(records[1].paths), example.responses[0]
    (dropped,) = each_token(
        vlm.model, [PackedExample.of(example.prompt_ids, features, [response], visible)]
    )
    logits = reference.next_token_logits(
        vlm.model, example.prompt_ids, features, response[:-1], set(visible)
    )[-len(response) :]
    masked = torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]
    torch.testing.assert_close(dropped, masked, rtol=1e-5, atol=1e-5)
    ours, theirs = gradients(policy, dropped.sum()), gradients(policy, masked.sum())
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


@pytest.mark.parametrize("rho", [0.5, 0.97, 0.99])
def test_the_share_of_visible_vectors_is_1_minus_rho(rho):
    """100 records of 640 vectors: within 5 standard deviations of the binomial (false alarm for another seed: 5.7e-7)."""
    counts = [
        len(sample_round("A.", 640, BdhsConfig(rho=rho), generator=seeded_generator(0, record, 1)).visible)
        for record in range(100)
    ]
    n = 100 * 640
    assert abs(sum(counts) - n * (1 - rho)) <= 5 * (n * rho * (1 - rho)) ** 0.5


def test_every_vector_has_the_same_chance():
    """1,000 draws of 64 vectors at rho .5: each position's count within 5 standard deviations (false alarm: 64 * 5.7e-7 = 3.7e-5)."""
    counts = Counter(
        i
        for record in range(1000)
        for i in sample_round("A.", 64, BdhsConfig(rho=0.5), generator=seeded_generator(1, record, 1)).visible
    )
    assert all(abs(counts[i] - 500) <= 5 * 250**0.5 for i in range(64))


def test_rho_0_hides_nothing_and_rho_1_everything():
    assert sample_round("A.", 64, BdhsConfig(rho=0.0), generator=seeded_generator(0)).visible == list(
        range(64)
    )
    assert sample_round("A.", 64, BdhsConfig(rho=1.0), generator=seeded_generator(0)).visible == []


# --- sentences and cuts (Eq. 7) ---


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("One dog. Two cats.", ["One dog.", "Two cats."]),
        ("One dog", ["One dog"]),  # no final stop
        ("Really?!  Yes... Good", ["Really?!", "Yes...", "Good"]),  # runs of stops, several spaces
        (
            "It costs 3.5 euros. Fine.",
            ["It costs 3.5 euros.", "Fine."],
        ),  # a point inside a number ends nothing
        (
            "First.\n\n- a\n- b\nLast one.",
            ["First.", "- a\n- b\nLast one."],
        ),  # a line break alone ends nothing
        (
            "Mr. Smith waits.",
            ["Mr.", "Smith waits."],
        ),  # known weakness: an abbreviation ends a sentence
        (
            'He said "Hi." Then left.',
            ['He said "Hi." Then left.'],
        ),  # known weakness: a quote after the stop hides it
        (" \n ", []),
    ],
)
def test_split_sentences(text, sentences):
    assert [text[start:end] for start, end in split_sentences(text)] == sentences


def test_cuts_fall_on_every_word_start_but_the_first_and_keep_y_verbatim():
    """Cuts of 400 seeds for the second sentence: all three inner word starts, each within 5 sd of 133 (false alarm: 3 * 5.7e-7)."""
    text = "One dog. There is a cup."
    cuts = [choose_cut(text, 9, 24, generator=seeded_generator(0, n)) for n in range(400)]
    counts = Counter(one.cut for one in cuts)
    assert set(counts) == {15, 18, 20} and all(
        abs(n - 400 / 3) <= 5 * (400 * 2 / 9) ** 0.5 for n in counts.values()
    )
    assert {(one.cut, one.kept) for one in cuts} == {
        (15, "There"),
        (18, "There is"),
        (20, "There is a"),
    }


def test_a_lone_word_is_cut_before_it_unless_it_answers():
    one = choose_cut("Cup.", 0, 4, generator=seeded_generator(0))
    assert (one.cut, one.kept) == (0, "")
    assert {choose_cut("Yes.", 0, 4, generator=seeded_generator(n)).kept for n in range(20)} == {"Yes", "No"}


@pytest.mark.parametrize(
    "text, answer, opposite",
    [
        ("Yes, a cup is here.", "Yes", "No"),
        ("no, there is a cup.", "no", "yes"),
        ("No.", "No", "Yes"),
    ],
)
def test_yes_and_no_are_swapped_half_of_the_time(text, answer, opposite):
    """4,000 seeds: within 5 standard deviations of 2,000 (false alarm: 5.7e-7). What follows the word stays y+ verbatim."""
    cuts = [choose_cut(text, 0, len(text), generator=seeded_generator(1, n)) for n in range(4000)]
    swapped = [one for one in cuts if not one.kept.startswith(answer)]
    assert abs(len(swapped) - 2000) <= 5 * 1000**0.5
    assert all(
        opposite + one.kept.removeprefix(opposite) == one.kept
        and text.startswith(answer + one.kept.removeprefix(opposite))
        for one in swapped
    )


@pytest.mark.parametrize(
    "text",
    ["Nothing is here.", "North of it lies a park.", "Yesterday it rained.", "I say yes to it."],
)
def test_words_that_only_begin_like_an_answer_are_not_swapped(text):
    assert all(
        text.startswith(choose_cut(text, 0, len(text), generator=seeded_generator(n)).kept) for n in range(50)
    )


# --- joining ---


def test_sentences_are_joined_as_in_alg_1(vlm, records, monkeypatch):
    """rejected = for each sentence: its kept part verbatim, then what was written up to its first full stop; y+'s own spacing between them."""
    text = "There is a cup.\n\nA red dog is here!  It sleeps on the floor"
    scripted(monkeypatch, vlm, " blue lamp. And more. Still more.", " and a cat", " now.")
    (pair,) = pairs_of(vlm, [replace(records[0], chosen=text)], replace(QUICK, rounds=1))
    first, second, third = (
        text[start:cut].rstrip() for (start, _), cut in zip(split_sentences(text), pair["cuts"])
    )
    assert pair["rejected"] == f"{first} blue lamp.\n\n{second} and a cat  {third} now."


def test_completions_begin_after_the_kept_part_of_the_true_text(vlm, records, monkeypatch):
    """What each decode start has read is y+ up to the cut, true sentences before it, never an earlier completion; and no more."""
    asked = scripted(monkeypatch, vlm, " wrong.")
    text = records[0].chosen
    (pair,) = pairs_of(vlm, records[:1], replace(QUICK, rounds=1))
    example = encode_example(vlm, records[0], [text])
    (starts,) = asked
    assert len(starts) == len(split_sentences(text)) == len(pair["cuts"]) > 1
    vectors = 64 - len(pair["visible"])
    for start, cut in zip(starts, pair["cuts"]):
        given = example.responses[0][: start.position - (len(example.prompt_ids) - 2 + 64)]
        assert vlm.tokenizer.decode(given) == text[:cut].rstrip()
        assert (
            len(start.cache_positions) + len(start.input_ids) - 1 == start.position - vectors
        )  # hidden vectors have no slot but keep their position
    for sentence in pair["rejected"].split(" wrong.")[:-1]:
        assert sentence.strip() in text


def test_decoding_stops_at_the_first_token_with_a_full_stop(vlm, records, monkeypatch):
    """With the real model: no token but the last has a full stop in it or is the end token, and nobody stopped for another reason."""
    written, decode = [], bdhs.generate_continuations
    monkeypatch.setattr(
        bdhs, "generate_continuations", lambda *args: written.extend(decode(*args)) or written
    )
    sampler, text_of = (
        sampler_of(vlm, replace(QUICK, rounds=1, rho=0.5)),
        vlm.tokenizer.token_text,
    )
    sampler.pairs(records[:8])
    assert len(written) >= 8
    for new in written:
        stops = ["." in text_of(id) or id == vlm.tokenizer.eos for id in new]
        assert not any(stops[:-1]) and (stops[-1] or len(new) == QUICK.max_new_tokens)


def test_text_behind_the_first_full_stop_of_a_token_is_dropped(vlm, records, monkeypatch):
    """A token may hold more than its stop: what was written as '(a cup.) Then' ends after the stop."""
    scripted(monkeypatch, vlm, " (a cup.) Then")
    (pair,) = pairs_of(vlm, [replace(records[0], chosen="There is.")], replace(QUICK, rounds=1))
    assert pair["rejected"] == "There (a cup."


def test_a_lone_word_in_the_middle_leaves_single_spaces(vlm, records, monkeypatch):
    """'Mr.' is a sentence of one word: its completion begins with a space, and so does what stood before it."""
    scripted(monkeypatch, vlm, " lamp.")
    (pair,) = pairs_of(
        vlm,
        [replace(records[0], chosen="There is a cup. Really? It is red.")],
        replace(QUICK, rounds=1),
    )
    assert "  " not in pair["rejected"]


# --- the round against its slow twin ---


def odd_records(records):
    """Captions and answers of the file, and texts with unusual seams: two answers, lone words, line breaks, exclamation marks, several turns."""
    texts = [
        "Yes, there is a dog. No, it is not red.",
        "No.",
        "Wow! Look.  A cup\nis here. 3.5 m",
        "Ünï cödé is here, it is.",
    ]
    own = [replace(records[0], id=f"odd-{n}", chosen=text) for n, text in enumerate(texts)]
    turns = (records[1].turns[0], records[1].chosen, "And what else?")
    return [*records[:4], *own, replace(records[1], id="turns", turns=turns)]


def test_a_guided_round_equals_the_slow_twin(vlm, records):
    """Every record's rejected text, all sentences of all records decoded together, against plain.guided_rejected: masked, not dropped,
    each sentence's context read anew, nothing cached. A draw within rounding (1e-6) of a boundary would differ: odds about 1 in 5,000."""
    settings, swapped = replace(QUICK, rounds=1, rho=0.95), 0
    some = odd_records(records)
    for record, pair in zip(some, pairs_of(vlm, some, settings)):
        own = sample_round(record.chosen, 64, settings, generator=seeded_generator(0, record.id, 1))
        assert (
            pair["visible"] == own.visible
            and pair["cuts"] == [sentence.cut for sentence in own.sentences]
            and pair["rounds"] == 1
        )
        swapped += any(not record.chosen[one.start :].startswith(one.kept) for one in own.sentences)
        slow = reference_bdhs.guided_rejected(vlm, record, vlm.encode_images(record.paths), own)
        assert pair["rejected"] == slow
    assert swapped  # the case that feeds tokens again was among them


def test_the_last_round_is_unguided_under_the_mask(vlm, records):
    """All too similar: round 3 writes the whole response, from the prompt alone, until the end token, its mask on."""
    written = pairs_of(vlm, records[:3], QUICK, Cosines(1.0))
    for record, pair in zip(records, written):
        own = sample_round(record.chosen, 64, QUICK, generator=seeded_generator(0, record.id, 3))
        prompt = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
        slow = reference.generate(
            vlm.model,
            prompt,
            vlm.encode_images(record.paths),
            [],
            own.uniforms[0],
            {vlm.tokenizer.eos},
            set(own.visible),
        )
        assert pair["rejected"] == vlm.tokenizer.decode(slow).strip()
        assert (pair["rounds"], pair["visible"], pair["cuts"], pair["similarity"]) == (
            3,
            own.visible,
            [],
            1.0,
        )


def test_only_the_end_token_stops_an_unguided_response(vlm, records, monkeypatch):
    """A full stop ends a guided completion (Eq. 7), not a whole response."""
    asked = scripted(monkeypatch, vlm, " One. Two.")
    (pair,) = pairs_of(vlm, records[:1], replace(QUICK, rounds=2), Cosines(1.0))
    guided, free = asked
    assert all(len(start.stop_ids) > 1 for start in guided) and [
        start.stop_ids for start in free
    ] == [{vlm.tokenizer.eos}]
    assert pair["rejected"] == "One. Two."


# --- the semantic check ---


def test_a_draw_that_is_not_below_epsilon_is_drawn_again(vlm, records):
    """Cosines .97 (equal to eps_s: again), .99 (again), .5: round 3 is returned, with a new mask and new cuts."""
    settings = replace(QUICK, rounds=5)
    (pair,) = pairs_of(vlm, records[:1], settings, Cosines(0.97, 0.99, 0.5))
    own = sample_round(records[0].chosen, 64, settings, generator=seeded_generator(0, records[0].id, 3))
    assert (pair["rounds"], pair["similarity"]) == (3, 0.5)
    assert pair["visible"] == own.visible and pair["cuts"] == [
        sentence.cut for sentence in own.sentences
    ]
    draws = [
        sample_round(records[0].chosen, 64, settings, generator=seeded_generator(0, records[0].id, number))
        for number in (1, 2, 3)
    ]
    assert len({str((one.visible, [s.cut for s in one.sentences])) for one in draws}) == 3


def test_a_single_round_is_guided_and_returned_whatever_its_similarity(vlm, records):
    (pair,) = pairs_of(vlm, records[:1], replace(QUICK, rounds=1), Cosines(1.0))
    assert (
        pair["rounds"] == 1
        and len(pair["cuts"]) == len(split_sentences(records[0].chosen))
        and pair["similarity"] == 1.0
    )


def test_only_records_that_are_too_similar_are_drawn_again(vlm, records):
    pairs = pairs_of(vlm, records[:3], QUICK, Cosines(0.0, 1.0, 0.0, 0.0))
    assert [pair["rounds"] for pair in pairs] == [1, 2, 1] and [pair["id"] for pair in pairs] == [
        record.id for record in records[:3]
    ]


def test_own_embeddings(vlm, monkeypatch):
    """1 for the same text, below it for another word or another order, symmetric; the table is a copy, which training leaves alone."""
    encoder, encode = PolicyEmbeddings(vlm.model, vlm.tokenizer), vlm.tokenizer.encode
    text, word, order = (
        "There is a red cup at the top.",
        "There is a red dog at the top.",
        "There is a top at the red cup.",
    )
    assert encoder.cosine(text, text) == pytest.approx(1, abs=1e-6)
    assert max(encoder.cosine(text, word), encoder.cosine(text, order)) < 1 - 1e-3
    assert encoder.cosine(text, word) == pytest.approx(encoder.cosine(word, text), abs=1e-6)
    before, (a, b) = encoder.cosine(text, word), encode(text)[:2]
    forth_and_back = {
        "forth": [a, b, encoder.tokenizer.eos],
        "back": [b, a, encoder.tokenizer.eos],
    }  # the same neighbours, each pair the other way round
    with monkeypatch.context() as patch:
        patch.setattr(vlm.tokenizer, "encode", forth_and_back.get)
        assert encoder.cosine("forth", "back") < 1 - 1e-3
    vlm.model.language_model.embed_tokens.weight.data.mul_(-2).add_(1)
    assert encoder.cosine(text, word) == before and -1 <= encoder.cosine(text, "") <= 1


# --- a noisy picture in the mask's place (BDHS-noise) ---


def noised(vlm, record, steps, *seed):
    """Features of a record's picture with the noise that a generator seeded so draws."""
    tiles, size = preprocess(open_image(record.paths[0]), vlm.image_processor)
    return vlm.model.encode_images([(diffuse(tiles, steps, seeded_generator(*seed)), size)])


def slow_noise(vlm, record, number):
    """A guided round of BDHS-noise by the slow twin: every vector visible, the noise of (seed, record id, round)."""
    own, features = (
        sample_round(record.chosen, 64, NOISE, generator=seeded_generator(0, record.id, number)),
        noised(vlm, record, 500, 0, record.id, number, "noise"),
    )
    return reference_bdhs.guided_rejected(vlm, record, features, replace(own, visible=range(64)))


def test_noise_hides_no_vector_and_is_the_records_own(vlm, records):
    """Each pair is the slow twin's on the picture diffused by (seed, record id, round, "noise"), nothing masked; its trace says noise."""
    some = odd_records(records)[2:6]
    for record, pair in zip(some, pairs_of(vlm, some, replace(NOISE, rounds=1))):
        assert pair["rejected"] == slow_noise(vlm, record, 1)
        assert (
            pair["noise"] == 500
            and "visible" not in pair
            and len(pair["cuts"]) == len(split_sentences(record.chosen))
        )


def watched(monkeypatch):
    """The tiles of every picture that is diffused from here on."""
    seen, look = [], noisy_image_features
    monkeypatch.setattr(
        bdhs, "noisy_image_features", lambda *args: seen.append(look(*args)) or seen[-1]
    )
    return lambda: [features.tiles for (features,) in seen]


def test_a_new_round_draws_new_noise(vlm, records, monkeypatch):
    """Also the last, unguided one; the pair is the slow twin's of the round that it settled in."""
    tiles, record = watched(monkeypatch), records[0]
    (pair,) = pairs_of(vlm, [record], NOISE, Cosines(1.0, 0.0))
    assert pair["rounds"] == 2 and pair["rejected"] == slow_noise(vlm, record, 2)
    pairs_of(vlm, [record], replace(NOISE, rounds=3), Cosines(1.0))
    wanted = [
        noised(vlm, record, 500, 0, record.id, number, "noise")[0].tiles
        for number in (1, 2, 1, 2, 3)
    ]
    assert len(tiles()) == 5 and all(map(torch.equal, tiles(), wanted))


def test_noisy_pairs_do_not_depend_on_the_group(vlm, records, tmp_path):
    """Pictures are looked at one by one, since company would move the last bits: groups of 1 and 4 write the same bytes."""
    for group in (1, 4):
        run(vlm, records[:6], tmp_path / f"{group}.jsonl", group, settings=NOISE)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "4.jsonl").read_bytes()


@pytest.mark.parametrize("parse", [parse_options, sample.parse_options], ids=["train", "sample"])
def test_the_options_of_a_script_make_its_sampler(vlm, parse):
    """With noise no vector is hidden, without it --noise-steps means nothing."""
    words = "--rho .9 --rounds 2 --epsilon .8 --temperature .7 --top-p .6 --max-new-tokens 5 --noise-steps 300 --seed 8".split()
    wanted = BdhsConfig(0.9, 2, 0.8, 0.7, 0.6, 5)
    for added, settings in (
        ([], wanted),
        (["--by", "noise"], replace(wanted, rho=0.0, noise=300)),
        (["--unguided"], replace(wanted, guided=False)),
    ):
        sampler = bdhs_sampler(parse(words + added), vlm)
        assert (sampler.config, sampler.seed) == (settings, 8)


# --- unguided, and online ---


def test_unguided_every_round_writes_the_whole_response_under_the_mask(vlm, records, monkeypatch):
    """No cuts in any round, no full stop that ends it, from the prompt alone; the first round's text is the slow twin's."""
    settings = replace(QUICK, guided=False)
    for record, pair in zip(records[:2], pairs_of(vlm, records[:2], settings)):
        own = sample_round(record.chosen, 64, settings, generator=seeded_generator(0, record.id, 1))
        prompt = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
        slow = reference.generate(
            vlm.model,
            prompt,
            vlm.encode_images(record.paths),
            [],
            own.uniforms[0],
            {vlm.tokenizer.eos},
            set(own.visible),
        )
        assert pair["rejected"] == vlm.tokenizer.decode(slow).strip() and (
            pair["rounds"],
            pair["visible"],
            pair["cuts"],
        ) == (1, own.visible, [])
    asked = scripted(monkeypatch, vlm, " One. Two.")
    (pair,) = pairs_of(vlm, records[:1], settings, Cosines(1.0))
    assert [[start.stop_ids for start in starts] for starts in asked] == [[{vlm.tokenizer.eos}]] * 3
    assert (pair["rejected"], pair["rounds"], pair["cuts"]) == ("One. Two.", 3, [])


@pytest.mark.parametrize("settings", [QUICK, NOISE])
def test_online_draws_differ_from_step_to_step_and_are_reproducible(vlm, records, settings):
    """Of (seed, step, record id, round) alone: again the same, also in other company; another step, or none, is another draw."""
    sampler = sampler_of(vlm, settings)
    pairs = sampler.pairs(records[:3], 4)
    assert sampler_of(vlm, settings).pairs(records[1:2], 4) == pairs[1:2]
    others = [sampler.pairs(records[:3], step) for step in (5, None)] + [
        sampler_of(vlm, settings, seed=1).pairs(records[:3], 4)
    ]
    assert all(
        pair["cuts"] != other["cuts"] or pair["rejected"] != other["rejected"]
        for some in others
        for pair, other in zip(pairs, some)
    )
    if settings is QUICK:
        own = sample_round(
            records[0].chosen, 64, settings, generator=seeded_generator((0, 4), records[0].id, 1)
        )
        assert (pairs[0]["visible"], pairs[0]["cuts"]) == (
            own.visible,
            [sentence.cut for sentence in own.sentences],
        )


def test_online_noise_is_new_in_every_step(vlm, records, monkeypatch):
    """What the pictures look like, apart from cuts and draws: by (seed, step, record id, round, "noise")."""
    tiles = watched(monkeypatch)
    for step in (4, 4, 5):
        sampler_of(vlm, replace(NOISE, rounds=1)).pairs(records[:1], step)
    first, again, other = tiles()
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(
        first, noised(vlm, records[0], 500, (0, 4), records[0].id, 1, "noise")[0].tiles
    )


# --- the teacher-forced distortion (Sec. 3.3) ---


@torch.no_grad()
def slow_distortion(vlm, record, response, *seed):
    """Token by token: the most likely one under the noisy picture, after the TRUE tokens before it."""
    features, prompt = (
        noised(vlm, record, 700, *seed),
        encode_prompt(vlm.tokenizer, vlm.template, record.turns),
    )
    return [
        int(reference.next_token_logits(vlm.model, prompt, features, response[:t])[-1].argmax())
        for t in range(len(response))
    ]


def test_distortion_predicts_every_token_after_the_true_ones(vlm, records):
    """Against the slow loop, three records of unlike length together; some tokens differ from y+, or its context could be either."""
    some = [records[0], records[1], replace(records[2], id="short", chosen="A red cup.")]
    responses = [
        encode_response(vlm.tokenizer, vlm.template, record.chosen)[-14:] for record in some
    ]
    prompts = [encode_prompt(vlm.tokenizer, vlm.template, record.turns) for record in some]
    found = predict_under_noise(
        vlm,
        prompts,
        [record.paths for record in some],
        responses,
        noise_steps=700,
        generators=[seeded_generator(9, record.id) for record in some],
    )
    assert found == [
        slow_distortion(vlm, record, response, 9, record.id)
        for record, response in zip(some, responses)
    ]
    assert all(any(a != b for a, b in zip(new[:-1], old)) for new, old in zip(found, responses))


def test_distorted_pairs_are_texts_that_can_be_read_back(vlm, records, tmp_path):
    """The ids' text without end tokens, noise by (seed, record id); the group changes nothing, and training reads the file."""
    some = records[:3]
    pairs = sample_pair_file(DistortionSampler(vlm, 700, 2), some, tmp_path / "pairs.jsonl", group_size=2)
    for record, pair in zip(some, pairs):
        ids = slow_distortion(
            vlm,
            record,
            encode_response(vlm.tokenizer, vlm.template, record.chosen),
            2,
            record.id,
            "noise",
        )
        assert list(pair) == ["id", "image", "prompt", "chosen", "rejected", "noise", "seed"] and (
            pair["noise"],
            pair["seed"],
        ) == (700, 2)
        assert (
            pair["rejected"]
            == vlm.tokenizer.decode([id for id in ids if id != vlm.tokenizer.eos]).strip()
            != record.chosen
        )
    assert [
        pair for record in some for pair in DistortionSampler(vlm, 700, 2).pairs([record])
    ] == pairs
    read = read_records([tmp_path / "pairs.jsonl"], TINY / "train" / "images")
    assert [(r.id, r.turns, r.chosen, r.rejected) for r in read] == [
        (r.id, r.turns, r.chosen, pair["rejected"]) for r, pair in zip(some, pairs)
    ]


def test_the_settings_reach_the_decoding(vlm, records, monkeypatch):
    """Budget, temperature and top_p, in every round."""
    seen, decode = [], bdhs.generate_continuations
    monkeypatch.setattr(
        bdhs, "generate_continuations", lambda *given: seen.append(given[3:]) or decode(*given)
    )
    pairs_of(vlm, records[:1], replace(QUICK, temperature=0.7, top_p=0.8), Cosines(1.0))
    assert seen == [(SamplingParams(8, 0.7, 0.8),)] * 3


# --- the same pairs, however they are made ---


def run(vlm, records, path, group, resume=False, settings=QUICK, **changes):
    sampler = sampler_of(vlm, settings, PolicyEmbeddings(vlm.model, vlm.tokenizer), **changes)
    return sample_pair_file(sampler, records, path, group_size=group, resume=resume)


def test_pairs_do_not_depend_on_the_group(vlm, records, tmp_path):
    """Groups of 1, 4 and 32: the same bytes. A draw within rounding (1e-6) of a boundary could differ: odds about 1 in 1,000 for new weights."""
    some = odd_records(records)
    files = [tmp_path / f"{group}.jsonl" for group in (1, 4, 32)]
    for group, path in zip((1, 4, 32), files):
        run(vlm, some, path, group)
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1.jsonl",
        "32.jsonl",
        "4.jsonl",
    ]  # nothing else is left


def test_pairs_do_not_depend_on_the_other_records(vlm, records):
    """Order and company change nothing: a record's draws depend on (seed, record id, round) alone."""
    forth, back = pairs_of(vlm, records[:4]), pairs_of(vlm, records[:4][::-1])
    assert forth == back[::-1] and forth[1:2] == pairs_of(vlm, records[1:2])


def interrupted(vlm, records, path, group, monkeypatch, after):
    """Run until `after` groups are written, then break as Ctrl-C does."""
    calls, pairs = [], BdhsSampler.pairs
    with monkeypatch.context() as patch:

        def broken(self, *args):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return pairs(self, *args)

        patch.setattr(BdhsSampler, "pairs", broken)
        with pytest.raises(KeyboardInterrupt):
            run(vlm, records, path, group)


@pytest.mark.parametrize("torn", ["", '{"id": "tiny-00', None])
def test_a_restart_gives_the_same_file(vlm, records, tmp_path, monkeypatch, torn):
    """Broken off after two groups of two, also with half a line behind (kill -9), or within a group (a whole line too many or too few)."""
    some, whole, path = records[:7], tmp_path / "whole.jsonl", tmp_path / "pairs.jsonl"
    run(vlm, some, whole, 2)
    interrupted(vlm, some, path, 2, monkeypatch, after=2)
    part = tmp_path / "pairs.jsonl.part"
    assert not path.exists() and len(part.read_text().splitlines()) == 5  # a header and four pairs
    lines = part.read_text()
    part.write_text(lines + torn if torn is not None else "".join(lines.splitlines(True)[:4]))
    groups, sample = [], BdhsSampler.pairs
    monkeypatch.setattr(
        BdhsSampler,
        "pairs",
        lambda self, own, *rest: groups.append([r.id for r in own]) or sample(self, own, *rest),
    )
    pairs = run(vlm, some, path, 2, resume=True)
    ids = [record.id for record in some]
    assert groups == (
        [ids[4:6], ids[6:]] if torn is not None else [ids[2:4], ids[4:6], ids[6:]]
    )  # those of the full list
    assert path.read_bytes() == whole.read_bytes() and not part.exists()
    assert pairs == [json.loads(line) for line in whole.read_text().splitlines()]


@pytest.mark.parametrize("line", ["{", "3"])
def test_a_whole_line_that_is_no_pair_is_not_gone_on_with(
    vlm, records, tmp_path, monkeypatch, line
):
    path, part = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.part"
    interrupted(vlm, records[:4], path, 2, monkeypatch, after=1)
    part.write_text("".join(part.read_text().splitlines(True)[:2]) + line + "\n")
    with pytest.raises(InputError, match="remove it") as caught:
        run(vlm, records[:4], path, 2, resume=True)
    assert str(part) in str(caught.value) and not path.exists()


def test_a_line_torn_inside_a_character_is_dropped(vlm, records, tmp_path, monkeypatch):
    path, part = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.part"
    interrupted(vlm, records[:4], path, 2, monkeypatch, after=1)
    part.write_bytes(part.read_bytes() + '{"id": "Zoë'.encode()[:-1])
    assert len(run(vlm, records[:4], path, 2, resume=True)) == 4


@pytest.mark.parametrize("change", ["rho", "seed", "group", "records", "similarity"])
def test_a_restart_with_other_settings_is_refused(vlm, records, tmp_path, monkeypatch, change):
    """And what was there stays as it was."""
    path = tmp_path / "pairs.jsonl"
    interrupted(vlm, records[:4], path, 2, monkeypatch, after=1)
    before = (tmp_path / "pairs.jsonl.part").read_bytes()
    others = {"rho": dict(settings=replace(QUICK, rho=0.5)), "seed": dict(seed=1)}.get(change, {})
    if change == "similarity":
        monkeypatch.setattr(PolicyEmbeddings, "name", "another")
    with pytest.raises(InputError, match="other settings") as error:
        run(
            vlm,
            records[:5] if change == "records" else records[:4],
            path,
            4 if change == "group" else 2,
            resume=True,
            **others,
        )
    assert (
        "\n" not in str(error.value)
        and (tmp_path / "pairs.jsonl.part").read_bytes() == before
        and not path.exists()
    )


@pytest.mark.parametrize("change", ["model", "template"])
def test_a_restart_with_another_model_or_template_is_refused(
    vlm, records, tmp_path, monkeypatch, change
):
    path = tmp_path / "pairs.jsonl"
    interrupted(vlm, records[:4], path, 2, monkeypatch, after=1)
    other = copy.copy(vlm)
    if change == "model":
        other.model = copy.deepcopy(vlm.model)
        other.model.lm_head.weight.data.neg_()
    else:
        other.template = "vicuna_v1"
    with pytest.raises(InputError):
        run(other, records[:4], path, 2, resume=True)


def test_a_pair_holds_what_the_contract_says(vlm, records):
    (pair,) = pairs_of(vlm, records[:1])
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
    assert (pair["id"], pair["image"], pair["prompt"], pair["chosen"]) == (
        records[0].id,
        records[0].image,
        records[0].turns[0],
        records[0].chosen,
    )


def test_a_pair_of_a_longer_conversation_can_be_read_back(vlm, records, tmp_path):
    """Trained on from the file, a pair must stand behind the prompt that its responses were written for."""
    record = replace(records[1], turns=(records[1].turns[0], records[1].chosen, "And what else?"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / record.image).write_bytes(b"")
    run(vlm, [record], tmp_path / "pairs.jsonl", 1)
    (again,) = read_records([tmp_path / "pairs.jsonl"], None)
    assert again.turns == record.turns


def test_a_pair_can_be_read_back(vlm, records, tmp_path):
    """What sampling writes, training reads: the same prompt and chosen response, and the rejected one."""
    pairs = run(vlm, records[:3], tmp_path / "pairs.jsonl", 2)
    read = read_records([tmp_path / "pairs.jsonl"], TINY / "train" / "images")
    assert [(r.id, r.paths, r.turns, r.chosen) for r in read] == [
        (r.id, r.paths, r.turns, r.chosen) for r in records[:3]
    ]
    assert [r.rejected for r in read] == [pair["rejected"] for pair in pairs]
