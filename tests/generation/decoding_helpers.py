"""Helpers for the tests of decoding: models, questions, and what the slow reference generates."""

from dataclasses import dataclass, replace

import torch

from minialign import reference
from minialign.data.chat_templates import encode_prompt
from minialign.data.packing import PackedExample
from minialign.generation.decoding import SamplingParams, generate, share_prefix
from minialign.models.llava import Llava

NEW_TOKENS = 12
SAMPLING = SamplingParams(max_new_tokens=NEW_TOKENS)
MODELS = ["shipped", "grouped heads"]
QUESTIONS = ["Is there a cup in the picture?", "What can be seen in it? Tell me all."]


def with_model(vlm, name):
    """Return the VLM with the shipped model, or with one of grouped heads and a tied vocabulary."""
    if name == "grouped heads":
        vlm.model = model_with_grouped_heads(vlm.model)
    return vlm


def model_with_grouped_heads(model):
    """Make a random model of nearly the same shape."""
    torch.manual_seed(1)
    text = replace(model.config.text, num_kv_heads=2, tie_word_embeddings=True, num_layers=2)
    grouped = Llava(replace(model.config, text=text))
    for parameter in grouped.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return grouped.requires_grad_(False).eval()


@dataclass
class Question:
    """A prompt about one image, and the same packed for decoding."""

    prompt_ids: list
    features: list
    row: PackedExample


def questions_of(vlm, records):
    """Return a Question for each record."""
    questions = []
    for record in records:
        prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
        features = vlm.encode_images(record.paths)
        row = share_prefix([prompt_ids], features)
        questions.append(Question(prompt_ids, features, row))
    return questions


def random_uniforms(n):
    """Return random numbers for `n` responses."""
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(NEW_TOKENS, generator=generator) for _ in range(n)]


def generate_rows(vlm, rows, sampling=SAMPLING, uniforms=None, stop_ids=None):
    """Generate a response for each branch of rows, stopped by the end token or by `stop_ids`."""
    if stop_ids is None:
        stop_ids = {vlm.tokenizer.eos}
    return generate(vlm.model, rows, sampling, stop_ids=stop_ids, uniforms=uniforms)


def recomputed(vlm, prompt_ids, features, uniforms, stop_ids=None, context=()):
    """Return the tokens of the reference, which runs the whole sequence again for every token."""
    if stop_ids is None:
        stop_ids = {vlm.tokenizer.eos}
    return reference.generate(vlm.model, prompt_ids, features, list(context), uniforms, stop_ids)


def prompts_of(vlm, questions):
    """Encode questions about an image."""
    return [
        encode_prompt(vlm.tokenizer, vlm.template, [f"<image>\n{question}"])
        for question in questions
    ]
