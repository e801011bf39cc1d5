"""Ask a model questions about images, in batches, and read its greedy answers."""

from collections.abc import Iterable

import torch
from tqdm import tqdm

from minialign.data.chat_templates import decode_response, encode_prompt, stop_ids
from minialign.generation.decoding import SamplingParams, generate, share_prefix
from minialign.models.loading import VLM
from minialign.utils.distributed import map_across_ranks
from minialign.utils.files import check
from minialign.utils.messages import printable

MAX_EXAMPLES = 50  # most packed examples in a batch


@torch.no_grad()
def answer_questions(
    vlm: VLM,
    questions: Iterable[tuple[tuple, str]],
    title: str,
    *,
    max_new_tokens: int = 256,
    contrast: float = 0.0,
    max_image_tokens: int = 1 << 14,
) -> dict[tuple, str]:
    """Return the greedy answer to every question, as {(paths, question): text}.

    Questions about the same images share one packed row, so their images are encoded once.

    Args:
        vlm: the model that is asked.
        questions: (paths, question) pairs: the files of the images, as a tuple, and the text.
        title: what the progress bar shows.
        max_new_tokens: most tokens of an answer.
        contrast: strength of the contrast with a masked image, see `SamplingParams`.
        max_image_tokens: about how many image tokens a batch may hold.
    """
    # 1. Group the questions by their images. A question that occurs twice is asked once.
    questions_about = {}
    for paths, question in dict.fromkeys(questions):
        questions_about.setdefault(paths, []).append(question)
    for paths, group in questions_about.items():
        check_that_questions_fit(vlm, paths, group)

    # 2. Answer the groups, a batch at a time. Each process answers its share of them.
    sampling = SamplingParams(max_new_tokens, contrast=contrast)

    def answer_share(share):
        """Answer some of the groups. Return the texts of each group's answers."""
        most_tokens = max(count_image_tokens(vlm, paths) for paths, _ in share)
        batch_size = max_image_tokens // max(1, most_tokens)
        batch_size = max(1, min(MAX_EXAMPLES, batch_size))
        answers = []
        for start in tqdm(range(0, len(share), batch_size), printable(title), leave=False):
            batch = share[start : start + batch_size]
            answers += answer_batch(vlm, batch, sampling)
        return answers

    groups = list(questions_about.items())
    answers_of_groups = map_across_ranks(groups, answer_share)

    # 3. Put every answer beside its question.
    answers = {}
    for (paths, group), texts in zip(groups, answers_of_groups, strict=True):
        for question, text in zip(group, texts, strict=True):
            answers[paths, question] = text
    return answers


def answer_batch(vlm: VLM, batch: list[tuple], sampling: SamplingParams) -> list[list[str]]:
    """Answer a batch of (paths, questions) groups. Return the texts of each group's answers."""
    # 1. Encode the images of all groups together.
    all_paths = []
    for paths, _ in batch:
        all_paths += paths
    image_features = iter(vlm.encode_images(all_paths, batch_size=32))

    # 2. Pack each group as one row: its images, and a branch for each question.
    examples = []
    for paths, questions in batch:
        placeholders = "<image>\n" * len(paths)
        prompts = [
            encode_prompt(vlm.tokenizer, vlm.template, [placeholders + question], system=vlm.system)
            for question in questions
        ]
        examples.append(share_prefix(prompts, [next(image_features) for _ in paths]))

    # 3. Decode the answers to all questions at once. They come in the order of the branches.
    responses = iter(
        generate(vlm.model, examples, sampling, stop_ids=stop_ids(vlm.tokenizer, vlm.template))
    )

    # 4. Give each group its own answers.
    answers = []
    for _, questions in batch:
        texts = []
        for _ in questions:
            texts.append(decode_response(vlm.tokenizer, vlm.template, next(responses)))
        answers.append(texts)
    return answers


def count_image_tokens(vlm, paths):
    """Return the number of image tokens of several images."""
    return sum(vlm.num_image_tokens(path) for path in paths)


def check_that_questions_fit(vlm, paths, questions):
    """Raise InputError for a question that, with its images, fills the context."""
    num_image_tokens = count_image_tokens(vlm, paths)
    context_length = vlm.model.config.text.max_position_embeddings
    for question in questions:
        prompt_ids = encode_prompt(
            vlm.tokenizer,
            vlm.template,
            ["<image>\n" * len(paths) + question],
            system=vlm.system,
        )
        num_tokens = len(prompt_ids) - len(paths) + num_image_tokens
        images = " and ".join(map(str, paths)) or "no image"
        check(
            num_tokens < context_length,
            f"the question {question!r:.60} about {images} takes {num_tokens} tokens, but the "
            f"model's context is {context_length}; shorten the question",
        )
