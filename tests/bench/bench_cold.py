"""Measure what the first epoch costs beyond a later one, from image files on disk.

Photo-like JPEG files are read, as in a run. Every side learns from the same pairs by
`PreferenceMethod.loss`, forward and backward. The sides take turns:

warm            Image features and reference log-probs are at hand.
cold            Neither is. The reference pass encodes the images, and the step finds their features
                in the cache: a run of train.py whose images all fit --keep-features.
cold, not kept  The step encodes the images a second time: a run of train.py with too little
                --keep-features.

The parts of the cold side are measured by themselves:

read images         Decoding, resizing and normalizing the files, on the CPU whatever the device is.
                    A GPU waits meanwhile.
tower, one by one   The vision tower on one image at a time, as training calls it.
tower, together     The vision tower on all of them.
reference pass      The reference log-probs of all pairs, with the features at hand.

The table has the time a pair, and the time over that of the warm side.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from common import (
    make_image_processor,
    make_model,
    make_pairs,
    num_image_tokens,
    parse_options,
)
from dpo_steps import BETA, make_policy
from PIL import Image
from report import heading, write_figures
from timing import alternate, time_ratio

from minialign.data.image_processor import preprocess
from minialign.data.images import open_image
from minialign.data.records import Record
from minialign.methods.base import Example, add_reference_logps
from minialign.methods.preference import PreferenceMethod
from minialign.models.loading import VLM

WARM = "warm"
COLD = "cold"
NOT_KEPT = "cold, not kept"
PARTS = ("read images", "tower, one by one", "tower, together", "reference pass")
PHOTO_SIZES = dict(height=480, breadth=640)  # in pixels, as most of COCO's images
BLUR = 16  # pixels between the colors that a photo-like image is interpolated from
NOISE = 6  # standard deviation of the noise, in the 256 levels of a pixel


def write_photo(path, options, seed):
    """Write a photo-like JPEG file, of smooth colors and some noise."""
    # 1. Smooth colors: a grid of random ones, enlarged.
    height = options.height
    width = options.breadth
    rng = np.random.default_rng(seed)
    grid_size = (max(1, height // BLUR), max(1, width // BLUR), 3)
    grid = rng.integers(0, 256, grid_size, np.uint8)
    smooth = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)

    # 2. Noise on top of them.
    noisy = np.asarray(smooth) + rng.normal(0, NOISE, (height, width, 3))
    pixels = noisy.clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=90)


def make_examples(options, folder):
    """Return the pairs of the benchmarks as examples of records, each with an image file."""
    examples = []
    for i, pair in enumerate(make_pairs(options)):
        path = folder / f"{i}.jpg"
        write_photo(path, options, seed=i)
        # Its texts only fill their places: the token ids are those of the pair.
        record = Record(
            id=str(i), image=path.name, paths=(path,), turns=("<image>\n?",), chosen="."
        )
        example = Example(
            record=record,
            prompt_ids=pair.prompt,
            responses=pair.responses,
            num_image_tokens=num_image_tokens(options),
        )
        examples.append(example)
    return examples


class ColdEpoch:
    """The steps that are measured, and the parts of the cold one."""

    def __init__(self, policy, vlm, examples):
        self.policy = policy
        self.vlm = vlm
        self.examples = examples
        self.paths = [example.record.paths[0] for example in examples]
        self.method = PreferenceMethod(vlm, "dpo", BETA)
        self.images = self.read_images()  # (tiles, size) of each

    def learn(self):
        """Take a step on all pairs at once, and return its loss. What the cache lacks is encoded.

        The examples must have their reference log-probs.
        """
        self.policy.model.zero_grad()
        loss, _ = self.method.loss(self.examples, self.examples)
        loss.backward()
        return loss.item()

    def learn_cold(self, keeps_features=True):
        """Encode the images, compute the reference log-probs, and take a step.

        keeps_features: whether the step finds the features that the reference pass has computed.
        """
        self.vlm.feature_cache.clear()
        self.add_reference()
        if not keeps_features:
            self.vlm.feature_cache.clear()
        return self.learn()

    def add_reference(self):
        """Compute the reference log-probs. Images whose features the cache lacks are encoded."""
        add_reference_logps(self.policy, self.vlm, self.examples)

    def read_images(self):
        """Decode, resize and normalize all image files. Return what `preprocess` does of each."""
        return [preprocess(open_image(path), self.vlm.image_processor) for path in self.paths]

    def encode_one_by_one(self):
        """Run the vision tower on one image at a time, all of which are read already."""
        for image in self.images:
            self.policy.model.encode_images([image])

    def encode_together(self):
        """Run the vision tower on all images, which are read already."""
        self.policy.model.encode_images(self.images)


def make_sides(epoch):
    """Return all sides and parts by name, in the order of their turns.

    Both cold sides leave features and reference log-probs behind. The warm side and the reference
    pass need them, so they come later.
    """
    return {
        COLD: epoch.learn_cold,
        NOT_KEPT: partial(epoch.learn_cold, keeps_features=False),
        WARM: epoch.learn,
        "reference pass": epoch.add_reference,
        "read images": epoch.read_images,
        "tower, one by one": epoch.encode_one_by_one,
        "tower, together": epoch.encode_together,
    }


def print_table(options, seconds):
    """Print a line for each side and part, and return the figures."""
    print(f"{'side':24}{'ms a pair':>10}{'over warm':>11}")
    figures = {}
    for name in (WARM, COLD, NOT_KEPT, *PARTS):
        seconds_a_pair = statistics.median(seconds[name]) / options.pairs
        over_warm = time_ratio(seconds, name, WARM)
        print(f"{name:24}{1000 * seconds_a_pair:10.1f}{over_warm:10.2f}x")
        figures[name] = {"seconds_a_pair": seconds_a_pair, "over_warm": over_warm}
    return figures


def main():
    """Run the benchmark."""
    # 1. The model and the files.
    options = parse_options(__doc__, script_sizes=PHOTO_SIZES)
    policy = make_policy(options, make_model(options))
    with tempfile.TemporaryDirectory() as folder:
        examples = make_examples(options, Path(folder))
        vlm = VLM(
            model=policy.model,
            tokenizer=None,  # no text is encoded, so neither it nor the template is used
            template="vicuna",
            image_processor=make_image_processor(options),
        )
        epoch = ColdEpoch(policy, vlm, examples)

        # 2. The measurement.
        results, seconds = alternate(make_sides(epoch), options)

    # 3. The table. All sides compute the same loss. If theirs differ, they did not do the same.
    print(heading(options))
    losses = {name: results[name] for name in (WARM, COLD, NOT_KEPT)}
    spread = max(losses.values()) - min(losses.values())
    print(f"losses of all sides within {spread:.1e} of each other")
    figures = {"sides": print_table(options, seconds), "losses": losses}
    write_figures(options, figures)


if __name__ == "__main__":
    main()
