"""One function per method: how a step comes by its responses, and what it minimises."""

from dataclasses import replace

import torch

from minialign.data.chat_templates import encode_response
from minialign.methods.base import add_reference_logps
from minialign.methods.responses import generate_responses, response_text
from minialign.pairs.distortion import predict_under_noise
from minialign.utils.distributed import map_across_ranks
from minialign.utils.seeding import seeded_generator


def collect_online(policy, vlm, annotator, sampling, mix=0.0):
    """How Online-DPO collects (Sec. 2.3): two responses of the current policy, ranked by an annotator; ties are left out.

    With `mix` = p each example keeps its own offline pair with probability p: Mixed-DPO (Eq. 4).
    """

    def collect(batch, step):
        """Pairs of this step's policy."""
        offline = [
            bool(
                torch.rand(
                    1, generator=seeded_generator(sampling.seed, example.record.id, step, "mix")
                )
                < mix
            )
            for example in batch
        ]
        fresh = [example for example, kept in zip(batch, offline) if not kept]
        both = [own for (own,) in generate_responses(vlm, fresh, 2, sampling, step)]
        texts = [[response_text(vlm, ids).strip() for ids in own] for own in both]
        differing = [i for i, (a, b) in enumerate(texts) if a != b]
        first, second = ([texts[i][side] for i in differing] for side in (0, 1))
        verdicts = dict(
            zip(differing, annotator.compare([fresh[i].record for i in differing], first, second))
        )
        # Verdict 1 is for the second response, which then comes first; a tie is left out.
        ranked = [
            replace(fresh[i], responses=both[i][::-1] if verdicts[i] else both[i])
            for i in differing
            if verdicts[i] is not None
        ]
        add_reference_logps(policy, vlm, ranked)
        means = {
            "same": (len(fresh) - len(differing)) / max(1, len(fresh)),
            "tied": (len(differing) - len(ranked)) / max(1, len(fresh)),
            "offline": sum(offline) / len(batch),
        }
        return [example for example, kept in zip(batch, offline) if kept] + ranked, means

    return collect


def collect_online_bdhs(policy, vlm, sampler):
    """How online BDHS collects: the rejected response is sampled anew from the current policy; those equal to the chosen, or too long, are left out.

    Examples with two responses keep both, the sampled one last (Eq. 5).
    """

    def collect(batch, step):
        """The batch with rejected responses of this step's policy."""
        pairs = map_across_ranks(
            [example.record for example in batch], lambda own: sampler.pairs(own, step)
        )
        rejected = [
            encode_response(vlm.tokenizer, vlm.template, pair["rejected"]) for pair in pairs
        ]
        found = [
            replace(example, responses=[*example.responses, ids])
            for example, pair, ids in zip(batch, pairs, rejected)
            if pair["rejected"] not in ("", pair["chosen"])
            and len(ids) <= vlm.max_response_tokens(example.record, example.prompt_ids)
        ]
        add_reference_logps(policy, vlm, found)
        return found, {
            "rounds": sum(pair["rounds"] for pair in pairs) / len(pairs),
            "same": 1 - len(found) / len(batch),
        }

    return collect


def collect_distortion(policy, vlm, noise, seed):
    """How the distortion of Sec. 3.3 collects: [y+, y-, y~-], where y~- are the policy's tokens under a noisy picture.

    They are scored under the clean picture, each in the context of y+; policy and reference both score the policy's.
    """

    def collect(batch, step):
        """The batch with the tokens of this step's policy under this step's noise."""
        chosen = [example.responses[0] for example in batch]

        def predicted(own):
            """Their tokens under noise."""
            generators = [
                seeded_generator(seed, example.record.id, step, "noise") for example in own
            ]
            return predict_under_noise(
                vlm,
                [example.prompt_ids for example in own],
                [example.record.paths for example in own],
                [example.responses[0] for example in own],
                noise_steps=noise,
                generators=generators,
            )

        tokens = map_across_ranks(batch, predicted)
        found = [
            replace(
                example,
                responses=[*example.responses, right],
                scored_ids=[*example.responses, wrong],
            )
            for example, right, wrong in zip(batch, chosen, tokens)
        ]
        add_reference_logps(policy, vlm, found)
        changed = [a != b for right, wrong in zip(chosen, tokens) for a, b in zip(right, wrong)]
        return found, {"changed": sum(changed) / len(changed)}

    return collect
