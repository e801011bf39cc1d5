"""This module has the paper's methods in their most obvious form, one sequence at a time.

It is the specification (not the reference policy, which is `Policy.reference` in models/policy.py).
Packing, the cache, the blockwise log-probs, the samplers and the losses are tested against it, and
it uses none of them: the mathematics is written down a second time, and nothing is cached. It does
call the decoder and the vision tower. Tests hold the decoder's fast ops to plain forms of their own
(tests/models).

Here are the probability of a response, how one is sampled, and every loss. Where the responses come
from is in two more modules: reference_bdhs.py has what is made from chosen responses,
reference_online.py what the current policy samples.
Equation and section numbers are those of arXiv 2407.02477.

A question is `prompt_ids`, with a placeholder for each image, and `image_features`, one for each
placeholder. A response is a list of ids, the end token last. Models are Llava modules.

Shapes: T positions of a sequence, D hidden size, V vocabulary, I tokens of an image.
"""

import torch

# --- The probability of a response


def hidden_states(model, prompt_ids, image_features, response, visible=None):
    """Compute the hidden states (T, D) of one whole sequence: prompt with images, then response.

    `visible` holds the indices, counted over all image tokens, of those that are not masked. None
    means that all are visible.
    """
    # 1. Embed every token. A placeholder in the prompt gives way to the tokens of the next image.
    image_tokens = model.project_image_features(image_features)  # a list of (I, D)
    embeddings = []
    is_masked = []
    image_index = 0
    image_token_index = 0
    for i, token in enumerate(prompt_ids + response):
        if i < len(prompt_ids) and token == model.config.image_token_id:
            embeddings.append(image_tokens[image_index])
            for _ in range(len(image_tokens[image_index])):
                is_masked.append(visible is not None and image_token_index not in visible)
                image_token_index += 1
            image_index += 1
        else:
            embeddings.append(model.language_model.embed_tokens(torch.tensor([token])))
            is_masked.append(False)
    x = torch.cat(embeddings)[None]  # (1, T, D)

    # 2. Each query sees the keys before it that are not masked (Eq. 6). It also sees itself, even
    #    if it is masked, because a softmax needs at least one key.
    T = len(is_masked)
    is_earlier = torch.ones(T, T, dtype=torch.bool).tril(diagonal=-1)  # (queries, keys)
    is_unmasked = ~torch.tensor(is_masked)  # (keys,)
    is_itself = torch.eye(T, dtype=torch.bool)
    mask = (is_earlier & is_unmasked) | is_itself

    # 3. Run the decoder.
    positions = torch.arange(T)[None]
    return model.language_model(x, positions, mask[None, None])[0]


def next_token_logits(model, prompt_ids, image_features, response, visible=None):
    """Compute the logits (T, V) of the token that follows each position of one sequence."""
    hidden = hidden_states(model, prompt_ids, image_features, response, visible)
    return (hidden @ model.vocab_head.T).float()


def token_logps(model, prompt_ids, image_features, response, visible=None, scored_ids=None):
    """Compute log p(y_t | x, y_<t) in nats for each token of a response, as a list of scalars.

    Each is computed from a sequence of its own that ends just before the token. `scored_ids` asks
    for other tokens y_t in the same places, while y_<t is still the response (Sec. 3.3).
    """
    if scored_ids is None:
        scored_ids = response
    logps = []
    for t in range(len(response)):
        logits = next_token_logits(model, prompt_ids, image_features, response[:t], visible)
        log_probabilities = torch.log_softmax(logits[-1], dim=0)  # (V,)
        logps.append(log_probabilities[scored_ids[t]])
    return logps


def response_logp(model, prompt_ids, image_features, response, visible=None):
    """Compute log p(y | x) in nats, a scalar: the sum over the tokens, the end token included."""
    return sum(token_logps(model, prompt_ids, image_features, response, visible))


# --- Sampling


def sample_token(logits, uniform):
    """Return the first token whose cumulative probability exceeds `uniform`, a number in [0, 1).

    If the number is uniformly distributed, the token is distributed as softmax(logits).
    """
    probabilities = torch.softmax(logits.double(), dim=0)
    cumulative = 0.0
    for token, probability in enumerate(probabilities.tolist()):
        cumulative += probability
        if cumulative > uniform:
            return token
    return len(probabilities) - 1  # only if rounding left the sum below 1


@torch.no_grad()
def generate(model, prompt_ids, image_features, context, uniforms, stop_ids, visible=None):
    """Return the new ids that follow the prompt and `context`, up to the first of `stop_ids`.

    Each step runs the whole sequence anew. `uniforms` holds one number in [0, 1) for each new
    token. None means greedy decoding of at most 64 tokens.
    """
    max_new_tokens = 64 if uniforms is None else len(uniforms)
    new_ids = []
    for step in range(max_new_tokens):
        response = context + new_ids
        logits = next_token_logits(model, prompt_ids, image_features, response, visible)[-1]
        if uniforms is None:
            token = int(logits.argmax())
        else:
            token = sample_token(logits, float(uniforms[step]))
        new_ids.append(token)
        if token in stop_ids:
            break
    return new_ids


