"""The slow twins: the method in its most obvious lines, one sequence at a time, nothing shared, nothing cached, nothing dropped.

This is the specification of what is fast elsewhere; tests hold the two equal.
"""

import itertools

import torch

from minialign.data.chat_templates import (
    decode_response,
    encode_prompt,
    encode_response,
    end_token_id,
)


def hidden_states(model, prompt, pictures, continuation, visible=None):
    """Hidden states (T, D) of one whole sequence, a prompt with its pictures' vectors followed by a continuation's ids.

    With `visible` (indices over all picture vectors), the other vectors are hidden from every query of every layer by the
    attention mask; each position may still see itself, so that no row of the attention is empty.
    """
    vectors = model.project_image_features(pictures)
    parts, hidden, picture = [], [], 0
    for place, token in enumerate(prompt + continuation):
        if place < len(prompt) and token == model.config.image_token_id:
            parts.append(vectors[picture])
            first = sum(len(v) for v in vectors[:picture])
            hidden += [
                visible is not None and first + i not in visible
                for i in range(len(vectors[picture]))
            ]
            picture += 1
        else:
            parts.append(model.language_model.embed_tokens(torch.tensor([token])))
            hidden.append(False)
    x = torch.cat(parts)[None]  # (1, T, D)
    T = x.shape[1]
    mask = torch.tensor(
        [
            [key == query or key < query and not hidden[key] for key in range(T)]
            for query in range(T)
        ]
    )
    return model.language_model(x, torch.arange(T)[None], mask[None, None])[0]


def next_token_logits(model, prompt, pictures, continuation, visible=None):
    """Logits (T, V) of one whole sequence."""
    return (
        hidden_states(model, prompt, pictures, continuation, visible) @ model.vocab_head.T
    ).float()


def token_logps(model, prompt, pictures, response, visible=None, scored=None):
    """log p of each token in nats, a list: one after the other, each from a sequence run anew; the end token counts.

    With `scored`, the log-probs are of those ids, each where the response's own token would come (Sec. 3.3).
    """
    rows = [
        next_token_logits(model, prompt, pictures, response[:t], visible)[-1]
        for t in range(len(response))
    ]
    return [row[token] - torch.logsumexp(row, 0) for row, token in zip(rows, scored or response)]


def response_logp(model, prompt, pictures, response, visible=None):
    """log p(response | prompt) in nats."""
    return sum(token_logps(model, prompt, pictures, response, visible))


def dpo_loss(policy, reference, examples, beta):
    """DPO (Eq. 3), mean over (prompt, pictures, chosen, rejected): two models, four sequences for each pair."""
    losses = []
    for prompt, pictures, chosen, rejected in examples:
        own, frozen = (
            response_logp(model, prompt, pictures, chosen)
            - response_logp(model, prompt, pictures, rejected)
            for model in (policy, reference)
        )
        losses.append(torch.log1p(torch.exp(-beta * (own - frozen.detach()))))
    return sum(losses) / len(losses)


def averaged_loss(policy, reference, examples, beta, gamma):
    """Eq. 5 with DPO, mean over (prompt, pictures, y+, y-, y~-); y~- are ids that are scored in the context of y+ (Sec. 3.3)."""
    losses = []
    for prompt, pictures, chosen, rejected, other in examples:
        gains = []
        for model in (policy, reference):
            right, wrong = (
                response_logp(model, prompt, pictures, response) for response in (chosen, rejected)
            )
            gains.append(
                (
                    right - wrong,
                    right - sum(token_logps(model, prompt, pictures, chosen, scored=other)),
                )
            )
        for weight, own, frozen in zip((gamma, 1 - gamma), *gains):
            losses.append(-weight * torch.log(torch.sigmoid(beta * (own - frozen.detach()))))
    return sum(losses) / len(examples)


def reward_model_loss(model, head, examples):
    """The reward model's loss (Eq. 1), mean over (prompt, pictures, chosen, rejected): the head reads the last token's state."""
    losses = []
    for prompt, pictures, chosen, rejected in examples:
        right, wrong = (
            head(hidden_states(model, prompt, pictures, response)[-1])
            for response in (chosen, rejected)
        )
        losses.append(-torch.log(torch.sigmoid(right - wrong)))
    return sum(losses).squeeze() / len(losses)


