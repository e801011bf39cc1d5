"""Decoding from a cache: equal to recomputation, whatever the batch and wherever the cache is rewound to; and the draw itself."""

from dataclasses import replace

import pytest
import torch

from minialign import reference
from minialign.data.chat_templates import encode_prompt
from minialign.data.packing import PackedExample
from minialign.generation import decoding
from minialign.generation.decoding import (
    DecodeRequest,
    branch_requests,
    decode,
    generate,
    generate_continuations,
    prefill,
    sample_tokens,
    share_prefix,
)
from minialign.methods.base import encode_example
from minialign.models.llava import Llava
from minialign.utils.seeding import seeded_generator

NEW = 12


def grouped(model):
    """A random model of the same shape but with grouped heads and a tied vocabulary head."""
    torch.manual_seed(1)
    fresh = Llava(
        replace(
            model.config,
            text=replace(model.config.text, num_kv_heads=2, tie_word_embeddings=True, num_layers=2),
        )
    )
    for parameter in fresh.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return fresh.requires_grad_(False).eval()


@pytest.fixture(params=["shipped", "grouped"])
def some(request, vlm):
    if request.param == "grouped":
        vlm.model = grouped(vlm.model)
    return vlm


def prompts_of(vlm, records):
    return [encode_prompt(vlm.tokenizer, vlm.template, record.turns) for record in records]


def uniforms(n, steps=NEW):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(steps, generator=generator) for _ in range(n)]


# --- the draw ---


