"""Test the distortion method: predicted tokens under a noisy image, scored after the true ones."""

import pytest
import torch
from method_runs import (
    BETA,
    GAMMA,
    assert_equal_loss_and_gradient,
    assert_policy_has_moved,
    make_run,
)

from minialign import reference
from minialign.data.diffusion import diffuse
from minialign.data.image_processor import preprocess
from minialign.data.images import open_image
from minialign.logprobs import response_logps
from minialign.methods.base import encode_example, pack_examples
from minialign.methods.online import DistortionPairs
from minialign.models.policy import Policy
from minialign.utils.seeding import seeded_generator


def test_loss_and_gradient_equal_the_reference(vlm, records):
    """By the slow Eq. 5, which scores the predicted ids in the context of y+."""
    run = make_run("distortion", vlm, records, num_records=2)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)

    loss, metrics = run.method.loss(examples, batch=examples)

    slow_examples = []
    for pair, example in zip(run.pairs(examples), examples, strict=True):
        slow_examples.append((*pair, example.scored_ids[-1]))
    slow_loss = reference.averaged_loss(vlm.model, run.ref_model, slow_examples, BETA, GAMMA)
    assert len(examples) == 2
    assert_policy_has_moved(metrics)
    assert_equal_loss_and_gradient(run, loss, slow_loss)


def noisy_features(vlm, record, step):
    """Return the features of a record's image under the noise of the step."""
    tiles, size = preprocess(open_image(record.paths[0]), vlm.image_processor)
    generator = seeded_generator(3, record.id, step, "noise")
    return vlm.model.encode_images([(diffuse(tiles, 500, generator), size)])


def predict_slowly(vlm, example, step):
    """Return the most likely token after each beginning of y+, one sequence a token."""
    image_features = noisy_features(vlm, example.record, step)
    chosen_ids = example.responses[0]
    predicted_ids = []
    for t in range(len(chosen_ids)):
        logits = reference.next_token_logits(
            vlm.model, example.prompt_ids, image_features, chosen_ids[:t]
        )
        predicted_ids.append(int(logits[-1].argmax()))
    return predicted_ids


@torch.no_grad()
def test_predicted_tokens_are_scored_in_the_context_of_the_chosen_response(vlm, records):
    """y~- is the slow prediction, and its log-prob is the slow one under the clean image."""
    run = make_run("distortion", vlm, records, num_records=2)
    run.move_policy()

    examples, metrics = run.method.collect(run.examples, step=6)

    num_tokens = 0
    num_changed = 0
    questions = run.questions(examples)
    for example, before, question in zip(examples, run.examples, questions, strict=True):
        chosen_ids = before.responses[0]
        predicted_ids = predict_slowly(vlm, before, step=6)
        assert example.responses == [*before.responses, chosen_ids]
        assert example.scored_ids == [*before.responses, predicted_ids]

        logps, _ = response_logps(vlm.model, pack_examples(vlm, [example]))
        slow_logps = reference.token_logps(
            vlm.model, *question, chosen_ids, scored_ids=predicted_ids
        )
        assert logps[0, 2].item() == pytest.approx(sum(slow_logps).item(), rel=1e-5)
        for chosen_id, predicted_id in zip(chosen_ids, predicted_ids, strict=True):
            num_tokens += 1
            num_changed += chosen_id != predicted_id
    assert num_changed > 0
    assert metrics["changed"] == pytest.approx(num_changed / num_tokens)


def test_the_noise_depends_on_record_and_step_alone(vlm, records):
    """The predictions are the same in any batch, and others at another step.

    With twelve records the noise of another step changes some token.
    """
    examples = []
    for record in records[:12]:
        examples.append(encode_example(vlm, record, [record.chosen, "No."]))
    collector = DistortionPairs(Policy(vlm.model, 4, 8), vlm, noise_steps=500, seed=3)

    predictions = collect_predictions(collector, examples, step=1)

    assert collect_predictions(collector, examples[5:8][::-1], step=1) == predictions[5:8][::-1]
    assert collect_predictions(collector, examples, step=2) != predictions


def collect_predictions(collector, examples, step):
    """Return the predicted ids of each example."""
    collected, _ = collector.collect(examples, step)
    return [example.scored_ids[-1] for example in collected]
