"""One row for a prompt and its k responses: its layout by hand, and the same log-probs and gradients as separate sequences."""

from dataclasses import replace

import pytest
import torch

from minialign import reference
from minialign.data.packing import (
    PAD_SEGMENT,
    PackedExample,
    attention_mask_from_segments,
    expand_image_placeholders,
    pack,
)
from minialign.logprobs import response_logps
from minialign.methods.base import encode_example
from minialign.models.llava import ImageFeatures, Llava, embed_batch
from minialign.models.policy import Policy
from minialign.utils.files import InputError

IMAGE = 99


class Stub:
    """A model for `pack`: a context of `positions` tokens, and pictures that are their own vectors."""

    def __init__(self, positions=64):
        text = type("Text", (), {"max_position_embeddings": positions, "hidden_size": 2})
        self.config, self.device = (
            type("Config", (), {"image_token_id": IMAGE, "text": text}),
            "cpu",
        )

    def project_image_features(self, pictures):
        return pictures


def picture(first, count):
    """Vectors (count, 2) that carry their number: first, first + 1, ..."""
    return (first + torch.arange(count))[:, None].expand(-1, 2).float()


def test_layout_of_one_prompt_and_two_responses():
    """[picture + prompt without its last token | last token, y1 without its end | last token, y2 without its end], as the module says."""
    batch = pack(
        Stub(), [PackedExample.of([1, IMAGE, 5, 6], [picture(10, 3)], [[7, 8, 2], [9, 2]])]
    )
    assert batch.ids.tolist() == [[1, 0, 0, 0, 5, 6, 7, 8, 6, 9]]
    assert batch.is_image.tolist() == [[False, True, True, True] + [False] * 6]
    assert batch.positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 5, 6]
    ]  # the second branch restarts at 5
    assert batch.segments.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2]]
    assert batch.targets.tolist() == [[-100] * 5 + [7, 8, 2, 9, 2]]
    assert (batch.prefix_lengths, batch.first_positions, batch.response_spans) == (
        [5],
        [5],
        [[(5, 8), (8, 10)]],
    )
    assert batch.image_tokens[:, 0].tolist() == [10, 11, 12]


def test_layout_of_several_questions_about_one_picture():
    """Leads of several tokens: only the answer's tokens are targets, from the lead's last token on."""
    batch = pack(
        Stub(),
        [
            PackedExample(
                [1, IMAGE], [picture(10, 2)], [([3, 4], [7, 2]), ([5], [8, 2]), ([3, 4, 5], [])]
            )
        ],
    )
    assert batch.ids.tolist() == [
        [1, 0, 0, 3, 4, 7, 5, 8, 3, 4]
    ]  # a branch without a response lacks its lead's last token: decoding feeds it
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 3, 4]]
    assert batch.targets.tolist() == [[-100, -100, -100, -100, 7, 2, 8, 2, -100, -100]]


def test_hidden_vectors_are_left_out_and_everyone_else_keeps_the_position():
    row = PackedExample.of(
        [1, IMAGE, IMAGE, 6], [picture(10, 3), picture(20, 2)], [[7, 2]], [2, 3, 4]
    )
    batch = pack(Stub(), [row])
    assert batch.image_tokens[:, 0].tolist() == [12, 20, 21]
    assert batch.positions.tolist() == [
        [0, 3, 4, 5, 6, 7]
    ]  # of vectors 1, 2, 3 only 3 stays; the text still begins at 6
    assert batch.prefix_lengths == [4] and batch.first_positions == [6]


def test_a_batch_pads_the_shorter_row_and_its_vectors_keep_reading_order():
    batch = pack(
        Stub(),
        [
            PackedExample.of([1, 6], [], [[7, 2]]),
            PackedExample.of([IMAGE, 6], [picture(10, 2)], [[7, 8, 2]]),
        ],
    )
    assert batch.ids.tolist() == [[1, 6, 7, 0, 0], [0, 0, 6, 7, 8]]
    assert batch.segments.tolist() == [[0, 1, 1, PAD_SEGMENT, PAD_SEGMENT], [0, 0, 1, 1, 1]]
    assert batch.targets[0].tolist() == [-100, 7, 2, -100, -100]


