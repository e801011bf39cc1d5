"""The sizes of what a run computes together, as far as its options tell before anything is loaded.

Some lengths are known only when the data is tokenized. The constants below stand for them. They
matter little: --tokens-per-microbatch, --group and the limits on caches bound what is computed
together, however long a single text is. Sizes are those of a run in which one model does all work.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from minialign.data.anyres import count_image_tokens, grid_shape
from minialign.evaluation.answers import MAX_NEW_TOKENS, groups_that_fit
from minialign.evaluation.pope import find_pope_files
from minialign.generation.cache_limits import CacheLimits, requests_that_fit, rows_that_fit
from minialign.generation.decoding import spare_positions
from minialign.logprobs import MAX_TOKENS
from minialign.methods.registry import METHODS
from minialign.methods.responses import prompts_that_fit
from minialign.models.config import LlavaConfig
from minialign.models.llava import TILES_PER_CALL_CPU, TILES_PER_CALL_GPU
from minialign.models.memory import BatchShape, SamplingShape
from minialign.utils.files import check

PROMPT_TOKENS = 40  # image tokens not counted
RESPONSE_TOKENS = 100
SENTENCES = 4  # of a chosen response, which BDHS completes at the same time
QUESTIONS = 6  # of POPE about an image

# Responses of an example in training. Other methods have a pair, and one more with --gamma.
NUM_RESPONSES = {"sft": 1, "distill": 1, "ppo": 1, "rloo": 4, "grpo": 4}
# Responses that the policy writes to a prompt.
NUM_SAMPLED = {"online-dpo": 2, "mixed-dpo": 2, "ppo": 1, "rloo": 4, "grpo": 4, "distill": 1}


@dataclass(frozen=True)
class ImageShape:
    """What an image becomes. With AnyRes it is the largest image that the checkpoint knows."""

    num_tiles: int
    num_features: int  # of the vision tower, over all tiles
    num_tokens: int


@dataclass(frozen=True)
class Grids:
    """The two settings of an image processor that `count_image_tokens` reads."""

    grid_pinpoints: tuple | None  # (height, width) of each grid that AnyRes may choose, in pixels
    tile_size: int  # side of a tile in pixels


def largest_image(config: LlavaConfig) -> ImageShape:
    """Return the shape of an image, or with AnyRes of the one with most image tokens."""
    side = config.vision.patches_per_side
    tile_size = config.vision.image_size
    features_per_tile = side**2 + config.extra_image_tokens
    if config.image_grid_pinpoints is None:
        return ImageShape(1, features_per_tile, features_per_tile)
    grids = Grids(config.image_grid_pinpoints, tile_size)
    largest = ImageShape(0, 0, 0)
    for size in config.image_grid_pinpoints:  # an image of that size fills its grid
        rows, columns = grid_shape(size, config.image_grid_pinpoints, tile_size)
        num_tiles = 1 + rows * columns
        num_tokens = count_image_tokens(size, grids, side)
        if num_tokens > largest.num_tokens:
            largest = ImageShape(num_tiles, num_tiles * features_per_tile, num_tokens)
    return largest


# --- training and the reference ---


def num_responses(options) -> int:
    """Return the responses of an example in training, all of which follow one prefix."""
    if options.method in NUM_RESPONSES:
        return NUM_RESPONSES[options.method]
    if METHODS[options.method].keeps_rejected(options) and options.gamma is not None:
        return 3  # the chosen one, the rejected one of the data, and the sampled one
    return 2


def example_shape(options, config: LlavaConfig, num_rows=1) -> BatchShape:
    """Return the shape of `num_rows` examples of the run, packed together."""
    image = largest_image(config)
    prefix_length = image.num_tokens + PROMPT_TOKENS
    return BatchShape(
        num_rows=num_rows,
        prefix_length=prefix_length,
        num_response_tokens=num_responses(options) * RESPONSE_TOKENS,
        num_features=image.num_features,
    )


def training_shape(options, config: LlavaConfig) -> BatchShape:
    """Return the shape of a micro-batch: as many examples as --tokens-per-microbatch has room for.

    A micro-batch has one example at least, and never more than the batch.
    """
    row_length = example_shape(options, config).row_length
    num_rows = max(1, options.tokens_per_microbatch // row_length)
    return example_shape(options, config, min(num_rows, options.batch_size))


def damaged_shape(options, config: LlavaConfig) -> BatchShape:
    """Return the shape of mDPO's second batch: the chosen responses after the damaged image."""
    image = largest_image(config)
    num_visible = image.num_tokens  # noise damages the image without masking a token
    if options.damage_noise == 0:
        num_visible = round((1 - options.damage) * image.num_tokens)
    return BatchShape(
        num_rows=training_shape(options, config).num_rows,
        prefix_length=num_visible + PROMPT_TOKENS,
        num_response_tokens=RESPONSE_TOKENS,
        num_features=image.num_features,
    )


def chosen_shape(options, config: LlavaConfig) -> BatchShape:
    """Return the shape of the second batch with --distill-weight: the chosen responses alone."""
    return replace(training_shape(options, config), num_response_tokens=RESPONSE_TOKENS)


