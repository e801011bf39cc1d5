"""Rejected responses from noisy images: the teacher-forced distortion of POVID (Sec. 3.3).

The model reads the chosen response while it sees a noisy image. At every position its most likely
next token is taken. The context is the chosen response throughout, never what was predicted
before.
"""

from dataclasses import dataclass

import torch

from minialign.data.chat_templates import decode_response, encode_prompt, encode_response
from minialign.data.diffusion import diffuse
from minialign.data.image_processor import preprocess
from minialign.data.images import open_image
from minialign.data.packing import PackedExample
from minialign.data.records import Record
from minialign.logprobs import response_hidden_states
from minialign.models.llava import ImageFeatures
from minialign.models.loading import VLM
from minialign.models.split import same_in_all_parts
from minialign.pairs.image_batches import batches_with_images
from minialign.pairs.pair_files import preference_pair
from minialign.utils.seeding import seeded_generator


def noisy_image_features(vlm: VLM, paths, noise_steps, generator) -> list[ImageFeatures]:
    """Encode images after `noise_steps` of forward diffusion (Eq. 9)."""
    features = []
    for path in paths:
        tiles, size = preprocess(open_image(path), vlm.image_processor)
        noisy_tiles = diffuse(tiles, noise_steps, generator)
        # One image at a time: encoded together, images would differ in the last bits.
        features += vlm.model.encode_images([(noisy_tiles, size)])
    return features


@torch.no_grad()
def predict_under_noise(
    vlm: VLM, prompts, paths, responses, *, noise_steps, generators
) -> list[list[int]]:
    """Predict each token of the responses from the true tokens before it, under noisy images.

    The arguments are lists with one entry a record: prompt ids, image paths, response ids,
    generator.
    """
    # 1. Pack prompt and response of each record, still without its images.
    examples = []
    for prompt_ids, response in zip(prompts, responses, strict=True):
        examples.append(PackedExample.of(prompt_ids, [], [response]))

    # 2. Read as many together as fit, with the noisy images.
    def encode(i):
        """Return the noisy images of a record."""
        return noisy_image_features(vlm, paths[i], noise_steps, generators[i])

    predicted = []
    for rows in batches_with_images(vlm, examples, paths, encode):
        predicted += likeliest_tokens(vlm.model, rows)
    return predicted


def likeliest_tokens(model, rows: list[PackedExample]) -> list[list[int]]:
    """Return the most likely token at each position of the responses of packed examples."""
    # 1. Read them.
    hidden, _, lengths = response_hidden_states(model, rows)  # (N, D)

    # 2. Take the most likely token, 1,024 positions at a time, so that the logits stay small.
    predicted = []
    for block in hidden.split(1024):
        logits = block @ model.vocab_head.T
        predicted.append(logits.argmax(-1))

    # 3. Divide the tokens between the responses again.
    predicted_ids = same_in_all_parts(torch.cat(predicted))
    return [ids.tolist() for ids in predicted_ids.split(lengths)]


@dataclass
class DistortionSampler:
    """Samples rejected responses in which every token is the prediction under noise.

    Each token is predicted on its own, so a rejected response may hold broken words.
    """

    vlm: VLM
    noise_steps: int
    seed: int

    def metadata(self) -> dict:
        """Return the settings that a file of pairs records in its header and in every pair."""
        return {"noise": self.noise_steps, "seed": self.seed}

    def pairs(self, records: list[Record]) -> list[dict]:
        """Make a pair for each record. The noise depends on (seed, record id) alone."""
        tokenizer = self.vlm.tokenizer
        template = self.vlm.template
        prompts = []
        responses = []
        generators = []
        for record in records:
            prompts.append(encode_prompt(tokenizer, template, record.turns, system=record.system))
            responses.append(encode_response(tokenizer, template, record.chosen))
            generators.append(seeded_generator(self.seed, record.id, "noise"))
        predicted = predict_under_noise(
            self.vlm,
            prompts,
            [record.paths for record in records],
            responses,
            noise_steps=self.noise_steps,
            generators=generators,
        )
        pairs = []
        for record, ids in zip(records, predicted, strict=True):
            text = decode_response(tokenizer, template, ids).strip()
            pairs.append(preference_pair(record, text) | self.metadata())
        return pairs
