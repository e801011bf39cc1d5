"""A packed sequence has the layout worked by hand, and the numbers of separate sequences."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minialign import reference
from minialign.data.packing import (
    IGNORED_TARGET,
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

IMAGE = 99  # the image placeholder's token id
NONE = IGNORED_TARGET


class StubModel:
    """A model for `pack` with a given context, whose image features are already image tokens."""

    def __init__(self, context_length=64):
        text = SimpleNamespace(max_position_embeddings=context_length, hidden_size=2)
        self.config = SimpleNamespace(image_token_id=IMAGE, text=text)
        self.device = "cpu"

    def project_image_features(self, image_features):
        return image_features


def image_tokens(first, count):
    """Return image tokens (count, 2) that can be told apart: first, first + 1, ..."""
    numbers = first + torch.arange(count)
    return numbers[:, None].expand(-1, 2).float()


def drawn_mask(segments):
    """Draw the attention mask of one sequence, a line per query with 1 where it sees a key."""
    mask = attention_mask_from_segments(segments)[0, 0]
    lines = []
    for row in mask.tolist():
        lines.append("".join(".1"[sees] for sees in row))
    return lines


# The layout, by hand.


def test_layout_of_the_module_docstring():
    p0, p1, p2, q, a0, a1, b0, b1, b2 = range(10, 19)
    example = PackedExample.of([p0, p1, p2, q], [], [[a0, a1], [b0, b1, b2]])

    batch = pack(StubModel(), [example])

    assert batch.ids.tolist() == [[p0, p1, p2, q, a0, q, b0, b1]]
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch.targets.tolist() == [[NONE, NONE, NONE, a0, a1, b0, b1, b2]]
    assert drawn_mask(batch.segments) == [
        "1.......",
        "11......",
        "111.....",
        "1111....",
        "11111...",
        "111..1..",
        "111..11.",
        "111..111",
    ]


def test_layout_of_one_prompt_and_two_responses():
    """An image of 3 tokens stands in the prefix. Both branches begin with the last prompt token."""
    example = PackedExample.of([1, IMAGE, 5, 6], [image_tokens(10, 3)], [[7, 8, 2], [9, 2]])

    batch = pack(StubModel(), [example])

    assert batch.ids.tolist() == [[1, 0, 0, 0, 5, 6, 7, 8, 6, 9]]
    assert batch.is_image.tolist() == [[False, True, True, True] + [False] * 6]
    # The second branch restarts at 5.
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 5, 6]]
    assert batch.segments.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2]]
    assert batch.targets.tolist() == [[NONE] * 5 + [7, 8, 2, 9, 2]]
    assert batch.prefix_lengths == [5]
    assert batch.first_positions == [5]
    assert batch.branch_spans == [[(5, 8), (8, 10)]]
    assert batch.image_tokens[:, 0].tolist() == [10, 11, 12]


def test_layout_of_several_questions_about_one_image():
    """With leads of several tokens, only the tokens of the answers are targets.

    A branch without a response lacks its lead's last token, because decoding reads that first.
    """
    branches = [([3, 4], [7, 2]), ([5], [8, 2]), ([3, 4, 5], [])]
    example = PackedExample([1, IMAGE], [image_tokens(10, 2)], branches)

    batch = pack(StubModel(), [example])

    assert batch.ids.tolist() == [[1, 0, 0, 3, 4, 7, 5, 8, 3, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 3, 4]]
    assert batch.targets.tolist() == [[NONE, NONE, NONE, NONE, 7, 2, 8, 2, NONE, NONE]]


@pytest.mark.parametrize("visible", [[2, 3, 4], [4, 2, 3], [3, 3, 4, 2]])
def test_masked_image_tokens_are_left_out_and_all_others_keep_their_position(visible):
    """Of the first image's tokens 0, 1 and 2 only the last stays, at its position 3.

    The order of `visible` does not matter, nor do indices that it names twice.
    """
    images = [image_tokens(10, 3), image_tokens(20, 2)]
    example = PackedExample.of([1, IMAGE, IMAGE, 6], images, [[7, 2]], visible=visible)

    batch = pack(StubModel(), [example])

    assert batch.image_tokens[:, 0].tolist() == [12, 20, 21]
    assert batch.positions.tolist() == [[0, 3, 4, 5, 6, 7]]  # the text still begins at 6
    assert batch.prefix_lengths == [4]
    assert batch.first_positions == [6]


def test_a_batch_pads_the_shorter_example():
    examples = [
        PackedExample.of([1, 6], [], [[7, 2]]),
        PackedExample.of([IMAGE, 6], [image_tokens(10, 2)], [[7, 8, 2]]),
    ]

    batch = pack(StubModel(), examples)

    assert batch.ids.tolist() == [[1, 6, 7, 0, 0], [0, 0, 6, 7, 8]]
    assert batch.segments.tolist() == [[0, 1, 1, PAD_SEGMENT, PAD_SEGMENT], [0, 0, 1, 1, 1]]
    assert batch.targets[0].tolist() == [NONE, 7, 2, NONE, NONE]


def test_attention_mask_by_hand():
    """A prefix of two, branches of one and two, and one place of padding."""
    segments = torch.tensor([[0, 0, 1, 2, 2, PAD_SEGMENT]])

    assert drawn_mask(segments) == [
        "1.....",
        "11....",
        "111...",
        "11.1..",
        "11.11.",
        "11...1",
    ]


# What cannot be packed.


def test_an_empty_response_is_refused_where_it_would_be_scored(vlm, records):
    example = encode_example(vlm, records[0], [records[0].chosen])
    features = vlm.encode_images(example.record.paths)
    responses = [example.responses[0], []]
    row = PackedExample.of(example.prompt_ids, features, responses)

    with pytest.raises(InputError, match="empty"):
        response_logps(vlm.model, [row])


def test_too_long_is_an_error_with_the_numbers():
    """3 image, 3 prompt and 4 response tokens, the last of which is not read: 9 fit, 8 do not."""
    example = PackedExample.of([1, IMAGE, 5, 6], [image_tokens(0, 3)], [[7, 8, 9, 2]])

    assert pack(StubModel(context_length=9), [example]).positions.max() == 8
    with pytest.raises(InputError, match=r"are 6 tokens and the response 4.* context of 8"):
        pack(StubModel(context_length=8), [example])


def test_a_prompt_is_read_whole_before_its_response_is_generated():
    """3 image and 3 prompt tokens, the last of which decoding reads: 6 fit, 5 do not."""
    example = PackedExample.of([1, IMAGE, 5, 6], [image_tokens(0, 3)], [[]])

    pack(StubModel(context_length=6), [example])
    with pytest.raises(InputError, match=r"are 6 tokens and the response 0.* context of 5"):
        pack(StubModel(context_length=5), [example])


def test_placeholders_must_match_images():
    with pytest.raises(InputError, match="2 image placeholders and 1 images"):
        expand_image_placeholders([IMAGE, 1, IMAGE], [3], IMAGE)
    with pytest.raises(InputError, match="1 image placeholders and 2 images"):
        expand_image_placeholders([IMAGE, 1], [3, 3], IMAGE)
    example = PackedExample([1], [], [([6, IMAGE, 5], [7, 2])])
    with pytest.raises(InputError, match="remove <image>"):
        pack(StubModel(), [example])


# In a model: the same numbers as separate sequences.


def test_image_tokens_stand_in_their_own_example(vlm, records):
    """Both of two examples hold their own image's projected features, and embeddings for text."""
    examples = [encode_example(vlm, record, [record.chosen]) for record in records[:2]]
    features = vlm.encode_images([example.record.paths[0] for example in examples])
    rows = []
    for example, image_features in zip(examples, features, strict=True):
        rows.append(PackedExample.of(example.prompt_ids, [image_features], example.responses))

    batch = pack(vlm.model, rows)
    x = embed_batch(vlm.model, batch)  # (B, T, D)

    for i in range(2):
        is_image = batch.is_image[i]
        image_tokens_alone = vlm.model.project_image_features([features[i]])[0]
        torch.testing.assert_close(x[i][is_image], image_tokens_alone, rtol=1e-5, atol=1e-6)
        text_ids = batch.ids[i][~is_image]
        assert torch.equal(x[i][~is_image], vlm.model.language_model.embed_tokens(text_ids))


