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
FIELDS = {"logp_chosen": "conversations", "logp_rejected": "rejected_conversations"}
PREFERENCES = 24  # records of povid.json that are scored
WHOLE = 3  # so many pictures with the logits of every text position


def chosen():
    """(picture file, question): pictures evenly spread over each set of tune, with the set's own questions."""
    for name, count in SETS.items():
        captions = json.loads((TINY / "tune" / name / "captions.json").read_text())["captions"]
        for record in captions[:: len(captions) // count][:count]:
            yield f"tune/{name}/images/{record['image']}", record["prompt"]


@torch.no_grad()
def score(model, processor, tokenizer, record, field):
    """Summed log-prob (nats) of a POVID record's answer, end token included: the answer's own ids behind the prompt's, one whole sequence."""
    human, gpt = (turn["value"] for turn in record[field])
    inputs = processor(
        images=Image.open(TINY / "train" / "images" / record["image"]),
        text=f"USER: {human} ASSISTANT:",
        return_tensors="pt",
    )
    answer = tokenizer(gpt, add_special_tokens=False, return_tensors="pt").input_ids
    answer = torch.cat([answer, torch.tensor([[tokenizer.eos_token_id]])], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logps = model(**inputs).logits[0, :-1].double().log_softmax(-1)[-answer.shape[1] :]
    return float(logps.gather(1, answer[0][:, None]).sum())


@torch.no_grad()
def main():
    model = LlavaForConditionalGeneration.from_pretrained(
        TINY / "model", dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    # The Pillow-backed image processor, named: AutoProcessor takes the torchvision one, whose pixels are a little off.
    settings = json.loads((TINY / "model" / "processor_config.json").read_text())
    names = (
        "patch_size",
        "vision_feature_select_strategy",
        "num_additional_image_tokens",
        "image_token",
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(TINY / "model"),
        tokenizer,
        **{name: settings[name] for name in names},
    )
    last, whole, records = [], {}, []
    for number, (file, question) in enumerate(chosen()):
        inputs = processor(
            images=Image.open(TINY / file),
            text=f"USER: <image>\n{question} ASSISTANT:",
            return_tensors="pt",
        )
        logits = model(**inputs).logits[0]
        last.append(logits[-1].numpy())
        text = inputs["input_ids"][0] != model.config.image_token_id
        if number < WHOLE:
            whole[f"whole{number}"] = logits[text].numpy()
        written = model.generate(**inputs, max_new_tokens=64, do_sample=False)[
            0, len(text) :
        ].tolist()
        records.append(
            {
                "image": file,
                "question": question,
                "text_ids": inputs["input_ids"][0][text].tolist(),
                "ids": written,
                "text": tokenizer.decode(written, skip_special_tokens=True),
            }
        )
    scores = [
        {
            "id": record["id"],
            **{
                key: score(model, processor, tokenizer, record, field)
                for key, field in FIELDS.items()
            },
        }
        for record in json.loads((TINY / "train" / "povid.json").read_text())[:PREFERENCES]
    ]
    np.savez_compressed(OUT / "tiny.npz", last=np.array(last), **whole)
    about = {
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("transformers", "tokenizers", "torch", "pillow", "numpy")
            },
        },
        "sha256": hashlib.sha256((TINY / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "records": records,
        "scores": scores,
    }
    (OUT / "tiny.json").write_text(
        json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
