"""How far the sides of bench_dpo.py differ: ours from TRL's, and bfloat16 from float32."""

import copy

import torch
from dpo_steps import OurStep, packed_logps
from peers import peft_name


def compare_with_trl(our_step, trl_step, num_steps):
    """Compare our step with TRL's in losses, gradients and log-probs; print and return it.

    Losses are compared over several optimizer steps that each side makes by itself, gradients and
    log-probs at the first of them. All weights are put back afterwards.
    """
    # 1. The same parameters of both sides, in the same order.
    policy = our_step.policy
    trl_parameters_by_name = dict(trl_step.trainer.model.named_parameters())
    our_parameters = []
    trl_parameters = []
    for name, parameter in policy.parameters().items():
        our_parameters.append(parameter)
        trl_parameters.append(trl_parameters_by_name[peft_name(name)])

    # 2. Losses and gradients.
    our_losses, our_gradient = train_briefly(our_step, our_parameters, num_steps)
    trl_losses, trl_gradient = train_briefly(trl_step, trl_parameters, num_steps)
    loss_differences = []
    for our_loss, trl_loss in zip(our_losses, trl_losses, strict=True):
        loss_differences.append(abs(our_loss - trl_loss))

    # 3. Log-probs, also as a share of the tolerance that the tests allow.
    with torch.no_grad():
        our_logps = packed_logps(policy.model, our_step.pairs, our_step.features)  # (B, 2)
    logp_errors = (our_logps - trl_step.logps()).abs()
    lengths = response_lengths(our_step.pairs, our_logps.device)
    tolerances = torch.maximum(1e-6 * our_logps.abs(), 1e-5 * lengths)

    result = {
        "loss_difference": max(loss_differences),
        "losses": [our_losses, trl_losses],
        "gradient_difference": relative_error(our_gradient, trl_gradient),
        "logp_difference": float(logp_errors.max()),
        "logp_share_of_tolerance": float((logp_errors / tolerances).max()),
    }
    print(
        f"ours and TRL: losses of {num_steps} steps within {result['loss_difference']:.1e}; "
        f"log-probs within {result['logp_difference']:.1e} nats, "
        f"{result['logp_share_of_tolerance']:.2f} of the tolerance; "
        f"gradients at step 0 within {result['gradient_difference']:.1e} of their length",
        flush=True,
    )
    return result


def train_briefly(step, parameters, num_steps):
    """Make AdamW steps; return their losses and the first gradient, and put the weights back."""
    initial_values = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0)
    losses = []
    first_gradient = None
    for _ in range(num_steps):
        losses.append(float(step()))
        if first_gradient is None:
            first_gradient = flat_gradient(parameters)
        optimizer.step()
    for parameter, value in zip(parameters, initial_values, strict=True):
        parameter.data.copy_(value)
    return losses, first_gradient


def compare_with_float32(policy, pairs):
    """Compare our step in bfloat16 with the same weights in float32; print and return it."""
    # 1. Both sides.
    exact_policy = copy.deepcopy(policy)
    exact_policy.model.float()
    rounded_step = OurStep(policy, pairs)
    exact_step = OurStep(exact_policy, pairs)

    # 2. Log-probs.
    with torch.no_grad():
        rounded_logps = packed_logps(policy.model, pairs, rounded_step.features)
        exact_logps = packed_logps(exact_policy.model, pairs, exact_step.features)
    errors = (rounded_logps - exact_logps).abs()
    errors_per_token = errors / response_lengths(pairs, errors.device)

    # 3. Loss and gradients.
    rounded_loss = float(rounded_step())
    exact_loss = float(exact_step())
    rounded_gradient = flat_gradient(policy.parameters().values())
    exact_gradient = flat_gradient(exact_policy.parameters().values())
    result = {
        "logp_per_token": float(errors_per_token.max()),
        "loss": abs(rounded_loss - exact_loss),
        "gradient": relative_error(exact_gradient, rounded_gradient),
    }
    print(
        f"bfloat16 and float32, ours: log-probs within {result['logp_per_token']:.1e} nats a "
        f"token, loss within {result['loss']:.1e}, gradient within {result['gradient']:.1e} "
        "of its length"
    )
    return result


def response_lengths(pairs, device):
    """Return the number of tokens of each response, (B, k)."""
    lengths = []
    for pair in pairs:
        lengths.append([len(response) for response in pair.responses])
    return torch.tensor(lengths, device=device)


def flat_gradient(parameters):
    """Return the gradients of parameters as one vector in float64."""
    gradients = [parameter.grad.flatten().double() for parameter in parameters]
    return torch.cat(gradients)


def relative_error(exact, approximate):
    """Return the length of the difference of two vectors over the length of the first."""
    return float((approximate - exact).norm() / exact.norm())
