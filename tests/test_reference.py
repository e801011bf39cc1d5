"""These tests hold the reference to numbers worked out by hand, in a world of two tokens.

Its BDHS is worked by hand in test_reference_bdhs.py. The tests that hold fast code equal to the
reference are there, in test_response_logps.py, in methods/test_reference_online.py and wherever a
test calls `reference`.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minialign import reference, reference_online

LOG = math.log
PLACEHOLDER = 2  # the id that stands for an image in a prompt


class LastTokenDecoder(nn.Module):
    """A decoder whose state is the last token's embedding: (1, 0) for token 0, (0, 1) for 1."""

    def embed_tokens(self, ids):
        table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        return table[ids]

    def forward(self, x, positions, mask):
        return x


class AveragingDecoder(LastTokenDecoder):
    """A decoder whose state is the mean of all embeddings that a position may see."""

    def forward(self, x, positions, mask):
        weights = mask[0].float()  # (1, queries, keys)
        return weights @ x / weights.sum(dim=-1, keepdim=True)


def make_model(probabilities, decoder=None):
    """Return a model of two tokens, in which p(v | u) = probabilities[u][v] after last token u."""
    model = nn.Module()
    model.config = SimpleNamespace(image_token_id=PLACEHOLDER)
    model.language_model = decoder or LastTokenDecoder()
    model.vocab_head = nn.Parameter(torch.tensor(probabilities).log().T)  # (V, D)
    model.project_image_features = lambda image_features: image_features
    return model


@pytest.fixture()
def policy():
    """Return a policy with p(0 | 0) = 1/4 and p(1 | 0) = 3/4. After token 1 both are as likely."""
    return make_model([[0.25, 0.75], [0.5, 0.5]])


@pytest.fixture()
def ref_model():
    """Return a reference for which both tokens are always as likely."""
    return make_model([[0.5, 0.5], [0.5, 0.5]])


PROMPT = [0]
NO_IMAGES = []


# --- The probability of a response


@pytest.mark.parametrize(
    "visible, expected",
    [
        (None, [[4, 0], [2, 2], [4 / 3, 5 / 3], [5 / 4, 5 / 4]]),
        ({0, 1}, [[4, 0], [2, 2], [4 / 3, 5 / 3], [5 / 4, 5 / 4]]),
        ({1}, [[4, 0], [0, 4], [0, 5 / 2], [1 / 3, 5 / 3]]),
        (set(), [[4, 0], [0, 4], [0, 1], [1 / 2, 1 / 2]]),
    ],
)
def test_masked_image_tokens_are_seen_by_nobody_but_themselves(visible, expected):
    """The embeddings are (4, 0) and (0, 4) of the image, (0, 1) of the prompt, (1, 0) of y.

    The decoder averages what each position sees. A masked token has no share in other positions.
    """
    model = make_model([[0.5, 0.5], [0.5, 0.5]], AveragingDecoder())
    image = torch.tensor([[4.0, 0.0], [0.0, 4.0]])

    hidden = reference.hidden_states(model, [PLACEHOLDER, 1], [image], [0], visible)

    torch.testing.assert_close(hidden, torch.tensor(expected, dtype=torch.float32))


def test_visible_counts_the_tokens_of_all_images():
    """The images have one token and two tokens. Number 1 is the first token of the second image."""
    model = make_model([[0.5, 0.5], [0.5, 0.5]], AveragingDecoder())
    first_image = torch.tensor([[8.0, 0.0]])
    second_image = torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    prompt_ids = [PLACEHOLDER, PLACEHOLDER, 0]

    hidden = reference.hidden_states(model, prompt_ids, [first_image, second_image], [], {1})

    assert hidden[-1].tolist() == [0.5, 1.0]  # the mean of (0, 2) and token 0, (1, 0)


def test_placeholder_in_a_response_is_an_ordinary_token(policy):
    hidden = reference.hidden_states(policy, PROMPT, NO_IMAGES, [PLACEHOLDER])

    assert hidden.tolist() == [[1, 0], [1, 1]]


def test_token_log_probs_worked_by_hand(policy):
    """The response 1, 0 has the probability 3/4 x 1/2."""
    logps = reference.token_logps(policy, PROMPT, NO_IMAGES, [1, 0])
    summed = reference.response_logp(policy, PROMPT, NO_IMAGES, [1, 0])

    assert [logp.item() for logp in logps] == pytest.approx([LOG(3 / 4), LOG(1 / 2)])
    assert summed.item() == pytest.approx(LOG(3 / 8))


def test_scored_ids_are_scored_in_the_context_of_the_response(policy):
    """In the places of 1, 1 the tokens 0, 0 have the probabilities 1/4 and, after 1, 1/2."""
    logps = reference.token_logps(policy, PROMPT, NO_IMAGES, [1, 1], scored_ids=[0, 0])

    assert [logp.item() for logp in logps] == pytest.approx([LOG(1 / 4), LOG(1 / 2)])