def random_model_with_grouped_heads(model):
    """Return a random model of the same shape, but with grouped heads and a tied vocabulary head.

    Its weights are scaled so that activations have their usual size.
    """
    torch.manual_seed(1)
    text = replace(model.config.text, num_kv_heads=2, tie_word_embeddings=True, num_layers=2)
    random_model = Llava(replace(model.config, text=text))
    for parameter in random_model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return random_model.requires_grad_(False).eval()


def separate_logp(model, prompt_ids, features, response):
    """Return log p(response | prompt) of a sequence of its own, by the reference implementation."""
    logits = reference.next_token_logits(model, prompt_ids, features, response[:-1])
    logps = torch.log_softmax(logits[-len(response) :], dim=-1)  # (R, V)
    targets = torch.tensor(response)[:, None]
    return logps.gather(1, targets).sum()


def gradients(policy, value):
    """Return all gradients of a scalar as one vector. Parameters without one count as zeros."""
    parameters = list(policy.parameters().values())
    grads = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def assert_same_gradients(policy, value, expected_value):
    """Assert that the gradients of two scalars differ by at most 1e-5 of their length."""
    grads = gradients(policy, value)
    expected = gradients(policy, expected_value)
    assert (grads - expected).norm() <= 1e-5 * expected.norm()


