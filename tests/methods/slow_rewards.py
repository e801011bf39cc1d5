"""Score responses slowly: each is decoded, encoded for the reward model, and read as a whole."""

import torch

from minialign import reference
from minialign.data.chat_templates import decode_response, encode_response


@torch.no_grad()
def score_slowly(reward_model, vlm, example, statistics):
    """Return the normalized rewards of an example's responses. The end token is always read."""
    judge = reward_model.vlm
    image_features = judge.encode_images(example.record.paths)
    reward_mean, reward_std = statistics
    rewards = []
    for ids in example.responses:
        ids_without_end = [token for token in ids if token != vlm.tokenizer.eos]
        text = decode_response(vlm.tokenizer, vlm.template, ids_without_end)
        response = encode_response(judge.tokenizer, judge.template, text)
        score = reference.score_response(
            judge.model, reward_model.head, example.prompt_ids, image_features, response
        )
        rewards.append((float(score) - reward_mean) / reward_std)
    return rewards
