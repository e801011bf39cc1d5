"""A DPO step (forward, loss, backward) on the same pairs, weights and LoRA adapter, side by side in one process.

ours   one row a pair, head at response positions in chunks. Warm: tower features and reference log-probs at hand, as in training where the
       features of all pictures fit Subject's budget; reference: its log-probs at hand, tower inside the step; cold: both inside.
naive  chosen and rejected as two whole padded sequences, each with its picture and prompt, logits and log-softmax at every position;
       warm and cold as ours.
TRL    TRL's own DPOTrainer.training_step around transformers + PEFT, adapter switched off for the reference, no gradient checkpointing;
       batches are made beforehand, as ours are. As it is, tower and reference run in every step: TRL refuses precomputed reference
       log-probs for pictures and keeps no features: ours cold is its match. "reference given" hands it the log-probs all the same, by
       the switch it has for text; its tower still runs: ours with the reference is its match. On a CPU TRL applies the head at every
       position, on CUDA at response positions alone: here both.
       On a CPU much of naive's time goes into fresh pages for its logits; MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
       in front of the command (glibc) keeps the pages and leaves the arithmetic, as CUDA's allocator does.
Losses are compared over several AdamW steps of each side's own, log-probs and gradients at step 0 (adapter B is not zero there); with
--dtype bfloat16 ours also with ours in float32, on the same weights. On CUDA the table has each side's peak of memory above what lies
there between steps: weights, adapters, gradients.
Sides other than ours whose names match the regular expression --skip are left out; where it matches "TRL", TRL is not even loaded.
"""

import copy
import re
import statistics
import tempfile
from contextlib import nullcontext
from functools import partial

import torch
from common import (
    alternate,
    heading,
    make_model,
    make_pairs,
    matmul_ceiling,
    parse,
    ratio,
    step_flops,
    write,
)
from peers import compact_head, missing, peer_model, peer_name, trainer_of, trl_batch

from minialign.data.packing import PackedExample, pack
from minialign.logprobs import response_logps
from minialign.losses import dpo_loss, log_ratio_margin
from minialign.models.llava import hidden_states
from minialign.models.policy import Policy

HEAD = ", head as on CUDA"


def make_policy(options, model):
    """LoRA on the decoder and a trained projector; B is drawn too, so that policy and reference differ."""
    policy = Policy(model, options.rank, 2 * options.rank)
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=0.01)
    return policy


def naive_logps(model, pairs, features):
    """Summed log-probs (B, 2), each response behind a whole prompt of its own, log-softmax over all positions."""
    rows = [
        PackedExample.of(pair.prompt, [feature], [response])
        for pair, feature in zip(pairs, features)
        for response in pair.responses
    ]
    batch = pack(model, rows)
    logps = torch.log_softmax(
        (hidden_states(model, batch) @ model.vocab_head.T).float(), -1
    )  # (2B, T, V)
    picked = logps.gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0]
    return (picked * (batch.targets != -100)).sum(1).view(-1, 2)


def row_logps(model, pairs, features):
    """Summed log-probs (B, k), one row a pair."""
    return response_logps(
        model,
        [
            PackedExample.of(pair.prompt, [feature], pair.responses)
            for pair, feature in zip(pairs, features)
        ],
    )[0]


class Ours:
    """A step of this package, or the naive one; `known` names what is at hand: all when warm, the reference's log-probs, or nothing when cold."""

    def __init__(self, policy, pairs, logps=row_logps, known="warm", copies=1):
        self.policy, self.pairs, self.logps, self.known, self.copies = (
            policy,
            pairs,
            logps,
            known,
            copies,
        )
        self.features = self.encode_images()
        self.reference = None if known == "cold" else self.refer()

    def encode_images(self):
        """Tower features; the naive way looks at a pair's picture twice, once for each of its sequences."""
        return self.policy.model.encode_images(
            [pair.picture for pair in self.pairs for _ in range(self.copies)]
        )[:: self.copies]

    def refer(self):
        """The reference's log-probs."""
        with self.policy.reference() as model:
            return self.logps(model, self.pairs, self.features)

    def __call__(self):
        """The loss, its gradients on the parameters."""
        self.policy.model.zero_grad()
        if self.known != "warm":
            self.features = self.encode_images()
        reference = self.refer() if self.known == "cold" else self.reference
        logps = self.logps(self.policy.model, self.pairs, self.features)
        loss = torch.stack(
            [
                dpo_loss(
                    log_ratio_margin(
                        policy_chosen_logps=logps[:, 0],
                        policy_rejected_logps=logps[:, other],
                        ref_chosen_logps=reference[:, 0],
                        ref_rejected_logps=reference[:, other],
                    ),
                    beta=0.1,
                )
                for other in range(1, logps.shape[1])
            ]
        ).mean()
        loss.backward()
        return loss.detach()


