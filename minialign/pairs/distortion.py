"""Bias-Driven Hallucination Sampling (Sec. 3.4, Alg. 1): rejected responses from the model itself, its picture hidden; and the
teacher-forced distortion of Sec. 3.3.

A record's draws depend on (seed, record id, round) alone. One prefill of (visible vectors, prompt, y+) serves all sentences of
a record: each rewinds the cache to its cut and writes on from there, and all sentences of all records decode as one batch.
"""

from dataclasses import dataclass

import torch

from minialign.data.chat_templates import decode_response, encode_prompt, encode_response
from minialign.data.diffusion import diffuse
from minialign.data.image_processor import preprocess
from minialign.data.images import open_image
from minialign.data.packing import PackedExample
from minialign.logprobs import response_hidden_states
from minialign.models.loading import VLM
from minialign.pairs.pair_files import preference_pair
from minialign.utils.seeding import seeded_generator


def noisy_image_features(vlm, paths, steps, generator):
    """Features of the pictures after `steps` of forward diffusion (Eq. 9); one by one, since company moves the last bits."""
    prepared = (preprocess(open_image(path), vlm.image_processor) for path in paths)
    return [
        vlm.model.encode_images([(diffuse(tiles, steps, generator), size)])[0]
        for tiles, size in prepared
    ]


@torch.no_grad()
def predict_under_noise(vlm, prompts, paths, responses, steps, generators):
    """What the policy predicts for each token of y+ (ids) that it reads under a noisy picture (Sec. 3.3); a list of id lists."""
    rows = [
        PackedExample.of(prompt, noisy_image_features(vlm, own, steps, generator), [response])
        for prompt, own, response, generator in zip(prompts, paths, responses, generators)
    ]
    hidden, _, lengths = response_hidden_states(vlm.model, rows)
    ids = torch.cat([(part @ vlm.model.vocab_head.T).argmax(-1) for part in hidden.split(1024)])
    return [part.tolist() for part in ids.split(lengths)]


@dataclass
class DistortionSampler:
    """The sampler of POVID-style distortion: y+ with every token replaced by the prediction, broken words and all."""

    vlm: VLM
    steps: int
    seed: int

    def metadata(self):
        """What a file of pairs says of how they came about."""
        return {"noise": self.steps, "seed": self.seed}

    def pairs(self, records):
        """A pair for each record."""
        tokenizer, template = self.vlm.tokenizer, self.vlm.template
        prompts = [encode_prompt(tokenizer, template, record.turns) for record in records]
        responses = [encode_response(tokenizer, template, record.chosen) for record in records]
        generators = [seeded_generator(self.seed, record.id, "noise") for record in records]
        found = predict_under_noise(
            self.vlm,
            prompts,
            [record.paths for record in records],
            responses,
            self.steps,
            generators,
        )
        return [
            preference_pair(record, decode_response(tokenizer, template, ids).strip())
            | self.metadata()
            for record, ids in zip(records, found)
        ]