def test_visibility_by_hand():
    """Prefix of two, branches of one and two, one padding slot: k <= q and (prefix or own segment)."""
    seen = (
        attention_mask_from_segments(torch.tensor([[0, 0, 1, 2, 2, PAD_SEGMENT]]))[0, 0]
        .int()
        .tolist()
    )
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_an_empty_response_is_refused_where_it_would_be_scored(vlm, records):
    example = encode_example(vlm, records[0], [records[0].chosen])
    with pytest.raises(InputError, match="empty"):
        response_logps(
            vlm.model,
            [
                PackedExample.of(
                    example.prompt_ids,
                    vlm.encode_images(example.record.paths),
                    [example.responses[0], []],
                )
            ],
        )


def test_too_long_is_an_error_with_the_numbers():
    """3 vectors + 3 prompt tokens + 4 response tokens, of which the last is predicted and not read: fits a context of 9, not one of 8."""
    row = PackedExample.of([1, IMAGE, 5, 6], [picture(0, 3)], [[7, 8, 9, 2]])
    assert pack(Stub(positions=9), [row]).positions.max() == 8
    with pytest.raises(InputError, match=r"are 6 tokens and the response 4.* context of 8"):
        pack(Stub(positions=8), [row])


def test_placeholders_must_match_pictures():
    with pytest.raises(InputError, match="2 image placeholders and 1 images"):
        expand_image_placeholders([IMAGE, 1, IMAGE], [3], IMAGE)
    with pytest.raises(InputError, match="1 image placeholders and 2 images"):
        expand_image_placeholders([IMAGE, 1], [3, 3], IMAGE)
    with pytest.raises(InputError, match="remove <image>"):
        pack(Stub(), [PackedExample([1], [], [([6, IMAGE, 5], [7, 2])])])


def test_pictures_fill_their_slots_in_order(vlm, records):
    """Two rows with two different pictures: each row's slots hold its own picture's projected vectors, text slots its embeddings."""
    examples = [encode_example(vlm, record, [record.chosen]) for record in records[:2]]
    features = vlm.encode_images([example.record.paths[0] for example in examples])
    batch = pack(
        vlm.model,
        [PackedExample.of(e.prompt_ids, [f], e.responses) for e, f in zip(examples, features)],
    )
    x = embed_batch(vlm.model, batch)
    for row in range(2):
        torch.testing.assert_close(
            x[row][batch.is_image[row]],
            vlm.model.project_image_features([features[row]])[0],
            rtol=1e-5,
            atol=1e-6,
        )
        text = ~batch.is_image[row]
        assert torch.equal(
            x[row][text], vlm.model.language_model.embed_tokens(batch.ids[row][text])
        )


# --- one row against separate sequences, each through plain's whole forward pass ---


def grouped(model):
    """A random model of the same shape but with grouped heads and a tied vocabulary head, at activations of a usual size."""
    torch.manual_seed(1)
    text = replace(model.config.text, num_kv_heads=2, tie_word_embeddings=True, num_layers=2)
    fresh = Llava(replace(model.config, text=text))
    for name, parameter in fresh.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return fresh.requires_grad_(False).eval()


def separate(model, prompt, pictures, response):
    """log p(response | prompt) of one sequence, by plain.logits and the library's log_softmax."""
    rows = reference.next_token_logits(model, prompt, pictures, response[:-1])[-len(response) :]
    return torch.log_softmax(rows, -1).gather(1, torch.tensor(response)[:, None]).sum()


def gradients(policy, value):
    """All trainable gradients of a scalar in one vector; a parameter without one counts as zeros."""
    parameters = policy.parameters().values()
    grads = torch.autograd.grad(value, list(parameters), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters)]
    )


def distance(a, b):
    """Relative L2 distance."""
    return float((a - b).norm() / b.norm())


def close(a, b, tokens):
    """Within the tolerance for summed log-probs: max(1e-6 |x|, 1e-5 tokens) nats."""
    a, b = a.item(), b.item()
    return abs(a - b) <= max(1e-6 * abs(b), 1e-5 * tokens)