class TRL:
    """A step of TRL's trainer; `reference`: log-probs (2, B) handed to it, `compact`: the head as on CUDA."""

    def __init__(self, trainer, batch, reference=None, compact=False):
        self.trainer, self.batch, self.context = (
            trainer,
            batch,
            compact_head if compact else nullcontext,
        )
        self.given = (
            {}
            if reference is None
            else dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference))
        )

    def __call__(self):
        """The loss, its gradients on the parameters."""
        self.trainer.model.zero_grad()
        self.trainer.precompute_ref_logps = bool(self.given)
        with self.context():
            return self.trainer.training_step(self.trainer.model, self.batch | self.given)

    @torch.no_grad()
    def logps(self):
        """The policy's summed log-probs (B, 2), as its loss takes them."""
        batch = {name: tensor for name, tensor in self.batch.items() if name != "completion_mask"}
        labels = batch["input_ids"].masked_fill(self.batch["completion_mask"] == 0, -100)
        with self.context():
            return (
                self.trainer.model(**batch, labels=labels, fused_lm_head=True, use_cache=False)
                .log_probs.sum(1)
                .view(2, -1)
                .T
            )


def agreement(ours, other, theirs, steps):
    """How far two sides are apart: gradients at step 0 (relative L2) and losses over AdamW steps of each side's own; all weights are put back."""
    mine = {name: parameter for name, parameter in ours.policy.parameters().items()}
    sides = [(ours, list(mine.values())), (other, [theirs[peer_name(name)] for name in mine])]
    kept = [[parameter.detach().clone() for parameter in parameters] for _, parameters in sides]
    losses, gradients = [], []
    for side, parameters in sides:
        optimiser, own = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0), []
        for step in range(steps):
            own.append(float(side()))
            if not step:
                gradients.append(
                    torch.cat([parameter.grad.flatten().double() for parameter in parameters])
                )
            optimiser.step()
        losses.append(own)
    for (_, parameters), before in zip(sides, kept):
        for parameter, value in zip(parameters, before):
            parameter.data.copy_(value)
    return {
        "loss_difference": max(abs(a - b) for a, b in zip(*losses)),
        "losses": losses,
        "gradient_difference": float((gradients[0] - gradients[1]).norm() / gradients[0].norm()),
    }


def rounding(policy, pairs):
    """What bfloat16 costs: our log-probs, loss and gradients beside those of the same weights in float32."""
    exact = copy.deepcopy(policy)
    exact.model.float()
    sides = [Ours(policy, pairs), Ours(exact, pairs)]
    with torch.no_grad():
        rough, fine = (row_logps(side.policy.model, pairs, side.features) for side in sides)
    losses = [float(side()) for side in sides]
    mine, other = (
        torch.cat([p.grad.flatten().double() for p in side.policy.parameters().values()])
        for side in sides
    )
    lengths = torch.tensor([list(map(len, pair.responses)) for pair in pairs], device=rough.device)
    found = {
        "logp_per_token": float(((rough - fine).abs() / lengths).max()),
        "loss": abs(losses[0] - losses[1]),
        "gradient": float((mine - other).norm() / other.norm()),
    }
    print(
        f"bfloat16 and float32, ours: log-probs within {found['logp_per_token']:.1e} nats a token, loss within {found['loss']:.1e}, gradient within {found['gradient']:.1e} of its length"
    )
    return found


