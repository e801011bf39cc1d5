"""Ask a model questions about images, in batches, and read its greedy answers."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from minialign.data.chat_templates import decode_response, encode_prompt, stop_ids
from minialign.data.packing import PackedExample
from minialign.generation.cache_limits import CacheLimits, cache_limits, rows_that_fit
from minialign.generation.decoding import SamplingParams, generate, packed_length, share_prefix
from minialign.models.loading import VLM
from minialign.utils.distributed import map_across_ranks
from minialign.utils.files import InputError, check
from minialign.utils.messages import printable

# A batch has at most so many groups, and at most so many image tokens if it has several groups.
MAX_GROUPS = 50
MAX_IMAGE_TOKENS = 1 << 14
MAX_NEW_TOKENS = 256  # of an answer


@dataclass
class QuestionGroup:
    """Questions about the same images, which share one packed row."""

    paths: tuple  # of the images
    questions: list[str]
    num_image_tokens: int  # of all images together
    example: PackedExample  # a branch for each question, still without image features


@torch.no_grad()
def answer_questions(
    vlm: VLM,
    questions: Iterable[tuple[tuple, str]],
    title: str,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    contrast: float = 0.0,
) -> dict[tuple, str]:
    """Return the greedy answer to every question, as {(paths, question): text}.

    Questions about the same images share one packed row, so their images are encoded once. The
    processes share the rows. So all of them must ask the same questions.

    Args:
        vlm: the model that is asked.
        questions: (paths, question) pairs: the files of the images, as a tuple, and the text.
        title: what the progress bar shows.
        max_new_tokens: most tokens of an answer.
        contrast: strength of the contrast with a masked image, see `SamplingParams`.
    """
    groups = group_questions(vlm, questions)
    sampling = SamplingParams(max_new_tokens, contrast=contrast)

    def answer_share(share):
        """Answer some of the groups. Return the texts of each group's answers."""
        return answer_groups(vlm, share, title, sampling)

    return put_beside_questions(groups, map_across_ranks(groups, answer_share))


@torch.no_grad()
def answer_questions_locally(
    vlm: VLM, questions: Iterable[tuple[tuple, str]], title: str, *, max_new_tokens: int
) -> dict[tuple, str]:
    """Return the answers as `answer_questions` does, all of them computed by this process.

    For work that the processes share already, so that each of them has other questions.
    """
    groups = group_questions(vlm, questions)
    answers_of_groups = answer_groups(vlm, groups, title, SamplingParams(max_new_tokens))
    return put_beside_questions(groups, answers_of_groups)


def group_questions(vlm: VLM, questions: Iterable[tuple[tuple, str]]) -> list[QuestionGroup]:
    """Group questions by their images. A question that occurs twice is asked once."""
    questions_about = {}
    for paths, question in dict.fromkeys(questions):
        questions_about.setdefault(paths, []).append(question)
    groups = []
    for paths, questions_of_group in questions_about.items():
        groups.append(pack_questions(vlm, paths, questions_of_group))
    return groups


def answer_groups(
    vlm: VLM, groups: list[QuestionGroup], title: str, sampling: SamplingParams
) -> list[list[str]]:
    """Answer groups of questions, a batch at a time. Return the texts of each group's answers."""
    batch_size = batch_size_of_groups(vlm, groups, sampling.contrast)
    answers = []
    for start in tqdm(range(0, len(groups), batch_size), printable(title), leave=False):
        batch = groups[start : start + batch_size]
        answers += answer_batch(vlm, batch, sampling)
    return answers


def put_beside_questions(
    groups: list[QuestionGroup], answers_of_groups: list[list[str]]
) -> dict[tuple, str]:
    """Return the answers of groups as {(paths, question): text}."""
    answers = {}
    for group, texts in zip(groups, answers_of_groups, strict=True):
        for question, text in zip(group.questions, texts, strict=True):
            answers[group.paths, question] = text
    return answers


def questions_that_fit(vlm: VLM, questions: list[tuple[tuple, str]]) -> list[tuple[tuple, str]]:
    """Return the questions that leave room for an answer in the model's context."""
    return [question for question in questions if leaves_room(vlm, *question)]