def rloo_loss(policy, reference, examples, beta):
    """RLOO as REINFORCE, mean over (prompt, pictures, responses, rewards): advantage times log-prob; its gradient is that of step 0."""
    losses = []
    for prompt, pictures, responses, rewards in examples:
        logps = [response_logp(policy, prompt, pictures, response) for response in responses]
        penalised = [
            reward - beta * (logp - response_logp(reference, prompt, pictures, response)).item()
            for reward, logp, response in zip(rewards, logps, responses)
        ]
        for i, logp in enumerate(logps):
            others = [one for j, one in enumerate(penalised) if j != i]
            losses.append(-(penalised[i] - sum(others) / len(others)) * logp)
    return sum(losses) / len(losses)


def ppo_loss(policy, reference, head, examples, beta, gamma=1.0, lam=0.95, value_weight=0.1):
    """PPO at step 0, where no ratio is clipped, over (prompt, pictures, response, reward): policy and value loss, means over all tokens."""
    logps, values, advantages, returns = [], [], [], []
    for prompt, pictures, response, reward in examples:
        own, frozen = (
            token_logps(model, prompt, pictures, response) for model in (policy, reference)
        )
        value = [
            head(hidden_states(policy, prompt, pictures, response[:t])[-1]).squeeze()
            for t in range(len(response))
        ]
        rewards = [-beta * (a - b).item() for a, b in zip(own, frozen)]
        rewards[-1] += reward
        after = [v.item() for v in value[1:]] + [0.0]
        deltas = [r + gamma * later - v.item() for r, v, later in zip(rewards, value, after)]
        gae = [
            sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
            for t in range(len(deltas))
        ]
        logps, values, advantages, returns = (
            logps + own,
            values + value,
            advantages + gae,
            returns + [a + v.item() for a, v in zip(gae, value)],
        )
    advantages = torch.tensor(advantages)
    whitened = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
    policy_loss = -sum(a * logp for a, logp in zip(whitened, logps)) / len(logps)
    return policy_loss + value_weight * sum(
        0.5 * (v - r) ** 2 for v, r in zip(values, returns)
    ) / len(values)


def sft_loss(model, examples):
    """Mean negative log-likelihood per token over (prompt, pictures, response)."""
    return -sum(response_logp(model, *example) for example in examples) / sum(
        len(response) for _, _, response in examples
    )


@torch.no_grad()
def generate(model, prompt, pictures, given, uniforms, stops, visible=None):
    """New ids after `prompt` and `given`, every step from the whole sequence anew: greedy if `uniforms` is None, else the first
    token whose cumulative probability passes the step's uniform draw."""
    written = []
    for step in range(len(uniforms) if uniforms is not None else 64):
        row = next_token_logits(model, prompt, pictures, given + written, visible)[-1]
        token = int(row.argmax())
        if uniforms is not None:
            below = itertools.accumulate(torch.softmax(row.double(), 0).tolist())
            token = next(
                (id for id, share in enumerate(below) if share > float(uniforms[step])),
                len(row) - 1,
            )
        written.append(token)
        if token in stops:
            break
    return written


def guided_rejected(model, tokenizer, template, turns, pictures, text, draw):
    """One guided round of BDHS (Alg. 1): each sentence's kept part finished under the mask, from the true text before it."""
    prompt = encode_prompt(tokenizer, template, turns)
    stops = {id for id in range(tokenizer.size) if "." in tokenizer.token_text(id)} | {
        end_token_id(tokenizer, template)
    }
    rejected, place = "", 0
    for sentence, uniforms in zip(draw.sentences, draw.uniforms):
        before = (text[: sentence.start] + sentence.kept).rstrip()
        given = encode_response(tokenizer, template, before)[:-1] if before else []
        new = generate(model, prompt, pictures, given, uniforms, stops, set(draw.visible))
        added = decode_response(tokenizer, template, given + new)[
            len(decode_response(tokenizer, template, given)) :
        ]
        added = added[: added.find(".") + 1] or added
        rejected += (
            text[place : sentence.start]
            + sentence.kept
            + (added if sentence.kept else added.lstrip())
        )
        place = sentence.end
    return rejected.strip()