# --- Losses on pairs (Sec. 2.2). An example is (prompt_ids, image_features, chosen, rejected).


def log_ratio(policy, ref_model, prompt_ids, image_features, response):
    """Compute log pi(y | x) - log ref(y | x), a scalar. The reference gets no gradient."""
    policy_logp = response_logp(policy, prompt_ids, image_features, response)
    with torch.no_grad():
        ref_logp = response_logp(ref_model, prompt_ids, image_features, response)
    return policy_logp - ref_logp


def margins(policy, ref_model, examples):
    """Compute h (B,), the log ratio of the chosen response less that of the rejected one."""
    all_margins = []
    for prompt_ids, image_features, chosen, rejected in examples:
        chosen_log_ratio = log_ratio(policy, ref_model, prompt_ids, image_features, chosen)
        rejected_log_ratio = log_ratio(policy, ref_model, prompt_ids, image_features, rejected)
        all_margins.append(chosen_log_ratio - rejected_log_ratio)
    return torch.stack(all_margins)


def dpo_loss(policy, ref_model, examples, beta):
    """Compute the DPO loss (Eq. 3), the mean of -log sigmoid(beta h) over pairs."""
    h = margins(policy, ref_model, examples)
    return -torch.log(torch.sigmoid(beta * h)).mean()


def ipo_loss(policy, ref_model, examples, beta):
    """Compute the IPO loss, the mean of (h - 1 / (2 beta))^2 over pairs."""
    h = margins(policy, ref_model, examples)
    return ((h - 1 / (2 * beta)) ** 2).mean()


def ipo_mean_loss(policy, ref_model, examples, beta):
    """Compute the IPO loss with log ratios per token, the mean over pairs."""
    losses = []
    for prompt_ids, image_features, chosen, rejected in examples:
        chosen_log_ratio = log_ratio(policy, ref_model, prompt_ids, image_features, chosen)
        rejected_log_ratio = log_ratio(policy, ref_model, prompt_ids, image_features, rejected)
        h = chosen_log_ratio / len(chosen) - rejected_log_ratio / len(rejected)
        losses.append((h - 1 / (2 * beta)) ** 2)
    return sum(losses) / len(losses)


def slic_loss(policy, ref_model, examples, beta):
    """Compute the SLiC loss with a reference, the mean of max(0, 1 - beta h) over pairs."""
    h = margins(policy, ref_model, examples)
    return torch.clamp(1 - beta * h, min=0).mean()


def slic_calibration_loss(policy, examples, beta, sft_weight=0.1):
    """Compute the SLiC-HF loss, which needs no reference, the mean over pairs."""
    losses = []
    for prompt_ids, image_features, chosen, rejected in examples:
        chosen_logp = response_logp(policy, prompt_ids, image_features, chosen)
        rejected_logp = response_logp(policy, prompt_ids, image_features, rejected)
        hinge = torch.clamp(1 - beta * (chosen_logp - rejected_logp), min=0)
        losses.append(hinge - sft_weight * beta * chosen_logp)
    return sum(losses) / len(losses)


def averaged_loss(policy, ref_model, examples, beta, gamma):
    """Compute Eq. 5 with DPO, the mean over (prompt_ids, image_features, y+, y-, y~-).

    y~- has as many ids as y+, and each is scored in the context of y+ (Sec. 3.3).
    """
    losses = []
    for prompt_ids, image_features, chosen, rejected, distorted in examples:
        # 1. The log ratios of y+, y- and y~-.
        chosen_log_ratio = log_ratio(policy, ref_model, prompt_ids, image_features, chosen)
        rejected_log_ratio = log_ratio(policy, ref_model, prompt_ids, image_features, rejected)
        policy_logps = token_logps(policy, prompt_ids, image_features, chosen, scored_ids=distorted)
        with torch.no_grad():
            ref_logps = token_logps(
                ref_model, prompt_ids, image_features, chosen, scored_ids=distorted
            )
        distorted_log_ratio = sum(policy_logps) - sum(ref_logps)

        # 2. gamma L(y+, y-) + (1 - gamma) L(y+, y~-)
        rejected_margin = chosen_log_ratio - rejected_log_ratio
        distorted_margin = chosen_log_ratio - distorted_log_ratio
        rejected_loss = -torch.log(torch.sigmoid(beta * rejected_margin))
        distorted_loss = -torch.log(torch.sigmoid(beta * distorted_margin))
        losses.append(gamma * rejected_loss + (1 - gamma) * distorted_loss)
    return sum(losses) / len(losses)


# --- Supervised loss, reward model


def sft_loss(model, examples):
    """Compute the mean of -log p over all tokens of all examples.

    An example is (prompt_ids, image_features, response).
    """
    summed_logps = 0.0
    num_tokens = 0
    for prompt_ids, image_features, response in examples:
        summed_logps += response_logp(model, prompt_ids, image_features, response)
        num_tokens += len(response)
    return -summed_logps / num_tokens


def score_response(model, head, prompt_ids, image_features, response):
    """Compute r(x, y), a scalar: the head on the state that has read the last token."""
    last_state = hidden_states(model, prompt_ids, image_features, response)[-1]
    return head(last_state).squeeze()


