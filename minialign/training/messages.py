"""What a run says on the terminal: how it goes, how it ended, and whether it learned anything."""

import sys
from collections import Counter

from tqdm import tqdm

from minialign.evaluation.shares import scaled_text
from minialign.methods.online import ANNOTATOR_METRIC
from minialign.utils.files import check, read_jsonl
from minialign.utils.messages import print_message, printable
from minialign.utils.text_tables import aligned_table

# Metrics that give the share of prompts from which an online method learned nothing, and why.
SKIP_REASONS = {
    "same": "gave no two different responses",
    "tied": "were ties for the annotator",
}

# A run warns after this many steps that sampled, if none of them gave a pair.
WARNED_STEPS = (1, 10, 100, 1000)


def describe_change(scores, method_name, folder):
    """Return one sentence: how CHAIR_i changed on each set with captions, and where results are.

    scores: variant ("base", "aligned", "control") -> evaluation set -> scores, as in
    evaluation.json. CHAIR_i is None if no caption of a variant mentions an object, and the sentence
    says so.
    """
    # 1. The change on each set.
    changes = []
    empty_shares = []
    for set_name, base_scores in scores["base"].items():
        if "chair_i" not in base_scores:
            continue
        shares = {variant: scores[variant][set_name]["chair_i"] for variant in scores}
        silent_variants = [variant for variant, share in shares.items() if share is None]
        if silent_variants:
            names = " and ".join(silent_variants)
            empty_shares.append(f"no object was mentioned on {set_name} by {names}")
        if "base" in silent_variants or "aligned" in silent_variants:
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
    elif not scores["base"]:
        outcome += ", nothing was measured (--eval names no folder)"
    return "; ".join([outcome, *empty_shares, f"model and logs are in {folder}"])


def print_skipped_prompts(log_path):
    """Print what share of the prompts an online method skipped, averaged over the steps."""
    for sentence in describe_skipped(read_jsonl(log_path)):
        print_message(f"{sentence} and were skipped")


def describe_skipped(lines) -> list[str]:
    """Return a sentence for each reason: what share of the prompts was skipped, on average."""
    sentences = []
    for metric, reason in SKIP_REASONS.items():
        if lines and metric in lines[0]:
            mean_share = sum(line[metric] for line in lines) / len(lines)
            sentences.append(f"{100 * mean_share:.1f} % of the sampled prompts {reason}")
    return sentences


def describe_annotator_counts(lines) -> str:
    """Return the sums of what an annotator counted over log lines, such as "asked: 32"."""
    totals = Counter()
    for line in lines:
        for name, value in line.items():
            if name.startswith(ANNOTATOR_METRIC):
                totals[name.removeprefix(ANNOTATOR_METRIC)] += value
    return ", ".join(f"{name}: {count}" for name, count in totals.items())


def useless_sampling_lines(lines) -> list[dict]:
    """Return the log lines of all steps that sampled, if none of them gave a pair.

    Returns no lines if one of them did. A step of Mixed-DPO that took all its pairs from the data
    did not sample.
    """
    sampling_lines = []
    for line in lines:
        skipped_shares = [line[metric] for metric in SKIP_REASONS if metric in line]
        if not skipped_shares or line.get("offline") == 1:
            continue
        if sum(skipped_shares) < 1 - 1e-6:  # a prompt was not skipped; 1e-6 is for rounding
            return []
        sampling_lines.append(line)
    return sampling_lines


def describe_useless_samples(lines) -> str:
    """Return why the prompts of these lines gave no pair, with the counts of the annotator."""
    reasons = "; ".join(describe_skipped(lines))
    counts = describe_annotator_counts(lines)
    return f"{reasons} (the annotator: {counts})" if counts else reasons


def warn_if_nothing_learned(lines):
    """Warn if no step so far gave a sampled pair, after the numbers of steps in WARNED_STEPS.

    lines: the log so far.
    """
    useless_lines = useless_sampling_lines(lines)
    if len(useless_lines) in WARNED_STEPS:
        warning = (
            f"warning: no sampled pair to learn from in {len(useless_lines)} steps so far: "
            f"{describe_useless_samples(useless_lines)}"
        )
        tqdm.write(printable(warning), file=sys.stderr)


def check_learned(method_name, log_path):
    """Raise InputError if a finished run sampled and got no pair, or never had a gradient.

    Its policy would be the untrained one, or for Mixed-DPO one that learned from the data's pairs
    alone.
    """
    lines = read_jsonl(log_path)
    useless_lines = useless_sampling_lines(lines)
    check(
        not useless_lines,
        f"{log_path}: {method_name} has found no pair to learn from in {len(useless_lines)} "
        f"steps of sampling: {describe_useless_samples(useless_lines)}; no result is saved; "
        "give another --annotator, or make the sampled responses differ more, for example with a "
        "higher --temperature",
    )
    check(
        any(line["grad_norm"] > 0 for line in lines),
        f"{log_path}: the gradient was 0 in every step, so {method_name} has learned nothing; "
        "no result is saved; give other data or another --loss",
    )


def print_reward_model_first(steps, folder):
    """Say that a reward model is trained before rloo, ppo or grpo, and for how long."""
    print_message(
        f"no --reward: a reward model is trained first, for {steps} steps, in {folder} "
        "(--reward-steps changes the number)",
    )


def print_pair_accuracies(scores):
    """Print a table of how a reward model ranks pairs before and after training.

    scores: "base" or "aligned" -> "train" or "held-out" -> scores of `pair_accuracy`.
    """
    rows = []
    for split in scores["base"]:
        for variant in scores:
            accuracy = 100 * scores[variant][split]["accuracy"]
            ties = 100 * scores[variant][split]["ties"]
            num_pairs = scores[variant][split]["n"]
            rows.append([split, variant, f"{accuracy:.1f}", f"{ties:.1f}", str(num_pairs)])
    headings = ["pairs", "reward model", "accuracy", "ties", "n"]
    print(aligned_table(headings, rows, num_keys=2))
