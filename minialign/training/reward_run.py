"""Train a reward model, and measure how it ranks pairs before and after."""

import random

from minialign.methods.base import encode_example
from minialign.models.policy import Policy, scalar_head
from minialign.pairs.annotators import RewardAnnotator, pair_accuracy
from minialign.pairs.reward_model import RewardModel
from minialign.training.messages import print_pair_accuracies
from minialign.training.run import train_variant
from minialign.utils.files import check, write_json


def train_reward_model(options, vlm, records, *, run, folder) -> tuple[Policy, int]:
    """Train a reward model on nine tenths of the pairs, and test it on the held-out tenth.

    Writes the reward model and evaluation.json to `folder`. Returns the policy with its scalar
    head, and the number of pairs that it was trained on.
    """
    train_records, held_out_records = split_records(records, options.seed)

    # 1. Before training all scores are 0, so all pairs are ties.
    untrained_head = scalar_head(vlm.model)
    scores = {"base": rank_pairs(vlm, untrained_head, train_records, held_out_records)}

    # 2. Train.
    examples = []
    for record in train_records:
        examples.append(encode_example(vlm, record, [record.chosen, record.rejected]))
    policy = train_variant(options, vlm, "reward", examples, run=run, folder=folder)

    # 3. Measure and report.
    with run.timer("evaluate"):
        scores["aligned"] = rank_pairs(vlm, policy.scalar_head, train_records, held_out_records)
    print_pair_accuracies(scores)
    write_json(folder / "evaluation.json", scores)
    return policy, len(examples)


def split_records(records, seed):
    """Return the records to train on, and a random tenth of all records to test with."""
    num_held_out = max(1, len(records) // 10)
    held_out = set(random.Random(seed).sample(range(len(records)), num_held_out))
    train_records = []
    held_out_records = []
    for i, record in enumerate(records):
        if i in held_out:
            held_out_records.append(record)
        else:
            train_records.append(record)
    check(
        train_records,
        "one record is not enough to train a reward model and to test it; give more --data",
    )
    return train_records, held_out_records


def rank_pairs(vlm, head, train_records, held_out_records):
    """Return the scores of `pair_accuracy` for both parts of the records, by split."""
    annotator = RewardAnnotator(RewardModel(vlm, head))
    return {
        "train": pair_accuracy(annotator, train_records),
        "held-out": pair_accuracy(annotator, held_out_records),
    }
