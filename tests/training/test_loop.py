"""The training loop: order of the examples, micro-batches, learning rate, single steps."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from short_runs import WrappedMethod, make_run, read_log

from minialign.data.packing import pack
from minialign.methods.base import encode_example, microbatches, pack_examples
from minialign.training.loop import Schedule, batch_indices, lr_multiplier
from minialign.utils.files import InputError

# --- the order of the examples ---


@pytest.mark.parametrize("num_examples, batch_size", [(10, 4), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_holds_each_example_once(num_examples, batch_size):
    """The stream of all batches, cut into epochs, holds every index once in each epoch."""
    schedule = Schedule(steps=num_examples, batch_size=batch_size, lr=1, projector_lr=1, seed=0)
    stream = []
    for step in range(num_examples):
        stream += batch_indices(num_examples, schedule, step)

    epochs = []
    for first in range(0, len(stream), num_examples):
        epochs.append(stream[first : first + num_examples])

    assert len(epochs) == batch_size
    for epoch in epochs:
        assert sorted(epoch) == list(range(num_examples))


def test_epochs_and_seeds_differ_in_order():
    """Two permutations of ten are the same by chance once in 3.6 million."""
    epoch_long = Schedule(steps=2, batch_size=10, lr=1, projector_lr=1, seed=0)
    other_seed = Schedule(steps=2, batch_size=10, lr=1, projector_lr=1, seed=1)

    first_epoch = batch_indices(10, epoch_long, 0)

    assert first_epoch != batch_indices(10, epoch_long, 1)
    assert first_epoch != batch_indices(10, other_seed, 0)
    assert batch_indices(10, epoch_long, 1) != batch_indices(10, other_seed, 0)


# --- micro-batches ---


def count_identities(*lists):
    """Count how often each object is in the lists. Examples that are equal count separately."""
    counts = Counter()
    for examples in lists:
        counts.update(map(id, examples))
    return counts


@pytest.fixture
def nine_examples(vlm, records):
    """Return examples of different lengths."""
    return [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:9]]


def test_the_length_of_an_example_is_that_of_its_packed_row(vlm, nine_examples):
    """Image tokens count: they fill memory as words do. The tiny model has 64 an image."""
    for example in nine_examples:
        batch = pack(vlm.model, pack_examples(vlm, [example]))
        assert example.length == batch.ids.shape[1]
        assert example.length > 64


def test_microbatches_hold_every_example_once(nine_examples):
    parts = microbatches(nine_examples, 300)

    assert len(parts) > 1
    assert count_identities(*parts) == count_identities(nine_examples)


def test_microbatches_stay_within_the_budget(nine_examples):
    """The longest example times the number of examples is the padded size."""
    for part in microbatches(nine_examples, 300):
        longest = max(example.length for example in part)
        assert longest * len(part) <= 300


def test_an_example_over_the_budget_stands_alone(nine_examples):
    parts = microbatches(nine_examples, 1)

    assert [len(part) for part in parts] == [1] * 9


def test_microbatches_may_hold_an_example_twice(nine_examples):
    """A batch larger than the data holds examples several times."""
    parts = microbatches(nine_examples[:1] * 3, 10**6)

    assert [len(part) for part in parts] == [3]


def test_microbatches_may_fill_their_budget_exactly(nine_examples):
    """Three examples of one length fit a budget of three lengths, and not one of a token less."""
    examples = nine_examples[:1] * 3
    budget = 3 * examples[0].length

    exact = microbatches(examples, budget)
    less = microbatches(examples, budget - 1)

    assert [len(part) for part in exact] == [3]
    assert [len(part) for part in less] == [2, 1]


# --- the learning rate ---


def test_warm_up_and_cosine_by_hand():
    """103 steps: 3 % warm-up is 3 steps (1/3, 2/3, 1). Half a cosine over the other 100 follows.

    It is 1 at its start, cos 45 degrees after a quarter, 1/2 in the middle and near 0 at its end.
    """
    schedule = Schedule(steps=103, batch_size=1, lr=1, projector_lr=1, seed=0)

    warm_up = [lr_multiplier(step, schedule) for step in (0, 1, 2)]
    decay = [lr_multiplier(step, schedule) for step in (3, 28, 53)]

    assert warm_up == pytest.approx([1 / 3, 2 / 3, 1])
    assert decay == pytest.approx([1, 0.5 + 0.5 * 2**-0.5, 0.5])
    assert 0 < lr_multiplier(102, schedule) < 3e-4


def test_a_run_of_one_step_has_the_full_rate():
    assert lr_multiplier(0, Schedule(steps=1, batch_size=1, lr=1, projector_lr=1, seed=0)) == 1.0


def test_warm_up_and_constant_rate_by_hand():
    """The same warm-up, then the peak until the end."""
    schedule = Schedule(steps=103, batch_size=1, lr=1, projector_lr=1, seed=0, constant=True)

    multipliers = [lr_multiplier(step, schedule) for step in (0, 1, 2, 3, 53, 102)]

    assert multipliers == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


# --- single steps ---


def test_the_first_step_by_hand(vlm, records, tmp_path):
    """Adam's first step moves every weight by the learning rate against the sign of its gradient.

    The projector has a rate of its own. Weights with a tiny gradient move less, because of Adam's
    epsilon, so the largest change is looked at. 1e-7 of a weight is its rounding in fp32.
    """
    run = make_run(vlm, records, rank=0)

    run.train(tmp_path, Schedule(steps=1, batch_size=5, lr=1e-4, projector_lr=3e-4, seed=0))

    for name, parameter in run.policy.parameters().items():
        before = run.initial_weights[name]
        change = (parameter - before).abs().max()
        rounding = 1e-7 * before.abs().max()
        rate = 3e-4 if name.startswith("multi_modal_projector.") else 1e-4
        assert 0.95 * rate <= change <= 1.001 * rate + rounding


def test_the_line_of_the_first_step(vlm, records, tmp_path):
    """At first policy and reference are equal, so the DPO loss is log 2 = 0.6931."""
    run = make_run(vlm, records, rank=0)

    run.train(tmp_path, Schedule(steps=1, batch_size=5, lr=1e-4, projector_lr=3e-4, seed=0))

    (line,) = read_log(tmp_path)
    assert line["step"] == 0
    assert line["lr"] == 1e-4
    assert line["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert line["grad_norm"] > 0
    assert set(line) == {
        "step",
        "loss",
        "logp_chosen",
        "logp_rejected",
        "ref_logp_chosen",
        "ref_logp_rejected",
        "margin",
        "accuracy",
        "lr",
        "grad_norm",
    }


class RecordingMethod(WrappedMethod):
    """A method that collects two of a batch, learns three times from them, and notes all calls."""

    def __init__(self, method):
        super().__init__(method)
        self.passes = 3
        self.collect_calls = []
        self.loss_calls = []

    def collect(self, batch, step):
        self.collect_calls.append((batch, step))
        return batch[:2], {"found": 2 * step}

    def loss(self, examples, batch):
        self.loss_calls.append((examples, batch))
        return super().loss(examples, batch)


@pytest.fixture
def recorded(vlm, records, tmp_path):
    """Train two steps with a RecordingMethod, one example a micro-batch. Return run and method."""
    run = make_run(vlm, records)
    method = RecordingMethod(run.method)
    schedule = Schedule(
        steps=2, batch_size=3, lr=1e-3, projector_lr=1e-3, seed=0, max_tokens_per_microbatch=1
    )
    run.train(tmp_path, schedule, method)
    run.batches = []
    for step in range(2):
        run.batches.append([run.examples[i] for i in batch_indices(5, schedule, step)])
    return run, method


def test_a_step_collects_once(recorded):
    """`collect` receives the batch of the step and the number of the step."""
    run, method = recorded

    assert method.collect_calls == [(run.batches[0], 0), (run.batches[1], 1)]


def test_a_step_learns_from_the_collected_examples_in_every_pass(recorded):
    """Two examples, one by one, three times a step. `loss` receives the collected batch as well."""
    run, method = recorded
    first, second = run.batches
    batches_of_calls = [batch for _, batch in method.loss_calls]
    micro_batches = [examples for examples, _ in method.loss_calls]

    assert batches_of_calls == [first[:2]] * 6 + [second[:2]] * 6
    assert count_identities(*micro_batches) == count_identities(3 * first[:2], 3 * second[:2])


def test_metrics_of_collecting_are_logged(recorded, tmp_path):
    assert [line["found"] for line in read_log(tmp_path)] == [0, 2]


def test_every_pass_is_a_step_of_adam(recorded, tmp_path):
    """Two steps of three passes each."""
    state = load_file(tmp_path / "state.safetensors")

    counts = {float(value) for name, value in state.items() if name.startswith("step.")}

    assert counts == {6.0}


def test_the_loss_falls_and_the_margin_grows(vlm, records, tmp_path):
    run = make_run(vlm, records)
    schedule = Schedule(steps=8, batch_size=5, lr=1e-4, projector_lr=1e-4, seed=0)

    run.train(tmp_path, schedule)

    log = read_log(tmp_path)
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["margin"] > log[0]["margin"]
    assert log[-1]["accuracy"] > 0.5
    for step, line in enumerate(log):
        assert line["lr"] == lr_multiplier(step, schedule) * 1e-4


def test_gradients_are_clipped_to_norm_one(vlm, records, tmp_path, monkeypatch):
    """The optimizer sees clipped gradients. The log has the norm before clipping."""
    run = make_run(vlm, records)
    norms_seen = []
    adamw_step = torch.optim.AdamW.step

    def measure_and_step(optimizer, *args, **kwargs):
        gradients = []
        for group in optimizer.param_groups:
            gradients += [parameter.grad.flatten() for parameter in group["params"]]
        norms_seen.append(float(torch.cat(gradients).norm()))
        return adamw_step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", measure_and_step)
    run.train(tmp_path)

    norms_before = [line["grad_norm"] for line in read_log(tmp_path)]
    assert max(norms_before) > 1.1
    assert norms_seen == pytest.approx([min(1.0, norm) for norm in norms_before], rel=1e-4)


class NotFiniteMethod(WrappedMethod):
    """A method whose loss, or whose gradient, is not finite from the second call on."""

    def __init__(self, run, add_to_loss):
        super().__init__(run.method)
        self.weight = next(iter(run.policy.parameters().values()))
        self.add_to_loss = add_to_loss
        self.num_calls = 0

    def loss(self, examples, batch):
        loss, metrics = super().loss(examples, batch)
        self.num_calls += 1
        if self.num_calls > 1:
            loss = loss + self.add_to_loss(self.weight)
        return loss, metrics


def infinite_slope(weight):
    """Return 0, with the infinite slope that a square root has there."""
    total = weight.sum()
    return (total - total.detach()).sqrt()


@pytest.mark.parametrize(
    "add_to_loss, expected_message",
    [
        (lambda weight: float("nan"), "the loss is nan at step 1"),
        (lambda weight: float("inf"), "the loss is inf at step 1"),
        (lambda weight: float("-inf"), "the loss is -inf at step 1"),
        (infinite_slope, "at step 1, and its gradient has norm (inf|nan)"),
    ],
)
def test_training_stops_where_loss_or_gradient_is_not_finite(
    vlm, records, tmp_path, add_to_loss, expected_message
):
    """Nothing of that step is kept: the weights are those after step 0, and so is the log."""
    run = make_run(vlm, records)
    method = NotFiniteMethod(run, add_to_loss)
    schedule = Schedule(steps=3, batch_size=2, lr=1e-3, projector_lr=1e-3, seed=0)

    with pytest.raises(InputError, match=expected_message):
        run.train(tmp_path, schedule, method)

    assert [line["step"] for line in read_log(tmp_path)] == [0]
    weights = run.weights()
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(not weight.equal(run.initial_weights[name]) for name, weight in weights.items())
