"""Writes tests/golden/images/: pixels and vector counts of transformers' Pillow-backed processors. Needs transformers 5."""

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
FULL = [
    ("clip48", "RGB", 61, 40),
    ("siglip48", "RGBA", 61, 40),
    ("square48", "P alphas", 9, 30),
    ("anyres48", "LA", 61, 40),
]


def processors():
    def square(side):
        return {"height": side, "width": side}

    def clip(kind, side, edge=None, **more):
        return kind(size={"shortest_edge": edge or side}, crop_size=square(side), **more)

    return {
        "clip336": clip(CLIPImageProcessorPil, 336),
        "clip48": clip(CLIPImageProcessorPil, 48),
        "edge64": clip(CLIPImageProcessorPil, 48, edge=64, resample=2),
        "squash48": CLIPImageProcessorPil(size={"height": 40, "width": 60}, crop_size=square(48)),
        "uncut48": CLIPImageProcessorPil(
            size=square(48), crop_size=square(48), do_resize=False, do_normalize=False, resample=1
        ),
        "siglip384": SiglipImageProcessorPil(size=square(384)),
        "siglip48": SiglipImageProcessorPil(size=square(48), resample=2),
        "square336": clip(LlavaImageProcessorPil, 336, do_pad=True),
        "square48": clip(LlavaImageProcessorPil, 48, do_pad=True),
        "anyres336": clip(LlavaNextImageProcessorPil, 336, image_grid_pinpoints=cases.PINPOINTS),
        "anyres48": clip(
            LlavaNextImageProcessorPil, 48, image_grid_pinpoints=cases.SMALL_PINPOINTS
        ),
    }


def pixels(processor, picture):
    values = processor(images=picture, return_tensors="np")["pixel_values"][0]
    return values if values.ndim == 4 else values[None]  # (n, 3, S, S)


def write_files():
    """Pictures whose encoding matters: a JPEG on its side, a palette with alphas, 16-bit grey."""
    exif = Image.Exif()
    exif[0x0112] = 6
    cases.picture("RGB", 40, 24).save(OUT / "rotated.jpg", quality=90, subsampling=0, exif=exif)
    cases.picture("P", 32, 20).save(
        OUT / "palette.png", transparency=bytes(range(256)), pnginfo=PngImagePlugin.PngInfo()
    )
    cases.picture("I;16", 20, 32).save(OUT / "grey16.png")


def counts(pinpoints, side, patch):
    """(count, rows left out above, columns left out at the left) of each random size: processor's and model's code, which must agree."""
    grid = side // patch
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        patch_size=patch,
        num_additional_image_tokens=0,
    )
    processor._get_unpadded_features = lambda *sizes: LlavaNextProcessor._get_unpadded_features(
        processor, *sizes
    )
    found = []
    for size in cases.random_sizes():
        count = LlavaNextProcessor._get_number_of_features(processor, *size, side, side)
        rows, columns = get_anyres_image_grid_shape(size, pinpoints, side)
        places = torch.arange(rows * columns * grid * grid).view(1, rows * grid, columns * grid)
        kept = unpad_image(places, size)
        assert count == grid * grid + kept.numel() + kept.shape[1], size
        top, left = divmod(int(kept.flatten()[0]), columns * grid) if kept.numel() else (-1, -1)
        found.append((count, top, left))
    return np.array(found, dtype=np.int16)


def main():
    OUT.mkdir(exist_ok=True)
    write_files()
    known, shapes, sums, samples, full = processors(), [], [], [], {}
    uprights = [ImageOps.exif_transpose(Image.open(OUT / name)) for name in cases.FILES]
    pictures = [
        (name, cases.picture(mode, width, height)) for name, mode, width, height in cases.cases()
    ]
    for name, picture in pictures + [("clip48", picture) for picture in uprights]:
        tiles = pixels(known[name], picture)
        for kept, value in zip((sums, samples), cases.digest(tiles), strict=True):
            kept.append(value)
        shapes.append(tiles.shape)
    for number, (name, mode, width, height) in enumerate(FULL):
        full[f"full{number}"] = pixels(known[name], cases.picture(mode, width, height))
    np.savez_compressed(
        OUT / "golden.npz",
        shapes=np.array(shapes),
        sums=np.array(sums),
        samples=np.array(samples),
        **full,
        counts336=counts(cases.PINPOINTS, 336, 14),
        counts48=counts(cases.SMALL_PINPOINTS, 48, 6),
    )
    about = {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("transformers", "pillow", "numpy", "torch")},
        },
        "full": FULL,
        "processors": {
            name: json.loads(processor.to_json_string()) for name, processor in known.items()
        },
    }
    (OUT / "golden.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
