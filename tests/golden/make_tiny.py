"""Write tests/golden/tiny.{npz,json}: logits and captions by transformers for the shipped model.

Run it by hand with transformers 5 whenever data/tiny/model is trained anew:
`OMP_NUM_THREADS=1 python tests/golden/make_tiny.py`.
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
PACKAGES = ("transformers", "tokenizers", "torch", "pillow", "numpy")
NUM_IMAGES = {"typical": 7, "shifted": 7, "balanced": 6}  # of each set of data/tiny/tune
NUM_WHOLE = 3  # so many images have the logits of every text position, the others of the last
NUM_SCORED = 24  # records of povid.json whose answers are scored
SETTINGS = (
    "patch_size",
    "vision_feature_select_strategy",
    "num_additional_image_tokens",
    "image_token",
)


def load_processor(tokenizer):
    """Return the processor of the shipped model with its Pillow-backed image processor.

    AutoProcessor takes the one by torchvision, whose pixels differ a little.
    """
    settings = json.loads((TINY / "model" / "processor_config.json").read_text())
    image_processor = CLIPImageProcessorPil.from_pretrained(TINY / "model")
    return LlavaProcessor(image_processor, tokenizer, **{name: settings[name] for name in SETTINGS})


def chosen_questions():
    """Return (image file, question) pairs, with images spread evenly over each set."""
    questions = []
    for name, count in NUM_IMAGES.items():
        text = (TINY / "tune" / name / "captions.json").read_text()
        captions = json.loads(text)["captions"]
        stride = len(captions) // count
        for record in captions[::stride][:count]:
            questions.append((f"tune/{name}/images/{record['image']}", record["prompt"]))
    return questions


@torch.no_grad()
def response_logp(model, processor, tokenizer, record, field):
    """Return the summed log-prob (nats) of a POVID record's answer, with its end token.

    The answer's ids follow the prompt's, as one sequence.
    """
    human_turn, gpt_turn = record[field]
    inputs = processor(
        images=Image.open(TINY / "train" / "images" / record["image"]),
        text=f"USER: {human_turn['value']} ASSISTANT:",
        return_tensors="pt",
    )
    answer = tokenizer(gpt_turn["value"], add_special_tokens=False, return_tensors="pt").input_ids
    end = torch.tensor([[tokenizer.eos_token_id]])
    answer = torch.cat([answer, end], 1)  # (1, R)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    logits = model(**inputs).logits[0, :-1]
    logps = logits.double().log_softmax(-1)[-answer.shape[1] :]  # (R, V)
    return float(logps.gather(1, answer[0][:, None]).sum())


@torch.no_grad()
def main():
    model = LlavaForConditionalGeneration.from_pretrained(TINY / "model", dtype=torch.float32)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    processor = load_processor(tokenizer)

    # 1. Logits and greedy captions.
    arrays = {}
    last_logits = []
    records = []
    for i, (file, question) in enumerate(chosen_questions()):
        inputs = processor(
            images=Image.open(TINY / file),
            text=f"USER: <image>\n{question} ASSISTANT:",
            return_tensors="pt",
        )
        ids = inputs["input_ids"][0]
        is_text = ids != model.config.image_token_id
        logits = model(**inputs).logits[0]  # (T, V)
        last_logits.append(logits[-1].numpy())
        if i < NUM_WHOLE:
            arrays[f"whole{i}"] = logits[is_text].numpy()
        sequence = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0]
        generated = sequence[len(ids) :].tolist()
        records.append(
            {
                "image": file,
                "question": question,
                "text_ids": ids[is_text].tolist(),
                "ids": generated,
                "text": tokenizer.decode(generated, skip_special_tokens=True),
            }
        )
    arrays["last"] = np.array(last_logits)
    np.savez_compressed(OUT / "tiny.npz", **arrays)

    # 2. Log-probs of preference pairs.
    scores = []
    povid = json.loads((TINY / "train" / "povid.json").read_text())
    for record in povid[:NUM_SCORED]:
        chosen = response_logp(model, processor, tokenizer, record, "conversations")
        rejected = response_logp(model, processor, tokenizer, record, "rejected_conversations")
        scores.append({"id": record["id"], "logp_chosen": chosen, "logp_rejected": rejected})

    # 3. What they were computed with.
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = version(package)
    weights = (TINY / "model" / "model.safetensors").read_bytes()
    about = {
        "versions": versions,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "records": records,
        "scores": scores,
    }
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (OUT / "tiny.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
