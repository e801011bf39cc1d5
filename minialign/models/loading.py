"""A loaded checkpoint as something to ask: model, tokenizer, prompt template, and pictures opened when they are needed."""

from dataclasses import dataclass, field

import torch

from minialign.data.chat_templates import TEMPLATES, default_template
from minialign.data.image_processor import ImageProcessor, count_image_tokens, preprocess
from minialign.data.images import image_size, open_image
from minialign.data.tokenizer import Tokenizer
from minialign.models.checkpoint import load_model
from minialign.models.config import read_config
from minialign.models.llava import Llava
from minialign.utils.files import check


@dataclass
class VLM:
    """A loaded checkpoint with everything needed to ask it: tokenizer, prompt template, how pictures are prepared."""

    model: Llava
    tokenizer: Tokenizer
    template: str
    image_processor: ImageProcessor
    kept: dict = field(default_factory=dict)
    budget: int = 2 << 30  # bytes of features kept
    counted: dict = field(default_factory=dict)

    def num_image_tokens(self, path):
        """Picture vectors that the picture at `path` becomes, told from its size, which is read once. Raises BadInput if it is no picture."""
        if path not in self.counted:
            self.counted[path] = (
                count_image_tokens(
                    image_size(path),
                    self.image_processor,
                    self.model.config.vision.patches_per_side,
                )
                + self.model.config.extra_image_tokens
            )
        return self.counted[path]

    def max_response_tokens(self, record, prompt):
        """Tokens that are left for a response behind the prompt (ids) and the pictures of a record."""
        return (
            self.model.config.text.max_position_embeddings
            - sum(map(self.num_image_tokens, record.paths))
            - len(prompt)
            + len(record.paths)
        )

    def encode_images(self, paths, batch=1):
        """Features of the pictures at `paths`. The tower is frozen: what was seen is kept, oldest dropped, within the byte budget.

        Pictures computed together differ in the last bits from the same ones alone, so the two are kept apart: with `batch` 1 no
        restart and no group of another size changes anything; evaluation, of which both ends are at hand, looks at more at a time.
        """
        names = [(str(path), batch) for path in paths]
        missing = [name for name in dict.fromkeys(names) if name not in self.kept]
        fresh = {}
        for first in range(0, len(missing), batch):
            some = missing[first : first + batch]
            fresh.update(
                zip(
                    some,
                    self.model.encode_images(
                        [preprocess(open_image(path), self.image_processor) for path, _ in some]
                    ),
                )
            )
        features = [fresh[name] if name in fresh else self.kept[name] for name in names]
        self.kept.update(fresh)
        while (
            fresh
            and sum(f.tiles.numel() * f.tiles.element_size() for f in self.kept.values())
            > self.budget
        ):
            del self.kept[next(iter(self.kept))]
        return features


def load_vlm(directory, template=None, dtype=None, device="cpu", kept=None, budget=2 << 30):
    """Subject from a checkpoint directory. `template` and `dtype` (a name) None take the checkpoint's own; `kept`: features of this tower."""
    check(
        device != "cuda" or torch.cuda.is_available(),
        "--device cuda: torch sees no GPU here; leave it out to compute on the CPU",
    )
    config, raw = read_config(directory)
    check(
        template in (None, *TEMPLATES),
        f"template {template!r} is unknown; choose one of {', '.join(TEMPLATES)}",
    )
    tokenizer = Tokenizer.load(directory)
    image_processor = ImageProcessor.load(
        directory, config.vision.image_size, config.vision.patch_size, config.image_grid_pinpoints
    )
    template = template or default_template(directory, raw)
    return VLM(
        load_model(directory, dtype and getattr(torch, dtype), device),
        tokenizer,
        template,
        image_processor,
        {} if kept is None else kept,
        budget,
    )