def stirred(policy):
    """Adapters start with B = 0, whose A has no gradient: give B values so that every gradient is exercised."""
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=0.02)
    return policy


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", ["shipped", "grouped"])
def test_a_shared_prefix_equals_separate_sequences(vlm, records, rank, kind):
    """Three responses in one row: log-probs, and the gradient of a weighted sum for every trainable parameter."""
    if kind == "grouped":
        vlm.model = grouped(vlm.model)
    policy = stirred(Policy(vlm.model, rank, 8))
    example = encode_example(
        vlm, records[0], [records[0].chosen, "There is a red cup at the top left.", "No."]
    )
    features, weights = vlm.encode_images(example.record.paths), torch.tensor([1.0, -1.3, 0.7])
    together, counts = response_logps(
        vlm.model, [PackedExample.of(example.prompt_ids, features, example.responses)]
    )
    alone = torch.stack(
        [
            separate(vlm.model, example.prompt_ids, features, response)
            for response in example.responses
        ]
    )
    assert counts.tolist() == [[len(response) for response in example.responses]]
    for a, b, response in zip(together[0], alone, example.responses):
        assert close(a, b, len(response))
    assert (
        distance(gradients(policy, together[0] @ weights), gradients(policy, alone @ weights))
        <= 1e-5
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_a_batch_equals_its_single_rows(vlm, records, rank):
    """Rows of different length and with different numbers of responses, padded together."""
    policy = stirred(Policy(vlm.model, rank, 8))
    texts = [[r.chosen, "No."] for r in records[:3]] + [[records[3].chosen]]
    examples = [encode_example(vlm, record, own) for record, own in zip(records, texts)]
    rows = [
        PackedExample.of(e.prompt_ids, vlm.encode_images(e.record.paths), e.responses)
        for e in examples
    ]
    together, counts = response_logps(vlm.model, rows)
    alone = torch.cat([response_logps(vlm.model, [row])[0][0] for row in rows])
    assert together.shape == (7,) and counts.tolist() == [
        len(response) for e in examples for response in e.responses
    ]
    for a, b, tokens in zip(together, alone, counts.tolist()):
        assert close(a, b, tokens)
    weights = torch.linspace(-1, 1.5, 7)
    assert (
        distance(gradients(policy, together @ weights), gradients(policy, alone @ weights)) <= 1e-5
    )


def test_several_questions_equal_their_own_sequences(vlm, records):
    """[picture | question 1, answer 1 | question 2, answer 2]: as if each were asked alone."""
    policy = Policy(vlm.model, 0, 1)
    asked = [
        ("Is there a cup in the picture?", "Yes."),
        ("Where is the dog?", "The dog is at the top left."),
        ("What can be seen?", records[0].chosen),
    ]
    examples = [
        encode_example(vlm, replace(records[0], turns=(f"<image>\n{question}",)), [answer])
        for question, answer in asked
    ]
    prompts = [example.prompt_ids for example in examples]
    shared = next(i for i in range(99) if len({prompt[i] for prompt in prompts}) > 1)
    features = vlm.encode_images(records[0].paths)
    row = PackedExample(
        prompts[0][:shared], features, [(e.prompt_ids[shared:], e.responses[0]) for e in examples]
    )
    assert all(len(lead) > 3 for lead, _ in row.branches)
    together = response_logps(vlm.model, [row])[0][0]
    alone = torch.stack(
        [separate(vlm.model, e.prompt_ids, features, e.responses[0]) for e in examples]
    )
    for a, b, e in zip(together, alone, examples):
        assert close(a, b, len(e.responses[0]))
    weights = torch.tensor([1.0, -0.5, 2.0])
    assert (
        distance(gradients(policy, together @ weights), gradients(policy, alone @ weights)) <= 1e-5
    )


def test_another_branch_changes_nothing(vlm, records):
    """A leak between branches would show here: the first response's log-prob beside two very different second ones."""
    example = encode_example(
        vlm, records[0], [records[0].chosen, "No.", "A blue pen is at the bottom right. " * 3]
    )
    features = vlm.encode_images(example.record.paths)
    first = [
        response_logps(
            vlm.model,
            [PackedExample.of(example.prompt_ids, features, [example.responses[0], other])],
        )[0][0, 0]
        for other in example.responses[1:]
    ]
    assert close(*first, len(example.responses[0]))


def test_features_of_another_picture_change_the_row(vlm, records):
    """The picture is really read: swapping it changes the log-prob by far more than rounding."""
    example = encode_example(vlm, records[0], [records[0].chosen])
    here, there = vlm.encode_images([records[0].paths[0], records[1].paths[0]])
    logps = [
        response_logps(vlm.model, [PackedExample.of(example.prompt_ids, [one], example.responses)])[
            0
        ].item()
        for one in (here, there, ImageFeatures(here.tiles.clone(), here.size))
    ]
    assert abs(logps[0] - logps[1]) > 1e-3 and logps[0] == logps[2]