def reward_model_loss(model, head, examples):
    """Compute the reward model's loss (Eq. 1), the mean of -log sigmoid(r+ - r-) over pairs."""
    losses = []
    for prompt_ids, image_features, chosen, rejected in examples:
        chosen_score = score_response(model, head, prompt_ids, image_features, chosen)
        rejected_score = score_response(model, head, prompt_ids, image_features, rejected)
        losses.append(-torch.log(torch.sigmoid(chosen_score - rejected_score)))
    return sum(losses) / len(losses)


# --- Policy gradients (Sec. 2.1, App. A)


def rloo_advantages(rewards):
    """Compute each reward less the mean of the others, for the responses to one prompt."""
    advantages = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        baseline = sum(others) / len(others)
        advantages.append(reward - baseline)
    return advantages


def rloo_loss(policy, ref_model, examples, beta):
    """Compute the RLOO loss, the mean over all responses of -advantage * log pi(y | x).

    An example is (prompt_ids, image_features, responses, rewards). This is REINFORCE. The clipped
    surrogate has the same gradient as long as the policy is the one that sampled the responses.
    """
    losses = []
    for prompt_ids, image_features, responses, rewards in examples:
        # 1. The reward less the KL penalty, for each whole response (Eq. 2).
        logps = []
        penalized_rewards = []
        for response, reward in zip(responses, rewards, strict=True):
            logp = response_logp(policy, prompt_ids, image_features, response)
            ref_logp = response_logp(ref_model, prompt_ids, image_features, response)
            kl = (logp - ref_logp).item()
            logps.append(logp)
            penalized_rewards.append(reward - beta * kl)

        # 2. Raise the log-prob of what is better than its siblings.
        advantages = rloo_advantages(penalized_rewards)
        for logp, advantage in zip(logps, advantages, strict=True):
            losses.append(-advantage * logp)
    return sum(losses) / len(losses)


def penalized_token_rewards(logps, ref_logps, reward, beta):
    """Compute PPO's reward of each token: the KL penalty everywhere, the reward at the last."""
    token_rewards = []
    for logp, ref_logp in zip(logps, ref_logps, strict=True):
        token_rewards.append(-beta * (logp - ref_logp))
    token_rewards[-1] += reward
    return token_rewards


def gae_advantages(token_rewards, values, gamma=1.0, gae_lambda=0.95):
    """Compute the generalized advantage estimate of each token, the sums written out."""
    num_tokens = len(token_rewards)
    next_values = values[1:] + [0.0]  # nothing comes after the last token
    deltas = []
    for t in range(num_tokens):
        deltas.append(token_rewards[t] + gamma * next_values[t] - values[t])
    advantages = []
    for t in range(num_tokens):
        advantage = 0.0
        for s in range(t, num_tokens):
            advantage += (gamma * gae_lambda) ** (s - t) * deltas[s]
        advantages.append(advantage)
    return advantages


def whiten(advantages):
    """Return the advantages of all tokens (N,) with mean 0 and standard deviation 1."""
    mean = advantages.mean()
    std = advantages.std(correction=0)
    return (advantages - mean) / (std + 1e-8)


def token_values(policy, value_head, prompt_ids, image_features, response):
    """Compute V of each token, a list of scalars: the head on the state that predicts the token."""
    values = []
    for t in range(len(response)):
        state = hidden_states(policy, prompt_ids, image_features, response[:t])[-1]
        values.append(value_head(state).squeeze())
    return values


def ppo_loss(policy, ref_model, value_head, examples, beta, value_weight=0.1):
    """Compute the PPO loss in the first pass over a batch, where nothing is clipped yet.

    An example is (prompt_ids, image_features, response, reward). The policy loss and the value loss
    are means over the tokens of all examples.
    """
    # 1. Log-probs and values of all tokens, with their advantages and returns.
    all_logps = []
    all_values = []
    all_advantages = []
    all_returns = []
    for prompt_ids, image_features, response, reward in examples:
        logps = token_logps(policy, prompt_ids, image_features, response)
        ref_logps = token_logps(ref_model, prompt_ids, image_features, response)
        values = token_values(policy, value_head, prompt_ids, image_features, response)
        old_logps = [logp.item() for logp in logps]
        old_values = [value.item() for value in values]
        old_ref_logps = [ref_logp.item() for ref_logp in ref_logps]
        token_rewards = penalized_token_rewards(old_logps, old_ref_logps, reward, beta)
        advantages = gae_advantages(token_rewards, old_values)
        all_logps += logps
        all_values += values
        all_advantages += advantages
        for advantage, value in zip(advantages, old_values, strict=True):
            all_returns.append(advantage + value)

    # 2. The policy loss, with advantages whitened over all tokens, and the value loss.
    advantages = whiten(torch.tensor(all_advantages))
    policy_loss = -(advantages * torch.stack(all_logps)).mean()
    errors = torch.stack(all_values) - torch.tensor(all_returns)
    value_loss = 0.5 * (errors**2).mean()
    return policy_loss + value_weight * value_loss
