"""The files of the tiny LLaVA's checkpoint directory, without its weights."""

import random
from pathlib import Path

from minialign.utils.files import write_json
from tiny_world.scenes import IMAGE_SIZE
from tiny_world.tokens import VOCAB_SIZE, draw_tokenizer_texts, train_tokenizer, write_tokenizer

MAX_POSITIONS = 512
PATCH_SIZE = 12
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
# CLIP's mean and standard deviation of the channels.
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>\n"
    "{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %} "
    "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_model_files(folder: Path):
    """Write config, tokenizer, image processor and chat template, as transformers write them."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = draw_tokenizer_texts(random.Random("tiny world 1: tokenizer"))
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    write_tokenizer(folder, tokenizer, MAX_POSITIONS)

    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    vocab_size = max(ids.values()) + 1
    write_json(
        folder / "config.json",
        config_json(vocab_size, image_token_id=ids["<image>"], pad_token_id=ids["<pad>"]),
    )
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": ids["<pad>"]},
    )
    write_json(folder / "preprocessor_config.json", preprocessor_json())
    write_json(folder / "processor_config.json", processor_json())
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def config_json(vocab_size: int, image_token_id: int, pad_token_id: int) -> dict:
    """Return the value of config.json: a CLIP ViT, a projector and a Llama, all tiny."""
    text_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": pad_token_id,
        "torch_dtype": "float32",
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 128,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token_id,
        "pad_token_id": pad_token_id,
        "image_seq_length": PATCHES_PER_SIDE**2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": text_config,
        "vision_config": vision_config,
    }


def preprocessor_json() -> dict:
    """Return the value of preprocessor_config.json: CLIP's image processor."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }


def processor_json() -> dict:
    """Return the value of processor_config.json: how an image becomes image tokens."""
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
