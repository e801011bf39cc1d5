"""Load a checkpoint directory as a VLM: the model and everything needed to ask it a question."""

import functools
from dataclasses import dataclass, field

import torch

from minialign.data.anyres import count_image_tokens
from minialign.data.chat_templates import check_system, end_token_id
from minialign.data.image_processor import ImageProcessor, check_shape, preprocess
from minialign.data.images import image_size, open_image
from minialign.data.template_choice import default_template, read_chat_template
from minialign.data.templates import IMAGE_PLACEHOLDER, find_template
from minialign.data.tokenizer import Tokenizer
from minialign.models.checkpoint import companion_files, load_model
from minialign.models.checkpoint_checks import check_token_ids
from minialign.models.config_json import read_config
from minialign.models.llava import ImageFeatures, Llava
from minialign.utils.digests import file_digest
from minialign.utils.distributed import is_main_process
from minialign.utils.files import check
from minialign.utils.messages import print_message

DEFAULT_FEATURE_CACHE_BYTES = 2 << 30


@dataclass
class VLM:
    """A vision-language model with its tokenizer, chat template and image processor."""

    model: Llava
    tokenizer: Tokenizer
    template: str  # a name in chat_templates.TEMPLATES, or the fields of a template as JSON
    image_processor: ImageProcessor
    # Path -> digest of the files beside the weights. What a model says depends on them too: on the
    # image settings, the tokenizer, the chat template. So what is kept of it is compared with them.
    file_digests: dict[str, str] = field(default_factory=dict)
    # The system text of questions that are asked without a record, None for that of the template.
    system: str | None = None
    # (path, batch size) -> the features of that image, the oldest entry first.
    feature_cache: dict[tuple[str, int], ImageFeatures] = field(default_factory=dict)
    feature_cache_bytes: int = DEFAULT_FEATURE_CACHE_BYTES
    # path -> what num_image_tokens returns.
    image_token_counts: dict[str, int] = field(default_factory=dict)

    def num_image_tokens(self, path):
        """Return how many image tokens the image at `path` becomes, reading its size only once.

        Raises InputError if the file is not an image, or one that is too thin to be encoded.
        """
        if path not in self.image_token_counts:
            config = self.model.config
            size = image_size(path)
            check_shape(size, self.image_processor, name=path)
            num_tokens = count_image_tokens(
                size, self.image_processor, config.vision.patches_per_side
            )
            self.image_token_counts[path] = num_tokens + config.extra_image_tokens
        return self.image_token_counts[path]

    def total_image_tokens(self, paths):
        """Return how many tokens several images take together."""
        return sum(self.num_image_tokens(path) for path in paths)

    def max_response_tokens(self, paths, prompt_ids):
        """Return how many tokens of the context a prompt about images leaves for a response.

        It is 0 or negative if none is left.

        paths: the files of the images.
        """
        # The prompt holds one placeholder for each image, which gives way to the image's tokens.
        prompt_length = len(prompt_ids) - len(paths) + self.total_image_tokens(paths)
        return self.model.config.text.max_position_embeddings - prompt_length

    def encode_images(self, paths, batch_size=1):
        """Return the ImageFeatures of the images at `paths`, from the cache if it has them.

        The vision tower is frozen, so the features of an image never change. The cache drops its
        oldest entries when it exceeds `feature_cache_bytes`.
        """
        # The batch size, which is an upper limit, is part of the key. Features computed in a batch
        # differ in the last bits from those computed alone. Training encodes one image at a time,
        # evaluation encodes batches. If training used the features of an evaluation, a resumed run,
        # which skips finished evaluations, would differ from an uninterrupted one.
        keys = [(str(path), batch_size) for path in paths]

        # 1. Encode the images that the cache lacks, each of them once.
        missing = [key for key in dict.fromkeys(keys) if key not in self.feature_cache]
        for start in range(0, len(missing), batch_size):
            chunk = missing[start : start + batch_size]
            images = []
            for path, _ in chunk:
                images.append(preprocess(open_image(path), self.image_processor))
            features_of_chunk = self.model.encode_images(images)
            self.feature_cache.update(zip(chunk, features_of_chunk, strict=True))

        # 2. Collect the results before the cache is cut to its size, which may drop some of them.
        features = [self.feature_cache[key] for key in keys]
        if missing:
            self._drop_oldest_features()
        return features

    def _drop_oldest_features(self):
        """Drop the oldest image features until the rest fits `feature_cache_bytes`."""
        sizes = [features.tiles.nbytes for features in self.feature_cache.values()]
        total = sum(sizes)
        for key, size in zip(list(self.feature_cache), sizes, strict=True):
            if total <= self.feature_cache_bytes:
                break
            del self.feature_cache[key]
            total -= size


@functools.cache  # a run loads its model several times, but prints this once
def print_if_inferred(directory, template):
    """Print which template was chosen, if the checkpoint in `directory` has none of its own."""
    if is_main_process() and read_chat_template(directory) is None:
        print_message(
            f"{directory} has no chat template; its tokens and its model type suggest {template} "
            "(--template names another one)",
        )


def load_vlm(
    directory,
    template=None,
    dtype=None,
    *,
    device="cpu",
    system=None,
    feature_cache=None,
    feature_cache_bytes=DEFAULT_FEATURE_CACHE_BYTES,
) -> VLM:
    """Load a checkpoint directory. Raises InputError for what is not supported.

    template: a name in TEMPLATES, the fields of a template as JSON, or None to infer it from the
        checkpoint.
    dtype: the name of a torch dtype, or None for that of most of the weights.
    system: the system text of questions, or None for that of the template.
    feature_cache: features that another VLM with the same vision tower and images has computed.
    """
    # 1. Read the small files first, so that bad input is reported before weights are read.
    check(
        device != "cuda" or torch.cuda.is_available(),
        "--device cuda: torch sees no GPU here; leave it out to compute on the CPU",
    )
    config, config_dict = read_config(directory)
    if template is not None:
        find_template(template)  # raises InputError for an unknown name
    tokenizer = Tokenizer.load(directory)
    check_token_ids(directory, tokenizer, config, placeholder=IMAGE_PLACEHOLDER)
    image_processor = ImageProcessor.load(
        directory, config.vision.image_size, config.vision.patch_size, config.image_grid_pinpoints
    )
    if template is None:
        template = default_template(directory, config_dict)
        print_if_inferred(directory, template)
    end_token_id(tokenizer, template)  # raises InputError if the tokenizer lacks it
    if system is not None:
        check_system(template, system, "--system")
    file_digests = {str(path): file_digest(path) for path in companion_files(directory)}

    # 2. Read the weights.
    if dtype is not None:
        dtype = getattr(torch, dtype)
    model = load_model(directory, dtype, device)

    if feature_cache is None:
        feature_cache = {}
    return VLM(
        model=model,
        tokenizer=tokenizer,
        template=template,
        system=system,
        image_processor=image_processor,
        file_digests=file_digests,
        feature_cache=feature_cache,
        feature_cache_bytes=feature_cache_bytes,
    )
