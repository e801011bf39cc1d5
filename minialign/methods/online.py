"""Collect preference pairs from the current policy: Online-DPO, online BDHS and image distortion.

A collector has one method, `collect(batch, step)`. It returns the pairs of a step, each with the
reference's log-probs, and metrics of how they came about. It leaves out the records that gave
nothing to learn from, and the metrics count them.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch

from minialign.data.chat_templates import decode_response, encode_response
from minialign.generation.decoding import SamplingParams
from minialign.methods.base import Example, add_reference_logps
from minialign.methods.responses import generate_responses
from minialign.models.loading import VLM
from minialign.models.policy import Policy
from minialign.pairs.bdhs import BdhsSampler
from minialign.pairs.distortion import predict_under_noise
from minialign.utils.distributed import gather_results, local_share
from minialign.utils.seeding import seeded_generator

ANNOTATOR_METRIC = "annotator: "  # begins the names of the metrics that an annotator counts


@dataclass
class SampledPair:
    """Two responses that the policy sampled for one prompt, as ids and as texts."""

    example: Example
    first_ids: list[int]
    second_ids: list[int]
    first_text: str
    second_text: str

    def ranked_by(self, verdict):
        """Return the example with these responses, the better one first. Verdict 1: the second."""
        if verdict == 1:
            responses = [self.second_ids, self.first_ids]
        else:
            responses = [self.first_ids, self.second_ids]
        return replace(self.example, responses=responses)


@dataclass
class OnlinePairs:
    """Two responses of the current policy, ranked by an annotator: Online-DPO (Sec. 2.3).

    With `mix` = p every example keeps the pair of the data with probability p: Mixed-DPO (Eq. 4).
    """

    policy: Policy
    vlm: VLM
    annotator: object  # one of pairs/annotators.py
    sampling: SamplingParams
    mix: float = 0.0

    def collect(self, batch, step):
        """Return the pairs of a step, without prompts whose responses are equal or tied."""
        # 1. Mixed-DPO keeps some pairs of the data. The other prompts get new responses.
        offline_pairs = []
        prompts = []
        for example in batch:
            if self.keeps_offline_pair(example, step):
                offline_pairs.append(example)
            else:
                prompts.append(example)

        # 2. Two responses of the current policy to each prompt.
        sampled_pairs = self.sample_two_responses(prompts, step)

        # 3. The annotator says which is better: 0 (the first), 1 (the second) or None (a tie).
        verdicts, annotator_counts = self.rank(sampled_pairs)

        # 4. Preference pairs, the better response first, with the reference's log-probs.
        online_pairs = []
        for sampled_pair, verdict in zip(sampled_pairs, verdicts, strict=True):
            if verdict is not None:
                online_pairs.append(sampled_pair.ranked_by(verdict))
        add_reference_logps(self.policy, self.vlm, online_pairs)

        num_prompts = max(1, len(prompts))
        metrics = {
            "same": (len(prompts) - len(sampled_pairs)) / num_prompts,
            "tied": (len(sampled_pairs) - len(online_pairs)) / num_prompts,
            "offline": len(offline_pairs) / len(batch),
            **annotator_counts,
        }
        return offline_pairs + online_pairs, metrics

    def keeps_offline_pair(self, example, step):
        """Draw alpha of Eq. 4, which depends on (seed, record id, step) alone."""
        generator = seeded_generator(self.sampling.seed, example.record.id, step, "mix")
        return bool(torch.rand(1, generator=generator) < self.mix)

    def sample_two_responses(self, prompts, step):
        """Sample two responses to each prompt. Leave out prompts that gave the same text twice."""
        responses = generate_responses(self.vlm, prompts, 2, sampling=self.sampling, step=step)
        tokenizer = self.vlm.tokenizer
        template = self.vlm.template
        sampled_pairs = []
        for example, (first_ids, second_ids) in zip(prompts, responses, strict=True):
            # Responses that differ only in the white space around them are the same.
            first_text = decode_response(tokenizer, template, first_ids).strip()
            second_text = decode_response(tokenizer, template, second_ids).strip()
            if first_text != second_text:
                sampled_pairs.append(
                    SampledPair(example, first_ids, second_ids, first_text, second_text)
                )
        return sampled_pairs

    def rank(self, sampled_pairs):
        """Return the annotator's verdicts, and what it counted meanwhile as metrics for the log."""
        counts_before = Counter(self.annotator.counters)
        records = [sampled_pair.example.record for sampled_pair in sampled_pairs]
        first_texts = [sampled_pair.first_text for sampled_pair in sampled_pairs]
        second_texts = [sampled_pair.second_text for sampled_pair in sampled_pairs]
        verdicts = self.annotator.compare(records, first_texts, second_texts)
        metrics = {}
        for name, count in self.annotator.counters.items():
            metrics[ANNOTATOR_METRIC + name] = count - counts_before[name]
        return verdicts, metrics


