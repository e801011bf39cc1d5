"""A loaded checkpoint as something to ask: model, tokenizer, prompt template, and pictures opened when they are needed."""

from dataclasses import dataclass, field

import torch

from .checkpoint import load_model
from .config import read_config
from .files import require
from .images import Preparation, count_vectors, open_picture, picture_size, prepare
from .mllm import MLLM
from .prompts import TEMPLATES, default_template
from .tokenizer import Tokenizer


@dataclass
class Subject:
    """A loaded checkpoint with everything needed to ask it: tokenizer, prompt template, how pictures are prepared."""

    model: MLLM
    tokenizer: Tokenizer
    template: str
    preparation: Preparation
    kept: dict = field(default_factory=dict)
    budget: int = 2 << 30  # bytes of features kept
    counted: dict = field(default_factory=dict)

    def count(self, path):
        """Picture vectors that the picture at `path` becomes, told from its size, which is read once. Raises BadInput if it is no picture."""
        if path not in self.counted:
            self.counted[path] = (
                count_vectors(picture_size(path), self.preparation, self.model.config.vision.side)
                + self.model.config.extra_vectors
            )
        return self.counted[path]

    def room(self, record, prompt):
        """Tokens that are left for a response behind the prompt (ids) and the pictures of a record."""
        return (
            self.model.config.text.positions
            - sum(map(self.count, record.paths))
            - len(prompt)
            + len(record.paths)
        )

    def look(self, paths, batch=1):
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
                    self.model.look(
                        [prepare(open_picture(path), self.preparation) for path, _ in some]
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


def load_subject(directory, template=None, dtype=None, device="cpu", kept=None, budget=2 << 30):
    """Subject from a checkpoint directory. `template` and `dtype` (a name) None take the checkpoint's own; `kept`: features of this tower."""
    require(
        device != "cuda" or torch.cuda.is_available(),
        "--device cuda: torch sees no GPU here; leave it out to compute on the CPU",
    )
    config, raw = read_config(directory)
    require(
        template in (None, *TEMPLATES),
        f"template {template!r} is unknown; choose one of {', '.join(TEMPLATES)}",
    )
    tokenizer = Tokenizer.load(directory)
    preparation = Preparation.load(
        directory, config.vision.image_size, config.vision.patch_size, config.pinpoints
    )
    template = template or default_template(directory, raw)
    return Subject(
        load_model(directory, dtype and getattr(torch, dtype), device),
        tokenizer,
        template,
        preparation,
        {} if kept is None else kept,
        budget,
    )
