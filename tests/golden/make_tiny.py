"""Writes tests/golden/tiny.{npz,json}: logits and greedy captions that transformers gives for the shipped model. Needs transformers 5.

Run it again whenever data/tiny/model is trained anew: `OMP_NUM_THREADS=1 python tests/golden/make_tiny.py`.
"""
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

OUT = Path(__file__).parent
TINY = OUT.parent.parent / "data" / "tiny"
SETS = {"typical": 7, "shifted": 7, "balanced": 6}
WHOLE = 3  # so many pictures with the logits of every text position


def chosen():
    """(picture file, question): pictures evenly spread over each set of tune, with the set's own questions."""
    for name, count in SETS.items():
        captions = json.loads((TINY / "tune" / name / "captions.json").read_text())["captions"]
        for record in captions[::len(captions) // count][:count]:
            yield f"tune/{name}/images/{record['image']}", record["prompt"]


@torch.no_grad()
def main():
    model = LlavaForConditionalGeneration.from_pretrained(TINY / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    # The Pillow-backed image processor, named: AutoProcessor takes the torchvision one, whose pixels are a little off.
    settings = json.loads((TINY / "model" / "processor_config.json").read_text())
    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "image_token")
    processor = LlavaProcessor(CLIPImageProcessorPil.from_pretrained(TINY / "model"), tokenizer, **{name: settings[name] for name in names})
    last, whole, records = [], {}, []
    for number, (file, question) in enumerate(chosen()):
        inputs = processor(images=Image.open(TINY / file), text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
        logits = model(**inputs).logits[0]
        last.append(logits[-1].numpy())
        text = inputs["input_ids"][0] != model.config.image_token_id
        if number < WHOLE:
            whole[f"whole{number}"] = logits[text].numpy()
        written = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, len(text):].tolist()
        records.append({"image": file, "question": question, "text_ids": inputs["input_ids"][0][text].tolist(), "ids": written,
                        "text": tokenizer.decode(written, skip_special_tokens=True)})
    np.savez_compressed(OUT / "tiny.npz", last=np.array(last), **whole)
    about = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("transformers", "tokenizers", "torch", "pillow", "numpy")}},
        "sha256": hashlib.sha256((TINY / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "records": records,
    }
    (OUT / "tiny.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
