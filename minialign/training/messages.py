"""What a run says on the terminal when it ends."""

import sys

from minialign.utils.files import read_jsonl

# Metrics that give the share of prompts from which an online method learned nothing, and why.
SKIP_REASONS = {
    "same": "gave no two different responses",
    "tied": "were ties for the annotator",
}


def describe_change(scores, method_name, folder):
    """Return one sentence: how hallucination changed on each set with captions, and where to look.

    scores: variant -> evaluation set -> scores, as in evaluation.json.
    """
    changes = []
    for set_name, base_scores in scores["base"].items():
        if "chair_i" not in base_scores:
            continue
        before = 100 * base_scores["chair_i"]
        after = 100 * scores["aligned"][set_name]["chair_i"]
        change = f"{before:.1f} to {after:.1f} %"
        if "control" in scores:
            control = 100 * scores["control"][set_name]["chair_i"]
            change += f" (control {control:.1f})"
        changes.append(f"{change} on {set_name}")

    outcome = f"{method_name} is done"
    if changes:
        outcome = (
            f"{method_name} took the share of mentioned objects that are not there "
            f"from {', '.join(changes)}"
        )
    return f"{outcome}; model and logs are in {folder}"


def print_skipped_prompts(log_path):
    """Print what share of the prompts an online method skipped, averaged over the steps."""
    lines = read_jsonl(log_path)
    for metric, reason in SKIP_REASONS.items():
        if metric in lines[0]:
            mean_share = sum(line[metric] for line in lines) / len(lines)
            print(
                f"{100 * mean_share:.1f} % of the sampled prompts {reason} and were skipped",
                file=sys.stderr,
            )


def print_reward_model_first(steps, folder):
    """Say that a reward model is trained before rloo or ppo, and for how long."""
    print(
        f"no --reward: a reward model is trained first, for {steps} steps, in {folder} "
        "(--reward-steps changes the number)",
        file=sys.stderr,
    )


def print_pair_accuracies(scores):
    """Print how a reward model ranks pairs before and after training, as a Markdown table.

    scores: "base" or "aligned" -> "train" or "held-out" -> scores of `pair_accuracy`.
    """
    print("| pairs | reward model | accuracy | ties | n |\n|---|---|---|---|---|")
    for split in scores["base"]:
        for variant in scores:
            accuracy = 100 * scores[variant][split]["accuracy"]
            ties = 100 * scores[variant][split]["ties"]
            num_pairs = scores[variant][split]["n"]
            print(f"| {split} | {variant} | {accuracy:.1f} | {ties:.1f} | {num_pairs} |")
