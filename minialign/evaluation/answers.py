"""Hallucination measured: POPE, CHAIR with recall, colours, length and repeats, on a folder of pictures with annotations."""

import torch
from tqdm import tqdm

from minialign.data.chat_templates import decode_response, encode_prompt, end_token_id
from minialign.generation.decoding import SamplingParams, generate, share_prefix
from minialign.utils.distributed import map_across_ranks


@torch.no_grad()
def answer_questions(vlm, questions, title, max_new_tokens=256, contrast=0.0, slots=1 << 14):
    """{(paths, question): greedy answer}; the questions about the same pictures share a row, so the pictures are read once.

    `contrast`: see `sampling.respond`. At most 50 rows are read together, with about so many `slots` of picture vectors.
    """
    by_pictures, stops = {}, {end_token_id(vlm.tokenizer, vlm.template)}
    for paths, question in dict.fromkeys(questions):
        by_pictures.setdefault(paths, []).append(question)

    def answers(everything):
        """For each of the pictures the answers to its questions."""
        batch = max(
            1,
            min(
                50,
                slots // max(1, *(sum(map(vlm.num_image_tokens, paths)) for paths in everything)),
            ),
        )
        for first in tqdm(range(0, len(everything), batch), title, leave=False):
            some = everything[first : first + batch]
            prompts = [
                [
                    encode_prompt(
                        vlm.tokenizer, vlm.template, ["<image>\n" * len(paths) + question]
                    )
                    for question in by_pictures[paths]
                ]
                for paths in some
            ]
            looked = iter(vlm.encode_images([path for paths in some for path in paths], batch_size=32))
            rows = [
                share_prefix(own, [next(looked) for _ in paths])
                for paths, own in zip(some, prompts)
            ]
            sampling = SamplingParams(max_new_tokens, contrast=contrast)
            written = iter(generate(vlm.model, rows, sampling, stop_ids=stops))
            yield from (
                [decode_response(vlm.tokenizer, vlm.template, next(written)) for _ in own]
                for own in prompts
            )

    found = map_across_ranks(list(by_pictures), lambda own: list(answers(own)))
    return {
        (paths, question): text
        for (paths, asked), texts in zip(by_pictures.items(), found)
        for question, text in zip(asked, texts)
    }
