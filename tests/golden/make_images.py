"""Write tests/golden/images/: pixels and token counts of transformers' Pillow-backed processors.

Run it by hand with transformers 5: `python tests/golden/make_images.py`.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from images import cases
from PIL import Image, ImageOps, PngImagePlugin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

OUT = Path(__file__).parent / "images"
PACKAGES = ("transformers", "pillow", "numpy", "torch")
# Cases of which all pixels are stored. Of the others it is sums and samples.
FULL = [
    cases.Case("clip48", "RGB", 61, 40),
    cases.Case("siglip48", "RGBA", 61, 40),
    cases.Case("square48", "P alphas", 9, 30),
    cases.Case("anyres48", "LA", 61, 40),
]


def square(length):
    """Return a size setting."""
    return {"height": length, "width": length}


def build_processors():
    """Return the processors by name. A name ends with the tile size, but for edge64."""
    edge336 = {"shortest_edge": 336}
    edge48 = {"shortest_edge": 48}
    return {
        "clip336": CLIPImageProcessorPil(size=edge336, crop_size=square(336)),
        "clip48": CLIPImageProcessorPil(size=edge48, crop_size=square(48)),
        "edge64": CLIPImageProcessorPil(
            size={"shortest_edge": 64}, crop_size=square(48), resample=2
        ),
        "squash48": CLIPImageProcessorPil(size={"height": 40, "width": 60}, crop_size=square(48)),
        "uncut48": CLIPImageProcessorPil(
            size=square(48), crop_size=square(48), do_resize=False, do_normalize=False, resample=1
        ),
        "siglip384": SiglipImageProcessorPil(size=square(384)),
        "siglip48": SiglipImageProcessorPil(size=square(48), resample=2),
        "square336": LlavaImageProcessorPil(size=edge336, crop_size=square(336), do_pad=True),
        "square48": LlavaImageProcessorPil(size=edge48, crop_size=square(48), do_pad=True),
        "anyres336": LlavaNextImageProcessorPil(
            size=edge336, crop_size=square(336), image_grid_pinpoints=cases.PINPOINTS
        ),
        "anyres48": LlavaNextImageProcessorPil(
            size=edge48, crop_size=square(48), image_grid_pinpoints=cases.SMALL_PINPOINTS
        ),
    }


def tiles_of(processor, image):
    """Return the tiles of an image, (n, 3, S, S)."""
    values = processor(images=image, return_tensors="np")["pixel_values"][0]
    if values.ndim == 3:  # one tile
        return values[None]
    return values


def write_files():
    """Write the image files: a JPEG on its side, a palette with alphas, and 16-bit gray."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation
    rotated = cases.make_image("RGB", 40, 24)
    rotated.save(OUT / "rotated.jpg", quality=90, subsampling=0, exif=exif)
    palette = cases.make_image("P", 32, 20)
    palette.save(
        OUT / "palette.png", transparency=bytes(range(256)), pnginfo=PngImagePlugin.PngInfo()
    )
    gray = cases.make_image("I;16", 20, 32)
    gray.save(OUT / "grey16.png")


def count_tokens(pinpoints, tile_size, patch_size):
    """Return (token count, first kept row, first kept column) of each random size, (n, 3).

    The count is that of LlavaNextProcessor. Rows and columns are those of the model's own code, or
    -1 if it keeps nothing. Both must agree on the count.
    """
    patches_per_side = tile_size // patch_size
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        patch_size=patch_size,
        num_additional_image_tokens=0,
    )

    def unpadded_features(*sizes):
        return LlavaNextProcessor._get_unpadded_features(processor, *sizes)

    processor._get_unpadded_features = unpadded_features
    counts = []
    for size in cases.random_sizes():
        count = LlavaNextProcessor._get_number_of_features(processor, *size, tile_size, tile_size)
        tile_rows, tile_columns = get_anyres_image_grid_shape(size, pinpoints, tile_size)
        rows = tile_rows * patches_per_side
        columns = tile_columns * patches_per_side
        numbered = torch.arange(rows * columns).view(1, rows, columns)
        kept = unpad_image(numbered, size)
        num_newlines = kept.shape[1]
        assert count == patches_per_side**2 + kept.numel() + num_newlines, size
        top = -1
        left = -1
        if kept.numel() > 0:
            first_kept = int(kept.flatten()[0])
            top, left = divmod(first_kept, columns)
        counts.append((count, top, left))
    return np.array(counts, dtype=np.int16)


def main():
    OUT.mkdir(exist_ok=True)
    processors = build_processors()

    # 1. The images: those of the cases, and those of the files.
    write_files()
    images = []
    for case in cases.all_cases():
        image = cases.make_image(case.mode, case.width, case.height)
        images.append((case.processor, image))
    for name in cases.FILES:
        upright = ImageOps.exif_transpose(Image.open(OUT / name))
        images.append(("clip48", upright))

    # 2. Their tiles.
    arrays = {"shapes": [], "sums": [], "samples": []}
    for processor_name, image in images:
        tiles = tiles_of(processors[processor_name], image)
        sums, samples = cases.digest(tiles)
        arrays["shapes"].append(tiles.shape)
        arrays["sums"].append(sums)
        arrays["samples"].append(samples)
    for i, case in enumerate(FULL):
        image = cases.make_image(case.mode, case.width, case.height)
        arrays[f"full{i}"] = tiles_of(processors[case.processor], image)

    # 3. Token counts.
    arrays["counts336"] = count_tokens(cases.PINPOINTS, tile_size=336, patch_size=14)
    arrays["counts48"] = count_tokens(cases.SMALL_PINPOINTS, tile_size=48, patch_size=6)
    np.savez_compressed(OUT / "golden.npz", **arrays)

    # 4. The settings as transformers saves them.
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = version(package)
    settings = {}
    for name, processor in processors.items():
        settings[name] = json.loads(processor.to_json_string())
    about = {"versions": versions, "full": FULL, "processors": settings}
    (OUT / "golden.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