def pack_questions(vlm: VLM, paths: tuple, questions: list[str]) -> QuestionGroup:
    """Pack questions about the same images. Raise InputError for one that fills the context."""
    prompts = [encode_question(vlm, paths, question) for question in questions]
    for question, prompt in zip(questions, prompts, strict=True):
        check_room(vlm, paths, question, prompt)
    return QuestionGroup(
        paths=paths,
        questions=questions,
        num_image_tokens=vlm.total_image_tokens(paths),
        example=share_prefix(prompts, []),
    )


def check_questions(vlm: VLM, questions: Iterable[tuple[tuple, str, str]]):
    """Raise InputError for a question that the model cannot be asked, before any is asked.

    questions: (paths, question, place). An error begins with the place: the file and the record.
    """
    for paths, question, place in questions:
        try:
            prompt = encode_question(vlm, paths, question)
            check_room(vlm, paths, question, prompt)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None


def check_room(vlm: VLM, paths: tuple, question: str, prompt: list[int]):
    """Raise InputError if a question leaves no room for an answer in the model's context.

    prompt: its ids.
    """
    context_length = vlm.model.config.text.max_position_embeddings
    max_response_tokens = vlm.max_response_tokens(paths, prompt)
    num_tokens = context_length - max_response_tokens
    images = " and ".join(map(str, paths)) or "no image"
    check(
        max_response_tokens > 0,
        f"the question {question!r:.60} about {images} takes {num_tokens} tokens, but the "
        f"model's context is {context_length}; shorten the question",
    )


def encode_question(vlm: VLM, paths: tuple, question: str) -> list[int]:
    """Return the prompt (ids) of a question, with a placeholder for each of its images."""
    placeholders = "<image>\n" * len(paths)
    return encode_prompt(vlm.tokenizer, vlm.template, [placeholders + question], system=vlm.system)


def leaves_room(vlm: VLM, paths: tuple, question: str) -> bool:
    """Return whether a question leaves room for an answer in the model's context."""
    prompt = encode_question(vlm, paths, question)
    return vlm.max_response_tokens(paths, prompt) > 0


def batch_size_of_groups(vlm: VLM, groups: list[QuestionGroup], contrast) -> int:
    """Return how many of these groups are answered together: as many as if all were the largest."""
    # 1. The most image tokens of a group, and the longest row.
    most_image_tokens = 0
    longest_row = 0
    for group in groups:
        row_length = packed_length(vlm.model, group.example, group.num_image_tokens)
        most_image_tokens = max(most_image_tokens, group.num_image_tokens)
        longest_row = max(longest_row, row_length)

    # 2. The cache positions of a group. With a contrast it has a second row, without the image,
    #    which is padded to the length of the first.
    num_positions = longest_row
    if contrast:
        num_positions = 2 * longest_row
    return groups_that_fit(cache_limits(vlm.model), most_image_tokens, num_positions)


def groups_that_fit(limits: CacheLimits, num_image_tokens, num_positions) -> int:
    """Return how many groups are answered together.

    num_image_tokens: of a group.
    num_positions: cache positions that are prefilled for a group.
    """
    return min(
        MAX_GROUPS,
        rows_that_fit(MAX_IMAGE_TOKENS, num_image_tokens),
        rows_that_fit(limits.prefilled, num_positions),
    )


def answer_batch(vlm: VLM, batch: list[QuestionGroup], sampling: SamplingParams) -> list[list[str]]:
    """Answer a batch of groups. Return the texts of each group's answers."""
    # 1. Encode the images of all groups together.
    all_paths = []
    for group in batch:
        all_paths += group.paths
    image_features = iter(vlm.encode_images(all_paths, batch_size=32))

    # 2. Give each group the features of its images.
    examples = []
    for group in batch:
        features_of_group = [next(image_features) for _ in group.paths]
        examples.append(replace(group.example, image_features=features_of_group))

    # 3. Decode the answers to all questions at once. They come in the order of the branches.
    responses = iter(
        generate(vlm.model, examples, sampling, stop_ids=stop_ids(vlm.tokenizer, vlm.template))
    )

    # 4. Give each group its own answers.
    answers = []
    for example in examples:
        texts = []
        for _ in example.branches:
            texts.append(decode_response(vlm.tokenizer, vlm.template, next(responses)))
        answers.append(texts)
    return answers
