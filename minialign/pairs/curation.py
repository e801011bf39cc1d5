"""Curate preference pairs: score each of them, and keep the best share (arXiv 2409.18541).

The score of a pair is how far its chosen response is ahead of its rejected one. Who judges the two
is a scorer: a reward model, or the model itself.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from minialign.data.records import Record
from minialign.logprobs import response_logps
from minialign.models.checkpoint import fingerprint
from minialign.models.loading import VLM
from minialign.pairs.pair_files import remove_unfinished, sample_in_groups
from minialign.pairs.reward_model import RewardModel, load_reward_model, packed_batches
from minialign.utils.files import check, write_jsonl
from minialign.utils.messages import print_message

POLICY = "policy"
REWARD_PREFIX = "reward:"
BATCH_SIZE = 16  # the most pairs that are scored together
# Scores are rounded before they are compared. In fp32, what else is in a batch changes a score in
# the sixth decimal. That must not decide between two pairs of the same score.
SCORE_DECIMALS = 4


@dataclass
class PolicyScorer:
    """Scores a response by the mean log-prob of its tokens, in nats, with the image visible.

    The mean and not the sum, so that a short response is not ahead of a long one for its length.
    The end token counts.
    """

    vlm: VLM
    name: str = POLICY

    def metadata(self) -> dict:
        """Return what the scores depend on, beyond the name: nothing.

        The model that scores is the one that samples, which the file of pairs names anyway.
        """
        return {}

    @torch.no_grad()
    def score(self, records: list[Record], texts: list[list[str]]) -> list[list[float]]:
        """Return the scores (n, k) of k responses, given as texts, to each of n records."""
        scores = []
        for rows in packed_batches(self.vlm, records, texts, BATCH_SIZE):
            logps, token_counts = response_logps(self.vlm.model, rows)  # both (B, k)
            scores += (logps / token_counts).tolist()
        return scores


@dataclass
class RewardScorer:
    """Scores a response by a reward model."""

    reward_model: RewardModel
    name: str

    def metadata(self) -> dict:
        """Return what the scores depend on, beyond the name: the weights of the reward model."""
        return {
            "reward_model": fingerprint(self.reward_model.vlm.model),
            "reward_head": fingerprint(self.reward_model.head),
        }

    def score(self, records: list[Record], texts: list[list[str]]) -> list[list[float]]:
        """Return the scores (n, k) of k responses, given as texts, to each of n records."""
        # Each process has sampled some of the pairs, and scores these by itself.
        return self.reward_model.score_locally(records, texts).tolist()


def load_scorer(options, vlm: VLM, records: list[Record]) -> PolicyScorer | RewardScorer:
    """Load the scorer that --by-score names: "policy" or "reward:DIR".

    Raises InputError if it cannot score responses to the prompts of these records.
    """
    if options.by_score == POLICY:
        return PolicyScorer(vlm)
    folder = options.by_score.removeprefix(REWARD_PREFIX)
    reward_model = load_reward_model(
        folder, base=options.model, dtype=options.dtype, device=options.device
    )
    reward_model.check_records(records)
    return RewardScorer(reward_model, name=options.by_score)


@dataclass
class ScoringSampler:
    """Samples pairs as another sampler does, and writes the scores of both responses beside them.

    A pair without a usable rejected response gets no score.
    """

    sampler: object  # such as BdhsSampler
    scorer: PolicyScorer | RewardScorer
    share: float  # of the pairs with a score, to keep
    seed: int  # decides between equal scores

    @property
    def vlm(self) -> VLM:
        """Return the model that samples."""
        return self.sampler.vlm

    def metadata(self) -> dict:
        """Return what the file of pairs depends on, to compare when a run is resumed."""
        settings = {"keep": self.share, "by_score": self.scorer.name, "seed": self.seed}
        return self.sampler.metadata() | settings | self.scorer.metadata()

    def pairs(self, records: list[Record]) -> list[dict]:
        """Return a preference pair for each record."""
        # 1. Sample the pairs, and find those that one can learn from, by their indices.
        pairs = self.sampler.pairs(records)
        usable = [i for i, pair in enumerate(pairs) if has_usable_rejected(pair)]

        # 2. Score these.
        usable_records = [records[i] for i in usable]
        texts = [[pairs[i]["chosen"], pairs[i]["rejected"]] for i in usable]
        scores = self.scorer.score(usable_records, texts)  # (n, 2), as the texts
        for i, (chosen_score, rejected_score) in zip(usable, scores, strict=True):
            pairs[i] |= score_fields(records[i], chosen_score, rejected_score)
            pairs[i]["scored_by"] = self.scorer.name
        return pairs


def has_usable_rejected(pair: dict) -> bool:
    """Return whether the rejected response of a pair says something, and not what was chosen."""
    return pair["rejected"].strip() not in ("", pair["chosen"].strip())


def score_fields(record, chosen_score, rejected_score) -> dict:
    """Return the fields for the scores of a pair. Its own score is the margin between the two.

    Raises InputError if they are not finite.
    """
    margin = chosen_score - rejected_score
    check(
        math.isfinite(margin),
        f"{record.location}: the scores {chosen_score} and {rejected_score} of its responses "
        "are not finite; give --by-score a model that was trained to the end",
    )
    return {
        "score": round(margin, SCORE_DECIMALS),
        "score_chosen": round(chosen_score, SCORE_DECIMALS),
        "score_rejected": round(rejected_score, SCORE_DECIMALS),
    }


def best_pairs(pairs: list[dict], share: float, seed: int) -> list[int]:
    """Return the indices of the best `share` of the pairs that have a score, in their order.

    Their number is rounded to a whole one, and is at least 1. Of pairs with the same score a hash
    of the seed and the pair decides, so the order of the pairs does not matter.
    """

    def sort_key(i):
        """Return what pair i is sorted by: the highest score comes first."""
        return -pairs[i]["score"], tie_break(pairs[i], seed)

    scored = [i for i, pair in enumerate(pairs) if "score" in pair]
    num_kept = max(1, round(share * len(scored)))
    ranked = sorted(scored, key=sort_key)
    return sorted(ranked[:num_kept])  # in the order of the pairs again


def tie_break(pair: dict, seed: int) -> str:
    """Return a hash that orders pairs of the same score, differently for each seed."""
    # No other fields: what a sampler notes, such as similarities, may differ in the last bits.
    content = [pair.get(name) for name in ("id", "image", "prompt", "chosen", "rejected")]
    return hashlib.sha256(json.dumps([seed, content]).encode()).hexdigest()


def sample_best_pairs(
    sampler: ScoringSampler, records: list[Record], path, *, group_size: int, resume: bool = False
) -> tuple[list[Record], list[dict]]:
    """Sample pairs for all records, and write the best of them to `path` as JSONL, in their order.

    The other pairs go to a second file, which `dropped_path` names. Returns the records of the kept
    pairs, and these pairs. A run that was interrupted resumes as `sample_pair_file` does.
    """
    # 1. Sample and score.
    pairs = sample_in_groups(sampler, records, path, group_size=group_size, resume=resume)
    num_scored = sum("score" in pair for pair in pairs)
    check(
        num_scored > 0,
        f"{path}: none of {len(pairs)} pairs has a usable rejected response, so there is none to "
        "keep; give other data, or sample in another way",
    )

    # 2. Choose, by indices. The dropped pairs include those without a score.
    kept = best_pairs(pairs, sampler.share, sampler.seed)
    dropped = sorted(set(range(len(pairs))) - set(kept))
    kept_pairs = [pairs[i] for i in kept]
    kept_records = [records[i] for i in kept]
    dropped_pairs = [pairs[i] for i in dropped]

    # 3. Write. The file of the kept pairs comes last, because it says that the work is finished.
    destination = ""  # of the dropped pairs, for the message
    if dropped_pairs:
        write_jsonl(dropped_path(path), dropped_pairs)
        destination = f" to {dropped_path(path)}"
    write_jsonl(path, kept_pairs)
    remove_unfinished(path)

    # 4. Say what was kept.
    lowest_score = min(pair["score"] for pair in kept_pairs)
    print_message(
        f"{len(kept_pairs)} pairs kept of {num_scored} with a usable rejected response, "
        f"the lowest score is {lowest_score} by {sampler.scorer.name}; "
        f"{len(dropped_pairs)} dropped{destination}"
    )
    return kept_records, kept_pairs


def dropped_path(path) -> Path:
    """Return the file for the dropped pairs: pairs.dropped.jsonl beside pairs.jsonl."""
    path = Path(path)
    return path.with_name(f"{path.stem}.dropped{path.suffix}")