def assert_same_logps(logps, expected_logps, token_counts):
    """Assert equality within the tolerance for sums: max(1e-6 |x|, 1e-5 tokens) nats."""
    assert len(logps) == len(expected_logps) == len(token_counts)
    for logp, expected, num_tokens in zip(logps, expected_logps, token_counts, strict=True):
        tolerance = max(1e-6 * abs(expected.item()), 1e-5 * num_tokens)
        assert abs(logp.item() - expected.item()) <= tolerance


def make_policy(model, lora_rank):
    """Return a policy whose gradients all differ from zero.

    Adapters begin with B = 0, where A has no gradient, so B is drawn at random.
    """
    policy = Policy(model, lora_rank, 8)
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=0.02)
    return policy


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("model", ["shipped", "grouped"])
def test_a_shared_prefix_equals_separate_sequences(vlm, records, rank, model):
    """Three responses in one sequence: log-probs, and the gradient of a weighted sum of them."""
    if model == "grouped":
        vlm.model = random_model_with_grouped_heads(vlm.model)
    policy = make_policy(vlm.model, rank)
    texts = [records[0].chosen, "There is a red cup at the top left.", "No."]
    example = encode_example(vlm, records[0], texts)
    features = vlm.encode_images(example.record.paths)
    row = PackedExample.of(example.prompt_ids, features, example.responses)

    packed_logps, counts = response_logps(vlm.model, [row])

    separate_logps = []
    for response in example.responses:
        separate_logps.append(separate_logp(vlm.model, example.prompt_ids, features, response))
    separate_logps = torch.stack(separate_logps)
    token_counts = [len(response) for response in example.responses]
    assert counts.tolist() == [token_counts]
    assert_same_logps(packed_logps[0], separate_logps, token_counts)
    weights = torch.tensor([1.0, -1.3, 0.7])
    assert_same_gradients(policy, packed_logps[0] @ weights, separate_logps @ weights)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_batch_equals_its_single_rows(vlm, records, rank):
    """Rows of different length and with different numbers of responses, padded together."""
    policy = make_policy(vlm.model, rank)
    examples = [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:3]]
    examples.append(encode_example(vlm, records[3], [records[3].chosen]))
    rows = []
    token_counts = []
    for example in examples:
        features = vlm.encode_images(example.record.paths)
        rows.append(PackedExample.of(example.prompt_ids, features, example.responses))
        token_counts += [len(response) for response in example.responses]

    batch_logps, counts = response_logps(vlm.model, rows)

    single_logps = torch.cat([response_logps(vlm.model, [row])[0][0] for row in rows])
    assert batch_logps.shape == (7,)
    assert counts.tolist() == token_counts
    assert_same_logps(batch_logps, single_logps, token_counts)
    weights = torch.linspace(-1, 1.5, 7)
    assert_same_gradients(policy, batch_logps @ weights, single_logps @ weights)


