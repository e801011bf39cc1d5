"""Read theta and the scaling of RoPE from a config.json, where they have stood in three places."""

from minialign.models.config_section import ConfigSection
from minialign.utils.files import check

LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
# Fields of rope_scaling or rope_parameters that every type of RoPE has.
COMMON_FIELDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# theta is 10,000 in Llama and 10,000,000 in the decoders with the longest contexts.
LARGEST_THETA = 1e12
LARGEST_FACTOR = 1e9


def read_rope(text_config: ConfigSection) -> tuple[float, dict | None]:
    """Return theta and the scaling (or None) of RoPE.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 writes rope_parameters with
    all of it. As in transformers 5, a theta within one of these objects takes precedence over the
    field rope_theta beside it.
    """
    # 1. Find the object that says how RoPE is scaled.
    object_name = "rope_scaling"
    values = text_config.section("rope_scaling")
    parameters = text_config.section("rope_parameters")
    check(
        not (values and parameters) or values == parameters,
        f"{text_config.path}: rope_scaling and rope_parameters in text_config differ; remove the "
        "wrong one",
    )
    if parameters:
        object_name = "rope_parameters"
        values = parameters

    # 2. Read theta. What the object does not state is taken from the fields beside it.
    fallbacks = {
        "rope_theta": text_config.get("rope_theta"),
        "partial_rotary_factor": text_config.get("partial_rotary_factor"),
        "rope_type": "default",
    }
    if "type" in values:  # an older name of rope_type
        fallbacks["rope_type"] = values["type"]
    section = ConfigSection(
        text_config.path, f"text_config, {object_name}", {**fallbacks, **values}
    )
    theta = section.number("rope_theta", 1, LARGEST_THETA)

    # 3. Read the scaling. Only that of Llama 3 is supported.
    rope_type = section.choice("rope_type", ["default", "llama3"])
    scaling_fields = LLAMA3_SCALING if rope_type == "llama3" else ()
    _check_known_fields(section, COMMON_FIELDS.union(scaling_fields), rope_type)
    if rope_type == "default":
        return theta, None
    return theta, _read_llama3_scaling(section)


def _check_known_fields(section, known_fields, rope_type):
    """Raise InputError if a section has a field that this type of RoPE does not read."""
    for key, value in section.values.items():
        check(
            key in known_fields or value is None,
            f"{section.label(key)} ({value!r:.40}) is not supported with the type {rope_type!r}",
        )
    factor = section.get("partial_rotary_factor")
    check(
        factor is None or factor == 1,
        f"{section.label('partial_rotary_factor')} {factor!r:.40} is not supported, only 1",
    )


def _read_llama3_scaling(section):
    """Return the four numbers of Llama 3's scaling, checked to be in order."""
    scaling = {}
    for key in LLAMA3_SCALING:
        scaling[key] = section.number(key, 1e-6, LARGEST_FACTOR)
    check(
        scaling["low_freq_factor"] < scaling["high_freq_factor"],
        f"{section.label('low_freq_factor')} is {scaling['low_freq_factor']}, which must be below "
        f"the high_freq_factor of {scaling['high_freq_factor']}",
    )
    return scaling
