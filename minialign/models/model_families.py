"""Tell what the config.json of a directory describes, and refuse by name what is not supported."""

from pathlib import Path

from minialign.utils.files import InputError, check

SUPPORTED_TYPES = ("llava", "llava_next")
# Other models that people have: model_type -> what the error message calls it.
OTHER_TYPES = {
    "llava_onevision": "LLaVA-OneVision",
    "llava_next_video": "LLaVA-NeXT-Video",
    "video_llava": "Video-LLaVA",
    "vipllava": "ViP-LLaVA",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL",
    "internvl_chat": "InternVL",
    "paligemma": "PaliGemma",
    "gemma3": "Gemma 3",
    "mllama": "Llama 3.2 Vision",
    "llama4": "Llama 4",
    "idefics": "IDEFICS",
    "idefics2": "Idefics2",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "blip-2": "BLIP-2",
    "instructblip": "InstructBLIP",
    "pixtral": "Pixtral",
    "mistral3": "Mistral Small 3",
    "phi3_v": "Phi-3 Vision",
    "phi4mm": "Phi-4 multimodal",
    "minicpmv": "MiniCPM-V",
    "deepseek_vl": "DeepSeek-VL",
    "deepseek_vl_v2": "DeepSeek-VL2",
    "florence2": "Florence-2",
    "molmo": "Molmo",
    "chameleon": "Chameleon",
    "fuyu": "Fuyu",
    "llama": "a language model without a vision tower",
    "mistral": "a language model without a vision tower",
    "qwen2": "a language model without a vision tower",
    "qwen3": "a language model without a vision tower",
    "gemma": "a language model without a vision tower",
    "gemma2": "a language model without a vision tower",
    "phi3": "a language model without a vision tower",
    "clip": "a vision tower without a language model",
    "clip_vision_model": "a vision tower without a language model",
    "siglip": "a vision tower without a language model",
    "siglip_vision_model": "a vision tower without a language model",
    "bert": "a sentence encoder: give it with --similarity",
    "mpnet": "a sentence encoder: give it with --similarity",
}
# The model types, fields and beginnings of class names that only the original LLaVA code writes
# to config.json.
ORIGINAL_TYPES = ("llava_llama", "llava_mistral", "llava_qwen", "llava_mpt", "llava_gemma")
ORIGINAL_FIELDS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
ORIGINAL_PREFIXES = ("LlavaLlama", "LlavaMistral", "LlavaQwen", "LlavaMpt", "LlavaGemma")


def check_model_type(path, raw) -> str:
    """Return the model_type of a parsed config.json. Raise InputError unless it is supported."""
    # 1. Refuse a LLaVA in the layout of the original code, which transformers cannot read either.
    check(
        not _is_original_llava(raw),
        f"{path}: original LLaVA layout (model_type {raw.get('model_type')!r:.40}, mm_vision_tower "
        f"{raw.get('mm_vision_tower')!r:.80}): convert it with convert_llava_weights_to_hf.py of "
        "transformers, or take the checkpoint whose name ends in -hf",
    )

    # 2. Refuse the folder of a run, in which train.py also writes a config.json.
    if "model_type" not in raw and "settings" in raw:
        run = Path(path).parent
        raise InputError(
            f"{path}: the settings of a run, not of a model; give --model {run / 'model'}, or the "
            f"run's base model with --adapter {run / 'adapter'}"
        )

    # 3. Refuse other kinds of models.
    model_type = raw.get("model_type")
    other_name = ""
    if isinstance(model_type, str) and model_type in OTHER_TYPES:
        other_name = f" ({OTHER_TYPES[model_type]})"
    check(
        model_type in SUPPORTED_TYPES,
        f"{path}: model_type {model_type!r:.60}{other_name} is not supported; "
        f"supported: {', '.join(SUPPORTED_TYPES)}",
    )

    # 4. Refuse quantized weights.
    _check_unquantized(path, raw)
    return model_type


def _is_original_llava(raw):
    """Return whether a config.json was written by the original LLaVA code."""
    if raw.get("model_type") in ORIGINAL_TYPES:
        return True
    classes = raw.get("architectures")
    if isinstance(classes, list):
        for name in classes:
            if str(name).startswith(ORIGINAL_PREFIXES):
                return True
    return any(field in raw for field in ORIGINAL_FIELDS)


def _check_unquantized(path, raw):
    """Raise InputError if config.json says that the weights are quantized."""
    for section in (raw, raw.get("text_config"), raw.get("vision_config")):
        if not isinstance(section, dict):
            continue
        quantization = section.get("quantization_config")
        if quantization is None:
            continue
        method = quantization
        if isinstance(quantization, dict):
            method = quantization.get("quant_method")
        raise InputError(
            f"{path}: quantization_config ({method!r:.60}): quantized weights are not supported; "
            "take the checkpoint that it was made from"
        )