def test_pick_inverts_the_cumulative_distribution_by_hand():
    """Probabilities .5, .3, .2: draws below .5 give 0, below .8 give 1, else 2; a boundary belongs to the next token."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().double().expand(6, 3)
    draws = torch.tensor([0.0, 0.499, 0.501, 0.799, 0.801, 1 - 2**-24])
    assert sample_tokens(logits, draws).tolist() == [0, 0, 1, 1, 2, 2]
    assert (
        sample_tokens(logits, None).tolist() == [0] * 6
        and sample_tokens(logits, draws, temperature=0).tolist() == [0] * 6
    )


def test_a_token_of_probability_zero_is_never_drawn():
    """The largest float32 below 1, and 0 itself, at a distribution with zeros at both ends."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)
    assert sample_tokens(logits, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


def test_temperature_by_hand():
    """Odds 4 : 1 at temperature 1 are 2 : 1 at temperature 2: the boundary moves from .8 to 2/3."""
    logits = torch.tensor([[4.0, 1.0]]).log().expand(2, 2)
    assert sample_tokens(logits, torch.tensor([0.7, 0.7]))[0] == 0
    assert sample_tokens(logits, torch.tensor([0.66, 0.67]), temperature=2.0).tolist() == [0, 1]


def test_top_p_by_hand():
    """.2, .5, .3 with top_p .6: .5 does not reach .6, so .3 is needed and .2 is not; the rest is renormalised to 0, 5/8, 3/8."""
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(4, 3)
    assert sample_tokens(logits, torch.tensor([0.0, 0.62, 0.63, 0.99]), top_p=0.6).tolist() == [
        1,
        1,
        2,
        2,
    ]
    assert sample_tokens(logits, torch.tensor([0.0, 0.5, 0.9, 0.99]), top_p=0.4).tolist() == [1] * 4
    assert sample_tokens(logits, torch.tensor([0.1, 0.3, 0.75, 0.99]), top_p=1.0).tolist() == [
        0,
        1,
        2,
        2,
    ]


def test_frequencies_follow_softmax():
    """40,000 draws: each of six counts within 5 standard deviations (false alarm for another seed: 6 * 5.7e-7, about 1 in 290,000)."""
    generator = torch.Generator().manual_seed(0)
    logits, n = torch.randn(6, generator=generator), 40_000
    drawn = sample_tokens(logits.expand(n, 6), torch.rand(n, generator=generator), temperature=0.7)
    p = torch.softmax(logits / 0.7, 0)
    counts = torch.bincount(drawn, minlength=6)
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()


def test_seeded_depends_on_its_values_alone():
    first, other, again = (
        torch.rand(4, generator=seeded_generator(*parts))
        for parts in ((0, "a", 1), (0, "a", 2), (0, "a", 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- decoding ---


def test_greedy_from_the_cache_equals_recomputation(some, records):
    """Two prompts of different length as one batch against plain.write, which runs the whole sequence for every token."""
    prompts, features = (
        prompts_of(some, records[2:4]),
        some.encode_images([record.paths[0] for record in records[2:4]]),
    )
    written = generate(
        some.model,
        [share_prefix([p], [f]) for p, f in zip(prompts, features)],
        64,
        {some.tokenizer.eos},
    )
    for prompt, feature, new in zip(prompts, features, written):
        assert new == reference.generate(
            some.model, prompt, [feature], [], None, {some.tokenizer.eos}
        )


def test_sampling_from_the_cache_equals_recomputation(some, records):
    """The same uniform draws give the same tokens. A draw would have to lie within rounding (1e-6) of a boundary to differ."""
    prompts, features, draws = (
        prompts_of(some, records[:4]),
        some.encode_images([record.paths[0] for record in records[:4]]),
        uniforms(4),
    )
    rows = [share_prefix([p], [f]) for p, f in zip(prompts, features)]
    written = generate(some.model, rows, NEW, {some.tokenizer.eos}, draws)
    assert len({tuple(new) for new in written}) > 1
    for prompt, feature, own, new in zip(prompts, features, draws, written):
        assert new == reference.generate(
            some.model, prompt, [feature], [], own, {some.tokenizer.eos}
        )


def test_temperature_and_top_p_reach_the_draw(vlm, records):
    prompt, features, draws = (
        prompts_of(vlm, records[:1])[0],
        vlm.encode_images(records[0].paths),
        uniforms(1),
    )
    row = share_prefix([prompt], features)
    greedy = generate(vlm.model, [row], NEW, set())
    assert generate(vlm.model, [row], NEW, set(), draws, temperature=0) == greedy
    assert generate(vlm.model, [row], NEW, set(), draws, top_p=1e-6) == greedy
    assert generate(vlm.model, [row], NEW, set(), draws, temperature=1e-4) == greedy


def test_a_batch_of_starts_equals_single_ones(some, records):
    """Starts of different length, feed and end, in one batch and alone; some stop early and leave the batch."""
    prompts, features, draws = (
        prompts_of(some, records[:4]),
        some.encode_images([record.paths[0] for record in records[:4]]),
        uniforms(4),
    )
    rows = [share_prefix([p], [f]) for p, f in zip(prompts, features)]
    cache, batch = prefill(some.model, rows)
    starts = branch_requests(batch, rows, draws, set())
    free = generate_continuations(some.model, cache, starts, NEW)
    for number, start in enumerate(starts):
        start.stop_ids = {
            free[number][2 * number]
        }  # each ends elsewhere (or earlier, where the token came before)
    together = generate_continuations(some.model, cache, starts, NEW)
    for number, (start, new) in enumerate(zip(starts, together)):
        assert generate_continuations(some.model, cache, [start], NEW) == [new]
        end = free[number].index(next(iter(start.stop_ids)))
        assert new == free[number][: end + 1]
    assert len({len(new) for new in together}) > 1


def test_decode_yields_each_step_as_it_comes(vlm, records):
    """The stream and the lists are the same tokens; a start that stopped is not in later steps."""
    prompts, features = (
        prompts_of(vlm, records[:2]),
        vlm.encode_images([record.paths[0] for record in records[:2]]),
    )
    rows = [share_prefix([p], [f]) for p, f in zip(prompts, features)]
    cache, batch = prefill(vlm.model, rows)
    starts = branch_requests(batch, rows, None, set())
    first = generate_continuations(vlm.model, cache, starts, 3)[0][0]
    starts[0].stop_ids = {first}
    steps = list(decode(vlm.model, cache, starts, 3))
    assert [[number for number, _ in step] for step in steps] == [[0, 1], [1], [1]]
    assert generate_continuations(vlm.model, cache, starts, 3) == [
        [first],
        [token for step in steps for number, token in step if number == 1],
    ]


def test_a_rewound_cache_equals_a_fresh_prefill(some, records):
    """Prefill (picture, prompt, response), rewind to several cuts: keys, values and continuations as if only that far had been read."""
    record = records[0]
    example, features, draws = (
        encode_example(some, record, [record.chosen]),
        some.encode_images(record.paths),
        uniforms(1)[0],
    )
    response = example.responses[0]
    cache, batch = prefill(some.model, [PackedExample.of(example.prompt_ids, features, [response])])
    prefix, start = batch.prefix_lengths[0], batch.first_positions[0]
    for cut in (0, 1, 7, len(response) - 1):
        short = PackedExample.of(
            example.prompt_ids, features, [[*response[:cut], some.tokenizer.eos]]
        )
        fresh, _ = prefill(some.model, [short])
        seen = prefix + 1 + cut
        for ours, theirs in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
            torch.testing.assert_close(
                ours[:, :, :, :seen], theirs[:, :, :, :seen], rtol=1e-4, atol=1e-5
            )
        read = [example.prompt_ids[-1], *response][cut]
        ours = generate_continuations(
            some.model,
            cache,
            [DecodeRequest(0, range(prefix + cut), [read], start + cut, draws, set())],
            NEW,
        )
        theirs = generate_continuations(
            some.model,
            fresh,
            [DecodeRequest(0, range(prefix + cut), [read], start + cut, draws, set())],
            NEW,
        )
        assert (
            ours
            == theirs
            == [
                reference.generate(
                    some.model, example.prompt_ids, features, response[:cut], draws, set()
                )
            ]
        )


def test_a_longer_feed_equals_a_longer_prefill(vlm, records):
    """Tokens that leave the prefilled response are fed together, beside a start whose feed is one token."""
    record = records[0]
    example, features, draws = (
        encode_example(vlm, record, [record.chosen]),
        vlm.encode_images(record.paths),
        uniforms(2),
    )
    response = example.responses[0]
    cache, batch = prefill(vlm.model, [PackedExample.of(example.prompt_ids, features, [response])])
    other = [
        response[0],
        response[5],
        response[3],
        response[5],
    ]  # agrees with the response for one token only
    starts = [
        DecodeRequest(
            0,
            range(batch.prefix_lengths[0] + 1),
            [response[0], *other[1:]],
            batch.first_positions[0] + 1,
            draws[0],
            set(),
        ),
        DecodeRequest(
            0,
            range(batch.prefix_lengths[0] + 4),
            [response[3]],
            batch.first_positions[0] + 4,
            draws[1],
            set(),
        ),
    ]
    ours = generate_continuations(vlm.model, cache, starts, NEW)
    assert ours == [
        reference.generate(vlm.model, example.prompt_ids, features, given, own, set())
        for given, own in zip((other, response[:4]), draws)
    ]


def test_decoding_leaves_the_cache_as_it_was(vlm, records):
    """A fork is a copy: the same starts give the same tokens again."""
    row = share_prefix(prompts_of(vlm, records[:1]), vlm.encode_images(records[0].paths))
    cache, batch = prefill(vlm.model, [row])
    keys = cache.keys.clone()
    starts = branch_requests(batch, [row], uniforms(1), set())
    assert generate_continuations(vlm.model, cache, starts, NEW) == generate_continuations(
        vlm.model, cache, starts, NEW
    )
    assert torch.equal(cache.keys, keys)


def test_the_context_limit_ends_a_continuation(vlm, records):
    """Context of 4 tokens more than the prompt: exactly 4 are written, and no position beyond the limit is computed."""
    prompt, features = prompts_of(vlm, records[:1])[0], vlm.encode_images(records[0].paths)
    whole = len(prompt) - 1 + len(vlm.model.project_image_features(features)[0])
    vlm.model.config = replace(
        vlm.model.config, text=replace(vlm.model.config.text, max_position_embeddings=whole + 4)
    )
    seen, forward = [], vlm.model.language_model.forward
    vlm.model.language_model.forward = lambda x, positions, *rest: (
        seen.append(int(positions.max())) or forward(x, positions, *rest)
    )
    written = generate(vlm.model, [share_prefix([prompt], features)], NEW, set())
    assert len(written[0]) == 4 and max(seen) < whole + 4


def test_share_prefix_by_hand():
    """What the prompts have in common goes first, but each lead keeps at least its last token."""
    row = share_prefix([[1, 9, 4, 5], [1, 9, 6, 5, 7]], ["picture"])
    assert (row.prefix, row.branches) == ([1, 9], [([4, 5], []), ([6, 5, 7], [])])
    assert share_prefix([[1, 9, 4]], []).branches == [([4], [])]
    assert share_prefix([[1, 9], [1, 9, 4]], []).branches == [([9], []), ([9, 4], [])]


def test_questions_that_share_a_row_are_answered_as_if_asked_alone(some, records):
    """Starts from several branches of several rows against each prompt on its own: sampled through plain, greedy through the cache."""
    asked = [
        "Is there a cup in the picture?",
        "Where is the dog?",
        "What can be seen in it? Tell me all.",
    ]
    prompts = [
        encode_prompt(some.tokenizer, some.template, [f"<image>\n{question}"]) for question in asked
    ]
    features = some.encode_images([record.paths[0] for record in records[:2]])
    rows, draws = (
        [share_prefix(prompts, features[:1]), share_prefix(prompts[:2], features[1:])],
        uniforms(5),
    )
    end, alone = (
        {some.tokenizer.eos},
        [(p, features[0]) for p in prompts] + [(p, features[1]) for p in prompts[:2]],
    )
    sampled, greedy = (generate(some.model, rows, NEW, end, own) for own in (draws, None))
    assert sampled == [
        reference.generate(some.model, prompt, [feature], [], own, end)
        for (prompt, feature), own in zip(alone, draws)
    ]
    assert greedy == [
        generate(some.model, [share_prefix([prompt], [feature])], NEW, end)[0]
        for prompt, feature in alone
    ]


# --- the picture contrasted with its absence ---

QUESTIONS = ["Is there a cup in the picture?", "What can be seen in it? Tell me all."]


def contrasted(vlm, prompt, pictures, a):
    """Greedy tokens of (1 + a) log p(.|picture) - a log p(.|picture hidden), both from the whole sequence anew for every token."""
    written = []
    while len(written) < NEW and vlm.tokenizer.eos not in written:
        seeing, blind = (
            torch.log_softmax(
                reference.next_token_logits(vlm.model, prompt, pictures, written, visible)[
                    -1
                ].double(),
                -1,
            )
            for visible in (None, [])
        )
        written.append(int(((1 + a) * seeing - a * blind).argmax()))
    return written


def to_contrast(vlm, records):
    """(rows, [(prompt, pictures)] in reading order): two prompts on one picture, and three pictures with a prompt each, short and long answers mixed."""
    prompts = [
        encode_prompt(vlm.tokenizer, vlm.template, [f"<image>\n{question}"])
        for question in QUESTIONS
    ]
    features = vlm.encode_images([record.paths[0] for record in records[:4]])
    own = [
        prompts,
        prompts[:1],
        prompts[1:],
        [encode_prompt(vlm.tokenizer, vlm.template, ["<image>\nWhere is the dog?"])],
    ]
    return [share_prefix(some, [picture]) for some, picture in zip(own, features)], [
        (prompt, [picture]) for some, picture in zip(own, features) for prompt in some
    ]


@pytest.mark.parametrize("a", [0.25, 1.0])
def test_contrasted_answers_equal_recomputation(some, records, a):
    """Rows of different length that end at different steps; with its own picture's absence, each."""
    rows, alone = to_contrast(some, records)
    with torch.no_grad():
        slow = [contrasted(some, prompt, pictures, a) for prompt, pictures in alone]
    assert generate(some.model, rows, NEW, {some.tokenizer.eos}, contrast=a) == slow
    greedy = generate(some.model, rows, NEW, {some.tokenizer.eos})
    assert a < 1 or slow != greedy


def test_no_contrast_is_the_ordinary_answer(vlm, records):
    """Exactly 0, which reads no hidden row, and so little that no choice turns."""
    rows, _ = to_contrast(vlm, records)
    greedy = generate(vlm.model, rows, NEW, {vlm.tokenizer.eos})
    assert len({len(new) for new in greedy}) > 1
    for a in (0.0, 1e-9):
        assert generate(vlm.model, rows, NEW, {vlm.tokenizer.eos}, contrast=a) == greedy


def test_pairs_stay_together_in_every_batch_and_end_together(vlm, records, monkeypatch):
    """However few cache slots at a time, and when rows that are done leave the batch: both of a pair write the same, as with room for all."""
    rows, _ = to_contrast(vlm, records)
    cache, batch = prefill(vlm.model, [*rows, *(replace(row, visible=[]) for row in rows)])
    starts = branch_requests(batch, [*rows, *rows], None, {vlm.tokenizer.eos})
    starts = [start for both in zip(starts[:5], starts[5:]) for start in both]
    longest = NEW + max(len(start.cache_positions) + len(start.input_ids) for start in starts)
    expected, batches, own = (
        generate(vlm.model, rows, NEW, {vlm.tokenizer.eos}, contrast=1.0),
        [],
        decoding.decode,
    )
    assert len({len(new) for new in expected}) > 1
    monkeypatch.setattr(
        decoding,
        "decode",
        lambda model, cache, some, *rest: (
            batches.append(len(some)) or own(model, cache, some, *rest)
        ),
    )
    for room, sizes in ((1, [2] * 5), (3, [2] * 5), (5, [4, 4, 2]), (7, [6, 4]), (100, [10])):
        batches.clear()
        written = generate_continuations(
            vlm.model, cache, starts, NEW, contrast=1.0, slots=room * longest
        )
        assert written[::2] == written[1::2] == expected and batches == sizes
    sizes, forward = [], vlm.model.language_model.forward
    vlm.model.language_model.forward = lambda x, *rest: sizes.append(len(x)) or forward(x, *rest)
    steps = [
        {number for number, _ in step} for step in own(vlm.model, cache, starts, NEW, contrast=1.0)
    ]
    assert all(number ^ 1 in step for step in steps for number in step)
    assert (
        sizes[0] == 10 and sizes[-1] == len(steps[-1]) < 10 and not any(size % 2 for size in sizes)
    )
