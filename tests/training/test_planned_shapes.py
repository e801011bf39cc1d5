"""The sizes of what a run computes together follow from its options. Each is worked out by hand.

The tiny model has 64 image tokens. A plan assumes 40 tokens for a prompt and 100 for a response.
"""

from dataclasses import replace

import pytest
from conftest import TINY

from minialign.generation.cache_limits import CacheLimits
from minialign.models.config_json import read_config
from minialign.models.memory import BatchShape
from minialign.training import planned_shapes as shapes
from minialign.training.options import parse_options


@pytest.fixture(scope="module")
def config():
    """Return the config of the tiny model."""
    config, _ = read_config(TINY / "model")
    return config


def options_of(words):
    """Return the options of a run on the tiny model, with the defaults of the paper."""
    return parse_options(["--model", str(TINY / "model"), *words.split()])


@pytest.mark.parametrize(
    "words, num_responses",
    [
        ("--method sft", 1),
        ("--method distill", 1),
        ("--method dpo", 2),
        ("--method reward", 2),
        ("--method bdhs", 2),
        ("--method mixed-dpo", 2),
        ("--method bdhs --gamma .5", 3),
        ("--method online-bdhs --gamma 0", 3),
        ("--method distortion", 3),
        ("--method ppo", 1),
        ("--method rloo", 4),
        ("--method grpo", 4),
    ],
)
def test_the_responses_of_an_example_follow_one_prefix(config, words, num_responses):
    shape = shapes.example_shape(options_of(words), config)

    assert shape == BatchShape(
        num_rows=1, prefix_length=104, num_response_tokens=100 * num_responses, num_features=64
    )


@pytest.mark.parametrize(
    "words, num_visible", [("", 6), ("--damage .25", 48), ("--damage-noise 9", 64)]
)
def test_the_damaged_images_of_mdpo_are_a_second_batch(config, words, num_visible):
    """A pair has 104 + 200 tokens, so 4,096 tokens have space for 13 of the 16 pairs of a batch.

    A tenth of the image tokens stays by default. Noise leaves out none.
    """
    options = options_of(f"--method dpo --loss mdpo {words}")

    pairs = shapes.training_shape(options, config)
    damaged = shapes.damaged_shape(options, config)

    assert pairs == BatchShape(
        num_rows=13, prefix_length=104, num_response_tokens=200, num_features=64
    )
    assert damaged == replace(pairs, prefix_length=num_visible + 40, num_response_tokens=100)


@pytest.mark.parametrize(
    "words, num_sampled",
    [
        ("--method online-dpo", 2),
        ("--method mixed-dpo", 2),
        ("--method ppo", 1),
        ("--method rloo", 4),
        ("--method grpo", 4),
        ("--method distill --on policy", 1),
    ],
)
def test_the_policy_answers_each_prompt_so_often(config, words, num_sampled):
    shape = shapes.response_shape(options_of(words), config, CacheLimits(), num_examples=6)

    assert shape.num_prompts == 6
    assert shape.prompt_length == 104
    assert shape.num_continuations == 6 * num_sampled


@pytest.mark.parametrize(
    "words, prompt_length, num_continuations",
    [
        ("", 1 + 40 + 100, 6 * 4),  # of 64 image tokens 0.64 are visible
        ("--rho .75", 16 + 40 + 100, 6 * 4),
        ("--by noise", 64 + 40 + 100, 6 * 4),
        ("--unguided", 1 + 40 + 100, 6),
    ],
)
def test_bdhs_completes_four_sentences_of_a_record(config, words, prompt_length, num_continuations):
    """Its prefill reads the chosen response too. An unguided round writes a single response."""
    options = options_of(f"--method bdhs {words}")

    shape = shapes.bdhs_shape(options, config, CacheLimits(), num_records=6)

    assert shape.num_prompts == 6
    assert shape.prompt_length == prompt_length
    assert shape.num_continuations == num_continuations