def peak_of(side):
    """Bytes on the GPU at the peak of a step above those before it."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    return torch.cuda.max_memory_allocated() - before


def peer_sides(options, policy, peer, pairs, folder):
    """How TRL's sides are made, and how far TRL is from ours, printed."""
    trainer, batch, cuda = (
        trainer_of(options, peer, policy, folder),
        trl_batch(options, pairs),
        options.device == "cuda",
    )
    given = TRL(
        trainer, batch, trainer.compute_ref_log_probs(trainer.model, batch), compact=not cuda
    )
    sides = {
        "TRL as it is": partial(TRL, trainer, batch),
        "TRL, reference given" + HEAD * (not cuda): lambda: given,
    }
    sides |= {} if cuda else {"TRL" + HEAD: partial(TRL, trainer, batch, compact=True)}
    ours = Ours(policy, pairs)
    found = agreement(ours, given, dict(trainer.model.named_parameters()), options.steps)
    with torch.no_grad():
        a, b = row_logps(policy.model, pairs, ours.features), given.logps()
    allowed = torch.maximum(
        1e-6 * a.abs(),
        torch.tensor(
            [[1e-5 * len(response) for response in pair.responses] for pair in pairs],
            device=a.device,
        ),
    )
    found |= {
        "logp_difference": float((a - b).abs().max()),
        "logp_share_of_tolerance": float(((a - b).abs() / allowed).max()),
    }
    print(
        f"ours and TRL: losses of {options.steps} steps within {found['loss_difference']:.1e}; log-probs within {found['logp_difference']:.1e} nats, "
        f"{found['logp_share_of_tolerance']:.2f} of the tolerance; gradients at step 0 within {found['gradient_difference']:.1e} of their length",
        flush=True,
    )
    return sides, found


def show(options, sides, seconds, flops):
    """The table; on CUDA with pairs a second, the share of a large product's speed that the step's arithmetic reaches, and its memory."""
    figures, ceiling = {}, matmul_ceiling(options) if options.device == "cuda" else None
    print(
        f"{'times ours:':>56}\n{'side':36}{'ms a step':>10}{'warm':>10}{'reference':>11}{'cold':>10}"
        + f"{'pairs/s':>10}{'of peak':>9}{'memory':>11}" * bool(ceiling)
    )
    for name, values in seconds.items():
        over = {
            known: ratio(seconds, name, f"ours, {known}") for known in ("warm", "reference", "cold")
        }
        own = figures[name] = {"seconds": statistics.median(values), "times_ours": over}
        line = f"{name:36}{1000 * own['seconds']:10.0f}{over['warm']:9.2f}x{over['reference']:10.2f}x{over['cold']:9.2f}x"
        if ceiling:
            own |= {
                "pairs_per_second": options.pairs / own["seconds"],
                "utilisation": flops / own["seconds"] / ceiling,
                "peak_bytes": peak_of(sides[name]),
            }
            line += f"{own['pairs_per_second']:10.2f}{own['utilisation']:9.1%}{own['peak_bytes'] / 1e9:8.1f} GB"
        print(line)
    if ceiling:
        print(
            f"peak: {ceiling / 1e12:.0f} TFLOP/s in a product of 8192; the arithmetic counted is that of the warm row ({flops / 1e12:.1f} TFLOP), for every side"
        )
    return {"sides": figures, "step_flops": flops, "matmul_flops": ceiling}


def main():
    options = parse(__doc__, steps=4, skip="")
    model, pairs, absent = (
        make_model(options),
        make_pairs(options),
        missing("transformers", "peft", "trl", "datasets"),
    )
    skipped = bool(options.skip and re.search(options.skip, "TRL"))
    peer = None if absent or skipped else peer_model(options, model)
    policy, found = make_policy(options, model), {}
    exact = rounding(policy, pairs) if options.dtype == "bfloat16" else None
    sides = {
        f"{name}, {known}": partial(Ours, policy, pairs, logps, known, copies)
        for name, logps, copies in (("ours", row_logps, 1), ("naive", naive_logps, 2))
        for known in ("warm", "reference", "cold")
    }
    print(heading(options))
    with tempfile.TemporaryDirectory() as folder:
        if absent:
            print(f"TRL is left out: {', '.join(absent)} not installed")
        elif not skipped:
            more, found = peer_sides(options, policy, peer, pairs, folder)
            sides |= more
        sides = {
            name: make()
            for name, make in sides.items()
            if name.startswith("ours") or not (options.skip and re.search(options.skip, name))
        }
        losses, seconds = alternate(sides, options)
    losses = {name: float(loss) for name, loss in losses.items()}
    print(
        f"losses of all sides within {max(losses.values()) - min(losses.values()):.1e} of each other"
    )
    figures = show(options, sides, seconds, step_flops(options, pairs))
    write(options, figures | {"losses": losses, "agreement": found, "bfloat16": exact})


if __name__ == "__main__":
    main()