@dataclass
class OnlineBdhsPairs:
    """A rejected response sampled from the current policy with the image masked: online BDHS.

    It is added as the last response. An example that has a rejected response of the data keeps it
    (Eq. 5).
    """

    policy: Policy
    vlm: VLM
    sampler: BdhsSampler

    def collect(self, batch, step):
        """Return the pairs of a step, without those whose sampled response is unusable."""
        # 1. Sample with the current policy (Alg. 1). The processes share the records.
        records = [example.record for example in local_share(batch)]
        local_pairs = []
        if records:
            local_pairs = self.sampler.pairs(records, step)
        bdhs_pairs = gather_results(local_pairs, num_items=len(batch))

        # 2. Add the rejected responses to the examples.
        examples = []
        for example, bdhs_pair in zip(batch, bdhs_pairs, strict=True):
            rejected_ids = self.usable_rejected_ids(example, bdhs_pair)
            if rejected_ids is not None:
                responses = [*example.responses, rejected_ids]
                examples.append(replace(example, responses=responses))

        # 3. The reference's log-probs, for the loss.
        add_reference_logps(self.policy, self.vlm, examples)

        total_rounds = sum(bdhs_pair["rounds"] for bdhs_pair in bdhs_pairs)
        metrics = {
            "rounds": total_rounds / len(bdhs_pairs),
            "same": 1 - len(examples) / len(batch),  # empty and too long ones included
        }
        return examples, metrics

    def usable_rejected_ids(self, example, bdhs_pair):
        """Return a rejected response's ids, or None if it is empty, too long or the chosen one."""
        rejected = bdhs_pair["rejected"]
        if rejected in ("", bdhs_pair["chosen"]):
            return None
        rejected_ids = encode_response(self.vlm.tokenizer, self.vlm.template, rejected)
        max_tokens = self.vlm.max_response_tokens(example.record.paths, example.prompt_ids)
        if len(rejected_ids) > max_tokens:
            return None
        return rejected_ids


@dataclass
class DistortionPairs:
    """A second rejected response y~-: what the policy predicts under a noisy image (Sec. 3.3).

    Its token t is predicted from the noisy image and the true tokens of y+ before t (teacher
    forcing). One pass over y+ thus predicts all of them.
    """

    policy: Policy
    vlm: VLM
    noise_steps: int
    seed: int

    def collect(self, batch, step):
        """Return the examples with three responses each: y+, y- of the data, and y~-."""
        # 1. Predict the tokens of y~-. The processes share the examples.
        local_predictions = self.predict(local_share(batch), step)
        predictions = gather_results(local_predictions, num_items=len(batch))

        # 2. Add them to the examples. The third response reads y+ again, and is scored at the
        #    predicted ids: log p(y~-_t | image, prompt, y+_<t). A predicted token is judged in the
        #    context that it was predicted in. The predicted tokens were not made to follow each
        #    other, so together they are not a sentence that the policy would write.
        examples = []
        for example, predicted_ids in zip(batch, predictions, strict=True):
            chosen_ids = example.responses[0]
            with_prediction = replace(
                example,
                responses=[*example.responses, chosen_ids],
                scored_ids=[*example.responses, predicted_ids],
            )
            examples.append(with_prediction)

        # 3. Policy and reference both score these ids, with the clean image.
        add_reference_logps(self.policy, self.vlm, examples)
        return examples, {"changed": share_of_changed_tokens(examples)}

    def predict(self, examples, step):
        """Return the ids that the policy predicts for each example under this step's noise."""
        if not examples:
            return []
        prompts = []
        image_paths = []
        chosen_responses = []
        generators = []
        for example in examples:
            prompts.append(example.prompt_ids)
            image_paths.append(example.record.paths)
            chosen_responses.append(example.responses[0])
            # The noise depends on (seed, record id, step) alone, not on the other examples.
            generators.append(seeded_generator(self.seed, example.record.id, step, "noise"))
        return predict_under_noise(
            self.vlm,
            prompts,
            image_paths,
            chosen_responses,
            noise_steps=self.noise_steps,
            generators=generators,
        )


def share_of_changed_tokens(examples):
    """Return the share of tokens of y+ that are another token in y~-."""
    num_tokens = 0
    num_changed = 0
    for example in examples:
        chosen_ids = example.scored_ids[0]
        predicted_ids = example.scored_ids[-1]
        for chosen_id, predicted_id in zip(chosen_ids, predicted_ids, strict=True):
            num_tokens += 1
            num_changed += chosen_id != predicted_id
    return num_changed / num_tokens