def test_several_questions_equal_their_own_sequences(vlm, records):
    """[image | question 1 + answer 1 | question 2 + answer 2] is as if each were asked alone."""
    policy = Policy(vlm.model, 0, 1)
    questions_and_answers = [
        ("Is there a cup in the picture?", "Yes."),
        ("Where is the dog?", "The dog is at the top left."),
        ("What can be seen?", records[0].chosen),
    ]
    examples = []
    for question, answer in questions_and_answers:
        record = replace(records[0], turns=(f"<image>\n{question}",))
        examples.append(encode_example(vlm, record, [answer]))
    prompts = [example.prompt_ids for example in examples]
    shared = 0  # the number of tokens with which all prompts begin
    while len({prompt[shared] for prompt in prompts}) == 1:
        shared += 1
    features = vlm.encode_images(records[0].paths)
    branches = [(example.prompt_ids[shared:], example.responses[0]) for example in examples]
    assert all(len(lead) > 3 for lead, _ in branches)

    row = PackedExample(prompts[0][:shared], features, branches)
    packed_logps = response_logps(vlm.model, [row])[0][0]

    separate_logps = []
    for example in examples:
        response = example.responses[0]
        separate_logps.append(separate_logp(vlm.model, example.prompt_ids, features, response))
    separate_logps = torch.stack(separate_logps)
    token_counts = [len(example.responses[0]) for example in examples]
    assert_same_logps(packed_logps, separate_logps, token_counts)
    weights = torch.tensor([1.0, -0.5, 2.0])
    assert_same_gradients(policy, packed_logps @ weights, separate_logps @ weights)


def test_branches_do_not_leak_into_each_other(vlm, records):
    """The first response has the same log-prob next to two very different second responses."""
    texts = [records[0].chosen, "No.", "A blue pen is at the bottom right. " * 3]
    example = encode_example(vlm, records[0], texts)
    first, short, long = example.responses
    features = vlm.encode_images(example.record.paths)
    beside_short = PackedExample.of(example.prompt_ids, features, [first, short])
    beside_long = PackedExample.of(example.prompt_ids, features, [first, long])

    logps_beside_short, _ = response_logps(vlm.model, [beside_short])
    logps_beside_long, _ = response_logps(vlm.model, [beside_long])

    assert_same_logps(logps_beside_short[0, :1], logps_beside_long[0, :1], [len(first)])


def test_another_image_changes_the_log_prob(vlm, records):
    """The image is really read: another one changes the log-prob by far more than rounding."""
    example = encode_example(vlm, records[0], [records[0].chosen])
    image, other_image = vlm.encode_images([records[0].paths[0], records[1].paths[0]])
    same_image = ImageFeatures(image.tiles.clone(), image.size)

    def logp_given(features):
        row = PackedExample.of(example.prompt_ids, [features], example.responses)
        return response_logps(vlm.model, [row])[0].item()

    assert abs(logp_given(image) - logp_given(other_image)) > 1e-3
    assert logp_given(image) == logp_given(same_image)
