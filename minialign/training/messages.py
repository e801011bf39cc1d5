"""What a run says on the terminal: how it goes, how it ended, and whether it learned anything."""

import sys
from collections import Counter

from tqdm import tqdm

from minialign.evaluation.shares import scaled_text
from minialign.methods.online import ANNOTATOR_METRIC
from minialign.utils.files import check, read_jsonl
from minialign.utils.messages import print_message, printable

# Metrics that give the share of prompts from which an online method learned nothing, and why.
SKIP_REASONS = {
    "same": "gave no two different responses",
    "tied": "were ties for the annotator",
}

# After how many steps without a sampled pair a run warns.
WARNED_STEPS = (1, 10, 100, 1000)


def describe_change(scores, method_name, folder):
    """Return one sentence: how hallucination changed on each set with captions, and where to look.

    scores: variant -> evaluation set -> scores, as in evaluation.json.
    A variant whose captions mention no object has no such share, which the sentence says.
    """
    # 1. The change on each set.
    changes = []
    silences = []
    for set_name, base_scores in scores["base"].items():
        if "chair_i" not in base_scores:
            continue
        shares = {variant: scores[variant][set_name]["chair_i"] for variant in scores}
        silent = [variant for variant, share in shares.items() if share is None]
        if silent:
            silences.append(f"no object was mentioned on {set_name} by {' and '.join(silent)}")
        if "base" in silent or "aligned" in silent:
            continue
        change = f"{scaled_text(shares['base'])} to {scaled_text(shares['aligned'])} %"
        if "control" in shares:
            change += f" (control {scaled_text(shares['control'])})"
        changes.append(f"{change} on {set_name}")

    # 2. The sentence.
    outcome = f"{method_name} is done"
    if changes:
        outcome = (
            f"{method_name} took the share of mentioned objects that are not there "
            f"from {', '.join(changes)}"
        )
    return "; ".join([outcome, *silences, f"model and logs are in {folder}"])


def print_skipped_prompts(log_path):
    """Print what share of the prompts an online method skipped, averaged over the steps."""
    for sentence in describe_skipped(read_jsonl(log_path)):
        print_message(f"{sentence} and were skipped")


def describe_skipped(lines) -> list[str]:
    """Return what share of the prompts was skipped, averaged over log lines, for each reason."""
    sentences = []
    for metric, reason in SKIP_REASONS.items():
        if lines and metric in lines[0]:
            mean_share = sum(line[metric] for line in lines) / len(lines)
            sentences.append(f"{100 * mean_share:.1f} % of the sampled prompts {reason}")
    return sentences


def describe_annotator_counts(lines) -> str:
    """Return what an annotator counted in the steps of some log lines, such as "asked: 32"."""
    totals = Counter()
    for line in lines:
        for name, value in line.items():
            if name.startswith(ANNOTATOR_METRIC):
                totals[name.removeprefix(ANNOTATOR_METRIC)] += value
    return ", ".join(f"{name}: {count}" for name, count in totals.items())


def steps_without_a_pair(lines) -> list[dict]:
    """Return the log lines of all steps that sampled, if not one of them gave a pair; else none.

    A step of Mixed-DPO that took all its pairs from the data has sampled nothing.
    """
    sampling_lines = []
    for line in lines:
        skipped_shares = [line[metric] for metric in SKIP_REASONS if metric in line]
        if not skipped_shares or line.get("offline") == 1:
            continue
        if sum(skipped_shares) < 1 - 1e-6:
            return []
        sampling_lines.append(line)
    return sampling_lines


def describe_useless_samples(lines) -> str:
    """Return why none of the sampled prompts gave a pair, with the counts of the annotator."""
    reasons = "; ".join(describe_skipped(lines))
    counts = describe_annotator_counts(lines)
    return f"{reasons} (the annotator: {counts})" if counts else reasons


def warn_if_nothing_learned(lines):
    """Warn while a run samples and has found no pair yet: in its first such step, and its tenth ...

    lines: the log so far.
    """
    useless_lines = steps_without_a_pair(lines)
    if len(useless_lines) in WARNED_STEPS:
        warning = (
            f"warning: no sampled pair to learn from in {len(useless_lines)} steps so far: "
            f"{describe_useless_samples(useless_lines)}"
        )
        tqdm.write(printable(warning), file=sys.stderr)


def check_learned(method_name, log_path):
    """Raise InputError if a run has ended in which nothing that was sampled could be learned from.

    Its adapter would be the one that it started with, or one of the data's pairs alone.
    """
    lines = read_jsonl(log_path)
    useless_lines = steps_without_a_pair(lines)
    check(
        not useless_lines,
        f"{log_path}: {method_name} has found no pair to learn from in {len(useless_lines)} "
        f"steps of sampling: {describe_useless_samples(useless_lines)}; no result is saved; "
        "give another --annotator, or sample more different responses",
    )
    check(
        any(line["grad_norm"] > 0 for line in lines),
        f"{log_path}: the gradient was 0 in every step, so {method_name} has learned nothing; "
        "no result is saved; give other data or another --loss",
    )


def print_reward_model_first(steps, folder):
    """Say that a reward model is trained before rloo or ppo, and for how long."""
    print_message(
        f"no --reward: a reward model is trained first, for {steps} steps, in {folder} "
        "(--reward-steps changes the number)",
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