def reference_shape(options, config: LlavaConfig, num_examples) -> BatchShape:
    """Return the shape of a micro-batch of the reference, which records no gradients.

    num_examples: how many there are, or None if it is not known.
    """
    row_length = example_shape(options, config).row_length
    num_rows = max(1, MAX_TOKENS // row_length)
    if num_examples is not None:
        num_rows = min(num_rows, num_examples)
    return example_shape(options, config, num_rows)


# --- sampling ---


def samples(options) -> bool:
    """Return whether the method writes responses, before training or at every step."""
    if options.method == "distill":
        return options.on != "chosen"
    spec = METHODS[options.method]
    return "max_new_tokens" in spec.options or options.method == "distortion"


def distortion_shape(options, config: LlavaConfig) -> BatchShape:
    """Return the shape of what is read under noisy images at a step: the chosen responses alone."""
    example = replace(example_shape(options, config), num_response_tokens=RESPONSE_TOKENS)
    num_rows = min(options.batch_size, rows_that_fit(MAX_TOKENS, example.row_length))
    return replace(example, num_rows=num_rows)


def bdhs_shape(options, config: LlavaConfig, limits: CacheLimits, num_records) -> SamplingShape:
    """Return what BDHS samples together: the sentences of a group of records.

    num_records: of the group.
    """
    # 1. A prefilled row has the image tokens that are not masked, the prompt and the chosen
    #    response.
    num_visible = largest_image(config).num_tokens
    if options.by == "attention":
        num_visible = round((1 - options.rho) * num_visible)
    prompt_length = num_visible + PROMPT_TOKENS + RESPONSE_TOKENS
    num_prompts = min(num_records, rows_that_fit(limits.prefilled, prompt_length))

    # 2. A sentence is decoded from its cut, which may lie at the end of the response.
    num_sentences = 1 if options.unguided else SENTENCES
    return fit_to_cache(
        options,
        limits,
        num_prompts=num_prompts,
        prompt_length=prompt_length,
        num_continuations=num_prompts * num_sentences,
        max_new_tokens=options.max_new_tokens,
    )


def response_shape(
    options, config: LlavaConfig, limits: CacheLimits, num_examples
) -> SamplingShape:
    """Return what is sampled together where the policy answers whole prompts.

    num_examples: how many are to be answered, or None if that is not known.
    """
    k = NUM_SAMPLED[options.method]
    prompt_length = largest_image(config).num_tokens + PROMPT_TOKENS
    num_prompts = prompts_that_fit(limits, prompt_length, k, options.max_new_tokens)
    if num_examples is not None:
        num_prompts = min(num_prompts, num_examples)
    return fit_to_cache(
        options,
        limits,
        num_prompts=num_prompts,
        prompt_length=prompt_length,
        num_continuations=k * num_prompts,
        max_new_tokens=options.max_new_tokens,
    )


def answer_shape(options, config: LlavaConfig, limits: CacheLimits) -> SamplingShape:
    """Return what is answered together when a model is measured on its largest evaluation set."""
    # 1. The set whose batch has most questions. All questions about an image share a row.
    image = largest_image(config)
    num_prompts = 1
    num_questions = 1
    for folder in options.eval:
        questions_of_image = 1  # for its caption
        if find_pope_files(Path(folder)):
            questions_of_image += QUESTIONS
        row_length = image.num_tokens + questions_of_image * PROMPT_TOKENS
        images_of_batch = min(
            groups_that_fit(limits, image.num_tokens, row_length), count_evaluated_images(folder)
        )
        if images_of_batch * questions_of_image > num_prompts * num_questions:
            num_prompts = images_of_batch
            num_questions = questions_of_image

    # 2. Its caches. An answer attends to the image and to its own question.
    return fit_to_cache(
        options,
        limits,
        num_prompts=num_prompts,
        prompt_length=image.num_tokens + num_questions * PROMPT_TOKENS,
        num_continuations=num_questions * num_prompts,
        context_length=image.num_tokens + PROMPT_TOKENS,
        max_new_tokens=MAX_NEW_TOKENS,
    )


def fit_to_cache(
    options,
    limits: CacheLimits,
    *,
    num_prompts,
    prompt_length,
    num_continuations,
    max_new_tokens,
    context_length=None,
) -> SamplingShape:
    """Return a SamplingShape with as many continuations as generate_continuations decodes at once.

    The cache of the shape has space for all new tokens. On a CPU it begins with fewer positions, so
    that it may grow beyond its limit.

    context_length: positions that a continuation attends to, all of its prompt by default.
    """
    if context_length is None:
        context_length = prompt_length
    num_spare = spare_positions(max_new_tokens, options.device)
    num_fitting = requests_that_fit(limits.forked, context_length + num_spare)
    return SamplingShape(
        num_prompts=num_prompts,
        prompt_length=prompt_length,
        num_continuations=min(num_continuations, num_fitting),
        context_length=context_length,
        max_new_tokens=max_new_tokens,
    )


# --- images ---


def count_images(options, records) -> int | None:
    """Return how many images are encoded at most, or None if it is not known.

    records: those of --data, or None if no data is named. Then there are --limit records, and each
        is taken to have one image.
    """
    # 1. The images of the data.
    num_images = options.limit
    if records is not None:
        images = set()
        for record in records:
            images.update(record.paths)
        num_images = len(images)
    if num_images is None:
        return None

    # 2. Those of the evaluation sets. An image that is in both is encoded twice: evaluation encodes
    #    images in batches, and their features are kept apart.
    for folder in options.eval or []:
        num_images += count_evaluated_images(folder)
    return num_images


def count_evaluated_images(folder) -> int:
    """Return the number of files in the folder of images of an evaluation set."""
    image_folder = Path(folder) / "images"
    check(image_folder.is_dir(), f"{folder}: has no folder images/; give another --eval")
    return len(list(image_folder.iterdir()))


def tiles_per_call(options) -> int:
    """Return how many tiles the vision tower encodes at a time, at most."""
    return TILES_PER_CALL_GPU if options.device == "cuda" else TILES_PER_CALL_CPU
