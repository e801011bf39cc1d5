"""Conditional preference optimization, mDPO: pairs of images beside pairs of responses.

Published beside the paper (arXiv 2406.11839). DPO can be satisfied by a model that compares the two
responses and never looks at the image. So mDPO adds two losses of the chosen response alone
(neighbor_losses.py): it must be likelier with the image than with a damaged one, and likelier than
it was before training.
"""

from dataclasses import dataclass, field

import torch

from minialign.data.packing import PackedExample
from minialign.logprobs import MAX_TOKENS, response_logps
from minialign.losses import pair_loss
from minialign.methods.base import microbatches
from minialign.methods.preference import PreferenceMethod
from minialign.models.loading import VLM
from minialign.models.policy import Policy
from minialign.neighbor_losses import anchor_loss, conditional_loss
from minialign.pairs.distortion import noisy_image_features
from minialign.utils.distributed import gather_results, local_share
from minialign.utils.seeding import seeded_generator


@dataclass(frozen=True)
class ImageDamage:
    """How an image is damaged: most of its tokens are left out, or it gets noise.

    The authors of mDPO keep a random crop of at most 20 % of the image. Leaving out tokens takes
    away as much, and makes the second sequence of an example short.
    """

    share: float = 0.9  # probability that an image token is left out
    noise_steps: int = 0  # if not 0, the image gets noise of so many steps and keeps all tokens
    seed: int = 0

    def pack(self, vlm: VLM, example, step) -> PackedExample:
        """Pack the chosen response after the damaged image.

        The damage depends on (seed, record id, step) alone. So policy and reference see the same
        image.
        """
        record = example.record
        chosen = [example.responses[0]]
        generator = seeded_generator(self.seed, record.id, step, "damage")
        if self.noise_steps:
            features = noisy_image_features(vlm, record.paths, self.noise_steps, generator)
            return PackedExample.of(example.prompt_ids, features, chosen)
        draws = torch.rand(example.num_image_tokens, generator=generator)
        visible = (draws >= self.share).nonzero().flatten().tolist()
        features = vlm.encode_images(record.paths)
        return PackedExample.of(example.prompt_ids, features, chosen, visible)


@dataclass
class DamagedReference:
    """The reference's log-prob of y+ with the damaged image, and the step that damaged it."""

    step: int  # the training step, on which the damage depends
    ref_chosen_logp: float  # log ref(y+|damaged image), summed over tokens


@dataclass
class MdpoMethod(PreferenceMethod):
    """mDPO on preference pairs.

    loss = DPO(y+, y-) + conditional loss + anchor loss

    One packed sequence holds y+ and y- with the image. A second one holds y+ with the damaged
    image, which is short where image tokens are left out and has its full length with
    --damage-noise. --tokens-per-microbatch counts the first one only.
    """

    policy: Policy = field(kw_only=True)
    damage: ImageDamage = field(kw_only=True)

    def collect(self, batch, step):
        """Return the pairs of a step, each with log ref(y+|damaged image)."""
        examples, metrics = super().collect(batch, step)
        self.add_damaged_images(examples, step)
        return examples, metrics

    def add_damaged_images(self, examples, step):
        """Set `damaged` of every example. The processes share the examples."""
        micro_batches = microbatches(examples, MAX_TOKENS)
        local_logps = []
        with self.policy.reference() as reference_model:
            for micro_batch in local_share(micro_batches):
                rows = [self.damage.pack(self.vlm, example, step) for example in micro_batch]
                logps, _ = response_logps(reference_model, rows)  # (B, 1)
                local_logps.append(logps[:, 0].tolist())
        gathered_logps = gather_results(local_logps, num_items=len(micro_batches))
        for micro_batch, logps_of_batch in zip(micro_batches, gathered_logps, strict=True):
            for example, logp in zip(micro_batch, logps_of_batch, strict=True):
                example.damaged = DamagedReference(step, logp)

    def loss(self, micro_batch, batch):
        """Return this micro-batch's share of the mean loss over the pairs of the batch."""
        # 1. DPO on the pairs.
        pairs_of_rejected = self.score_pairs(micro_batch)
        loss, metrics = self.mean_loss(pairs_of_rejected, batch)

        # 2. The log ratios of y+ with the image and with the damaged one, (B,).
        pairs = pairs_of_rejected[0]  # y+ is the same in all of them
        log_ratios = pairs.policy_chosen_logps - pairs.ref_chosen_logps
        damaged_log_ratios = self.damaged_log_ratios(micro_batch)

        # 3. The losses of y+ alone.
        conditional_losses = conditional_loss(log_ratios, damaged_log_ratios, self.beta)
        anchor_losses = anchor_loss(log_ratios, self.beta)
        loss = loss + (conditional_losses + anchor_losses).sum() / len(batch)

        # 4. How much more the image raises y+ than the damaged one does, as a reward.
        image_margins = self.beta * (log_ratios - damaged_log_ratios).detach()
        metrics["image_margin"] = float(image_margins.sum()) / len(batch)
        return loss, metrics

    def damaged_log_ratios(self, micro_batch):
        """Return log pi(y+|damaged image) - log ref(y+|damaged image) of each example, (B,)."""
        rows = []
        ref_logps = []
        for example in micro_batch:
            rows.append(self.damage.pack(self.vlm, example, example.damaged.step))
            ref_logps.append(example.damaged.ref_chosen_logp)
        policy_logps, _ = response_logps(self.vlm.model, rows)  # (B, 1)
        return policy_logps[:, 0] - policy_logps.new_tensor(ref_logps)

    def losses_of_pairs(self, pairs, batch):
        """Return the DPO loss of each pair."""
        return pair_loss("dpo", pairs, self.beta)