# --- Sampling


@pytest.mark.parametrize(
    "uniform, token", [(0.0, 0), (0.24, 0), (0.25, 1), (0.99, 1), (1 - 2**-24, 1)]
)
def test_sampled_token_is_where_the_cumulative_probability_passes_the_number(uniform, token):
    logits = torch.tensor([0.25, 0.75]).log().double()

    assert reference.sample_token(logits, uniform) == token


def test_sampled_token_at_a_boundary_is_the_later_one():
    """The numbers in [0, 1/2) give token 0, those in [1/2, 1) token 1."""
    assert reference.sample_token(torch.zeros(2), 0.5) == 1


def test_sampled_tokens_have_the_probabilities_of_the_softmax():
    """A grid of 1,000 numbers gives each token its share to within one of them."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()

    tokens = [reference.sample_token(logits, i / 1000) for i in range(1000)]

    counts = [tokens.count(token) for token in range(4)]
    assert counts == pytest.approx([100, 200, 300, 400], abs=1)


@pytest.mark.parametrize(
    "uniforms, stop_ids, expected",
    [
        ([0.1, 0.3, 0.6], set(), [0, 1, 1]),  # p(0) is 1/4, 1/4, 1/2
        ([0.1, 0.3, 0.6], {1}, [0, 1]),
        ([0.1, 0.1, 0.1], {1}, [0, 0, 0]),  # the numbers end before a stop
        (None, {1}, [1]),  # greedy
    ],
)
def test_generated_ids_worked_by_hand(policy, uniforms, stop_ids, expected):
    ids = reference.generate(policy, PROMPT, NO_IMAGES, [], uniforms, stop_ids)

    assert ids == expected


def test_generation_continues_the_context(policy):
    """After the context 1 the token 0 has the probability 1/2 instead of 1/4."""
    assert reference.generate(policy, PROMPT, NO_IMAGES, [], [0.4], set()) == [1]
    assert reference.generate(policy, PROMPT, NO_IMAGES, [1], [0.4], set()) == [0]


# --- Losses

# The log ratios of the responses 1 and 0 are log 3/2 and log 1/2, so that h = log 3.
PAIR = (PROMPT, NO_IMAGES, [1], [0])
# The log ratios of 1, 0 and 0 are log 3/2 over two tokens and log 1/2 over one.
UNEQUAL_PAIR = (PROMPT, NO_IMAGES, [1, 0], [0])


def test_margins_worked_by_hand(policy, ref_model):
    h = reference.margins(policy, ref_model, [PAIR, UNEQUAL_PAIR])

    assert h.tolist() == pytest.approx([LOG(3), LOG(3)])


@pytest.mark.parametrize(
    "loss_function, beta, expected",
    [
        (reference.dpo_loss, 1.0, LOG(4 / 3)),  # sigmoid(log 3) = 3/4
        (reference.dpo_loss, 2.0, LOG(10 / 9)),  # sigmoid(log 9) = 9/10
        (reference.ipo_loss, 0.5, (LOG(3) - 1) ** 2),
        (reference.ipo_mean_loss, 0.5, (LOG(3) - 1) ** 2),  # one token each
        (reference.slic_loss, 0.5, 1 - 0.5 * LOG(3)),
        (reference.slic_loss, 1.0, 0.0),  # beyond the hinge
    ],
)
def test_loss_of_a_pair_worked_by_hand(policy, ref_model, loss_function, beta, expected):
    loss = loss_function(policy, ref_model, [PAIR], beta)

    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_ipo_of_means_divides_by_the_number_of_tokens(policy, ref_model):
    loss = reference.ipo_mean_loss(policy, ref_model, [UNEQUAL_PAIR], 0.5)

    assert loss.item() == pytest.approx((LOG(3 / 2) / 2 - LOG(1 / 2) - 1) ** 2)


@pytest.mark.parametrize(
    "beta, expected",
    [
        (0.5, 1 - 0.5 * LOG(3) - 0.1 * 0.5 * LOG(3 / 4)),
        (1.0, -0.1 * LOG(3 / 4)),  # beyond the hinge
    ],
)
def test_slic_calibration_worked_by_hand(policy, beta, expected):
    loss = reference.slic_calibration_loss(policy, [PAIR], beta)

    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "loss_function",
    [reference.dpo_loss, reference.ipo_loss, reference.ipo_mean_loss, reference.slic_loss],
)
def test_pair_losses_are_means_over_pairs_without_gradient_for_the_reference(
    policy, ref_model, loss_function
):
    other_pair = (PROMPT, NO_IMAGES, [0], [1, 0])
    both = loss_function(policy, ref_model, [PAIR, other_pair], 0.5)
    first = loss_function(policy, ref_model, [PAIR], 0.5)
    second = loss_function(policy, ref_model, [other_pair], 0.5)

    both.backward()

    assert first.item() != pytest.approx(second.item(), abs=0.1)
    assert both.item() == pytest.approx((first.item() + second.item()) / 2)
    assert policy.vocab_head.grad.norm() > 0
    assert ref_model.vocab_head.grad is None


def test_averaged_loss_worked_by_hand(policy, ref_model):
    """y~- = 0, 0 is scored in the context of y+ = 1, 1: its log ratios are log 1/2 and, after 1, 0.

    y+ has the log ratio log 3/2, so h = log 3 for y~-. For y- = 1 it is log 3/2 - log 3/2 = 0.
    """
    example = (PROMPT, NO_IMAGES, [1, 1], [1], [0, 0])

    loss = reference.averaged_loss(policy, ref_model, [example], beta=1.0, gamma=0.25)

    assert loss.item() == pytest.approx(0.25 * LOG(2) + 0.75 * LOG(4 / 3))


def test_sft_loss_is_the_mean_over_tokens(policy):
    """Three tokens in all: log 3/4, and log 3/4 with log 1/2."""
    examples = [(PROMPT, NO_IMAGES, [1]), (PROMPT, NO_IMAGES, [1, 0])]

    loss = reference.sft_loss(policy, examples)

    assert loss.item() == pytest.approx(-(2 * LOG(3 / 4) + LOG(1 / 2)) / 3)


@pytest.fixture()
def head():
    """Return a scalar head that gives 1/2 to a state behind token 0, and 1/4 behind token 1."""
    head = nn.Linear(2, 1, bias=False)
    head.weight.data = torch.tensor([[0.5, 0.25]])
    return head


def test_reward_model_loss_reads_the_last_token(policy, head):
    """The chosen response 1, 0 scores 1/2 and the rejected 1, 1 scores 1/4."""
    example = (PROMPT, NO_IMAGES, [1, 0], [1, 1])

    loss = reference.reward_model_loss(policy, head, [example])

    assert loss.item() == pytest.approx(LOG(1 + math.exp(-0.25)))


# --- Policy gradients


def test_rloo_advantages_worked_by_hand():
    """The means of the other two rewards are 4, 3.5 and 1.5."""
    assert reference.rloo_advantages([1.0, 2.0, 6.0]) == [-3.0, -1.5, 4.5]


def test_rloo_loss_worked_by_hand(policy, ref_model):
    """The penalized rewards are 1 - 0.5 log 3/2 and -0.5 log 1/2; A is their difference.

    The loss is the mean of -A log 3/4 and A log 1/4.
    """
    example = (PROMPT, NO_IMAGES, [[1], [0]], [1.0, 0.0])

    loss = reference.rloo_loss(policy, ref_model, [example], beta=0.5)

    advantage = 1 - 0.5 * LOG(3)
    assert loss.item() == pytest.approx(-advantage * LOG(3) / 2)


def test_gae_advantages_worked_by_hand():
    """The deltas of rewards 1, 0, 2 and values 0.5, 1, 0.25 are 1.5, -0.75 and 1.75."""
    rewards = [1.0, 0.0, 2.0]
    values = [0.5, 1.0, 0.25]

    advantages = reference.gae_advantages(rewards, values, gae_lambda=0.5)

    assert advantages == [1.5 - 0.5 * 0.75 + 0.25 * 1.75, -0.75 + 0.5 * 1.75, 1.75]


def test_whitened_advantages_have_mean_0_and_standard_deviation_1():
    assert reference.whiten(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1, 1])


def test_ppo_loss_worked_by_hand(policy, ref_model, head):
    """The response 1, 0 with reward 2: log-probs log 3/4, log 1/2 and values 1/2, 1/4."""
    example = (PROMPT, NO_IMAGES, [1, 0], 2.0)

    loss = reference.ppo_loss(policy, ref_model, head, [example], beta=1.0)

    first_advantage = (-LOG(3 / 2) + 0.25 - 0.5) + 0.95 * 1.75  # the KL penalty is log 3/2
    second_advantage = 2 - 0.25  # the KL penalty is 0
    assert first_advantage < second_advantage  # so they are whitened to -1 and 1
    policy_loss = (LOG(3 / 4) - LOG(1 / 2)) / 2
    value_loss = 0.5 * (first_advantage**2 + second_advantage**2) / 2
    assert loss.item() == pytest.approx(policy_loss + 0.1 * value_loss)


def test_advantages_of_rollouts_worked_by_hand():
    """With beta = 0.5 the KL terms 2 and -1 make penalized rewards of 0 and 1.5."""
    first = reference_online.Rollout(
        [1], 1.0, logps=[-1.0, -1.0], ref_logps=[-2.0, -2.0], values=[]
    )
    second = reference_online.Rollout([0], 1.0, logps=[-2.0], ref_logps=[-1.0], values=[])

    assert reference_online.rloo_rollout_advantages([first, second], 0.5) == [-1.5, 1.5]


def test_reward_statistics_worked_by_hand():
    assert reference_online.reward_statistics([1.0, 3.0, 5.0, 7.0]) == (4, math.sqrt(5))
