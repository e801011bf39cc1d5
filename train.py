"""Align a LLaVA-type model and measure hallucination before and after.

python train.py                                   the shipped tiny LLaVA on its own BDHS pairs, by data/tiny/recipe.json
python train.py --method rloo                     another method of the study on the same model
python train.py --model DIR --data FILE --images DIR --out DIR
"""

import argparse
import hashlib
import math
import platform
import random
import resource
import shutil
import sys
import time
from pathlib import Path

import torch

import minialign
from minialign.data.images import check_images
from minialign.data.records import read_records
from minialign.evaluation.evaluation_sets import read_folder
from minialign.evaluation.report import evaluate_set, results_table
from minialign.losses import PAIR_LOSSES
from minialign.methods import base as methods_base
from minialign.methods.online import collect_distortion, collect_online, collect_online_bdhs
from minialign.methods.policy_gradient import ppo_method, reward_statistics, rloo_method
from minialign.methods.preference import (
    collect_offline,
    preference_method,
    reward_model_method,
    sft_method,
)
from minialign.models.adapters import save_adapter
from minialign.models.checkpoint import fingerprint, open_tensors, save_model, save_tensors
from minialign.models.loading import load_vlm
from minialign.models.policy import Policy, scalar_head
from minialign.options import add_data_options, add_model_options, add_sampling_options
from minialign.pairs import bdhs, similarity
from minialign.pairs import reward_model as reward_models
from minialign.pairs.annotators import (
    GroundTruthAnnotator,
    RewardAnnotator,
    load_annotator,
    pair_accuracy,
)
from minialign.pairs.pair_files import check_pairs, sample_pair_file
from minialign.training.loop import Schedule, train
from minialign.utils import distributed
from minialign.utils.cli import Parser, new_folder, number_type, run_script
from minialign.utils.files import (
    InputError,
    check,
    friendly_errors,
    read_json,
    read_jsonl,
    write_json,
)

TINY = Path(__file__).resolve().parent / "data" / "tiny"
METHODS = (
    "sft",
    "dpo",
    "online-dpo",
    "mixed-dpo",
    "bdhs",
    "online-bdhs",
    "distortion",
    "reward",
    "rloo",
    "ppo",
)
AVERAGED = (
    "bdhs",
    "online-bdhs",
    "distortion",
)  # methods that --gamma may give a second rejected response (Eq. 5)
PAPER = {
    "reward": {"lr": 2e-5, "batch_size": 32, "steps": 4000, "schedule": "constant"},
    "rloo": {"lr": 3e-4, "batch_size": 256, "epochs": 2, "beta": 0.4},
    "ppo": {"lr": 1.41e-5, "batch_size": 32, "schedule": "constant"},
}  # App. A, where it differs from the other methods
NOT_SETTINGS = (
    "resume",
    "out",
    "export",
    "keep_features",
)  # may differ between a run and its continuation


def parse(argv):
    """The options; without --model the defaults are the tiny world's recipe, with it the paper's."""
    parser = Parser(
        prog="train.py",
        description=__doc__.splitlines()[0],
        epilog="The defaults are the tiny world's recipe, with --model the paper's; "
        "some methods have their own, which --method NAME --help tells.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="bdhs",
        help="how a step comes by its responses, and what it learns from them",
    )
    parser.add_argument(
        "--loss", choices=sorted(PAIR_LOSSES), default="dpo", help="the loss on pairs"
    )
    add_data_options(
        parser, "records; for sft, bdhs, online-bdhs and online-dpo supervised ones will do"
    )
    parser.add_argument("--eval", nargs="*", metavar="DIR", help="evaluation folders")
    parser.add_argument(
        "--out", metavar="DIR", help="where results go; none: a new numbered folder under runs/"
    )
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="also write the merged model there, for engines that take no adapter with a projector",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument(
        "--steps", type=number_type(int, 1), help="optimiser steps; none: as many as --epochs makes"
    )
    parser.add_argument(
        "--epochs", type=number_type(int, 1), default=3, help="passes over the data"
    )
    parser.add_argument("--batch-size", type=number_type(int, 1), default=16, help="records a step")
    parser.add_argument(
        "--tokens-per-microbatch",
        type=number_type(int, 1),
        default=4096,
        help="padded slots, picture vectors included, computed together",
    )
    parser.add_argument(
        "--keep-features",
        type=number_type(int, 0),
        default=2048,
        metavar="MB",
        help="memory for what the tower gave of pictures, so that later epochs need not look again",
    )
    parser.add_argument(
        "--checkpoint-layers",
        action="store_true",
        help="keep less of the decoder in memory and compute it twice: about a third more time",
    )
    parser.add_argument(
        "--lr", type=number_type(float, 0, above=True), default=1e-6, help="peak learning rate"
    )
    parser.add_argument(
        "--projector-lr", type=number_type(float, 0), default=2e-6, help="the projector's own"
    )
    parser.add_argument(
        "--beta",
        type=number_type(float, 0, above=True),
        default=0.1,
        help="strength of the reference",
    )
    parser.add_argument(
        "--schedule",
        choices=("cosine", "constant"),
        default="cosine",
        help="of the learning rate after its warm-up",
    )
    parser.add_argument(
        "--lora-rank",
        type=number_type(int, 0, 1 << 16),
        default=128,
        help="0 trains all weights of decoder and projector",
    )
    parser.add_argument(
        "--lora-alpha",
        type=number_type(float, 0, above=True),
        default=256,
        help="LoRA's scale times its rank",
    )
    parser.add_argument(
        "--limit", type=number_type(int, 1), help="a random subset of this many records"
    )
    parser.add_argument(
        "--seed", type=number_type(int, 0, 2**32 - 1), default=0, help="of everything drawn"
    )
    parser.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also train a supervised control on the same chosen responses",
    )
    parser.add_argument(
        "--smoothing",
        type=number_type(float, 0, 0.5),
        default=0.0,
        help="share of pairs whose labels DPO takes to be the wrong way round",
    )
    parser.add_argument(
        "--mix",
        type=number_type(float, 0, 1),
        default=0.5,
        help="mixed-dpo: chance of the offline pair (p of Eq. 4)",
    )
    parser.add_argument(
        "--gamma",
        type=number_type(float, 0, 1),
        help="weight of the data's own rejected response beside the sampled one (Eq. 5); none: .5 for distortion, "
        "else the sampled one alone",
    )
    parser.add_argument(
        "--annotator",
        default="truth",
        metavar="truth|DIR|reward:DIR",
        help="who ranks online: captions.json beside --data, an MLLM, a reward model",
    )
    parser.add_argument(
        "--one-order",
        action="store_true",
        help="ask an MLLM annotator once, not also with the responses swapped (what changes is a tie)",
    )
    parser.add_argument(
        "--reward",
        metavar="DIR",
        help="rloo, ppo: folder of a --method reward run; none: one is trained first, in OUT/reward",
    )
    parser.add_argument(
        "--by",
        choices=("attention", "noise"),
        default="attention",
        help="what hides the picture in bdhs and online-bdhs",
    )
    add_sampling_options(parser)
    parser.add_argument(
        "--temperature",
        type=number_type(float, 0, above=True),
        default=1.0,
        help="of everything sampled",
    )
    parser.add_argument(
        "--top-p", type=number_type(float, 0, 1, above=True), default=1.0, help="nucleus sampling"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=number_type(int, 1, 1 << 16),
        default=256,
        help="of a completion or a whole response",
    )
    return completed(parser, argv)


def completed(parser, argv):
    """The options that `parser` reads, with the defaults of the tiny world or of the paper, by method, and what does not fit together refused."""
    chosen = PAPER
    given = {word.split("=")[0] for word in argv}
    if "--model" not in given:
        recipe = read_json(TINY / "recipe.json")
        chosen = recipe.pop("methods")
        parser.set_defaults(
            **recipe,
            model=str(TINY / "model"),
            eval=[str(TINY / "final" / name) for name in ("typical", "shifted", "balanced")],
        )
    asked = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[
        0
    ]  # whose defaults --help then tells
    parser.set_defaults(**chosen.get(asked.method, {}))
    options = parser.parse_args(argv)
    options.first_reward = chosen.get("reward", {})
    if "--epochs" in given and "--steps" not in given:
        options.steps = None  # the recipe's own give way
    if options.resume and not options.out:
        parser.error("--resume needs --out, the folder to go on with")
    if options.gamma is not None and options.method not in AVERAGED:
        parser.error(
            f"--gamma is for --method {', '.join(AVERAGED)}; {options.method} has one rejected response"
        )
    if options.data is None:
        if Path(options.model).resolve() != TINY / "model":
            parser.error("--model needs --data FILE...")
        options.data = [
            str(
                TINY
                / "train"
                / (
                    "instruct.json"
                    if options.method in methods_base.SUPERVISED and options.gamma is None
                    else "povid.json"
                )
            )
        ]
    if options.method == "distortion" and options.gamma is None:
        options.gamma = 0.5
    return options


def open_out(options):
    """The result folder and whether it is already finished. Raises BadInput where an existing one does not fit."""
    out = Path(
        distributed.map_across_ranks([str(options.out or new_folder())], list)[0]
    )  # the first process's choice
    settings = {key: value for key, value in vars(options).items() if key not in NOT_SETTINGS}
    if options.export and Path(options.export).exists():
        raise InputError(f"{options.export}: exists already; give another --export")
    if options.export and Path(options.export).resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"{options.export}: lies in the run's own folder {out}; give another --export"
        )
    if out.exists() and not options.resume:
        raise InputError(f"{out}: exists already; give another --out, or --resume to go on with it")
    if options.resume and not out.exists():
        print(f"{out}: nothing to go on with; this is a new run", file=sys.stderr)
    if (out / "config.json").exists():
        with friendly_errors(out / "config.json", "start a new --out"):
            before = read_json(out / "config.json", dict)["settings"]
            different = sorted(key for key in settings if before.get(key) != settings[key])
        if different:
            raise InputError(
                f"{out}: was begun with another --{different[0].replace('_', '-')} ({before.get(different[0])!r}, now "
                f"{settings[different[0]]!r}); give the same options, or another --out"
            )
    return out, settings


def fresh_subject(options, kept=None):
    """The checkpoint as it was loaded; `kept`: features that its tower has already given."""
    return load_vlm(
        options.model,
        options.template,
        options.dtype,
        device=options.device,
        feature_cache=kept,
        feature_cache_bytes=options.keep_features << 20,
    )


def checked(options):
    """(subject, records, evaluation sets), everything that can be wrong with the input found before any work."""
    records = read_records(
        options.data, options.images, options.limit, options.seed, options.format
    )
    if (
        options.method in ("dpo", "mixed-dpo", "distortion", "reward")
        or options.gamma is not None
        or options.method in ("rloo", "ppo")
        and not options.reward
    ):
        check_pairs(records, f"--method {options.method}")
    sets = {Path(folder).name: read_folder(folder) for folder in options.eval or []}
    if len(sets) < len(options.eval or []):
        raise InputError(
            f"--eval {' '.join(options.eval)}: two folders have one name, and sets are named by their folder; rename one"
        )
    vlm = fresh_subject(options)
    annotator, _ = annotator_of(options), reward_of(options, options.reward)
    for record in records if isinstance(annotator, GroundTruthAnnotator) else ():
        annotator.annotated_objects(record)
    if options.similarity and "bdhs" in options.method:
        similarity.load_similarity(
            options.similarity, vlm.model, vlm.tokenizer
        )  # for its errors alone, as below
    for record in records:
        methods_base.encode_example(
            vlm, record, [text for text in (record.chosen, record.rejected) if text]
        )
    check_images(path for record in records for path in record.paths)
    return vlm, records, sets


def annotator_of(options):
    """The annotator of an online method, else None."""
    return (
        load_annotator(options, not options.one_order)
        if options.method in ("online-dpo", "mixed-dpo")
        else None
    )


def reward_of(options, folder):
    """The reward model in a folder, else None."""
    return (
        reward_models.load_reward_model(folder, options.model, options.dtype, options.device)
        if folder and options.method in ("rloo", "ppo")
        else None
    )


def texts_of(options, vlm, records, out):
    """(record, responses) of every usable record: its chosen and, where the method wants them, rejected ones; BDHS's are sampled into OUT/pairs.jsonl first."""
    own = options.gamma is not None or options.method in ("dpo", "mixed-dpo", "reward")
    texts = [[record.chosen, record.rejected] if own else [record.chosen] for record in records]
    if options.method == "bdhs":
        path = out / "pairs.jsonl"
        if path.exists():
            pairs = read_jsonl(path)
            with friendly_errors(path, "start a new --out"):
                begun = [(pair["id"], pair["chosen"], type(pair["rejected"])) for pair in pairs]
            if begun != [(record.id, record.chosen, str) for record in records]:
                raise InputError(
                    f"{path}: was sampled for other records than --data now holds; start a new --out"
                )
        else:
            pairs = sample_pair_file(
                bdhs.bdhs_sampler(options, vlm),
                records,
                path,
                group_size=options.group,
                resume=True,
            )
        texts = [[*responses, pair["rejected"]] for responses, pair in zip(texts, pairs)]
    usable = [
        (record, own)
        for record, own in zip(records, texts)
        if all(own) and len(set(own)) == len(own) and fits(vlm, record, own)
    ]
    if len(usable) < len(records):
        print(
            f"{len(records) - len(usable)} of {len(records)} records left out: a rejected response is the chosen one, empty, or too long "
            "for the model's context",
            file=sys.stderr,
        )
    if not usable:
        raise InputError("no usable pair is left; lower --rho or raise --rounds")
    return usable


def fits(vlm, record, texts):
    """Whether sampled responses fit the context: no fault of the record's if not."""
    try:
        methods_base.encode_example(vlm, record, texts)
    except InputError:
        return False
    return True


def references(policy, vlm, examples, out, key):
    """Reference log-probs of all examples, from OUT/reference.safetensors if that was computed from the same things."""
    path = out / "reference.safetensors"
    if path.exists():
        with open_tensors(path) as tensors:
            known = tensors.get_tensor("logps") if "logps" in tensors.keys() else torch.empty(0)
            if (tensors.metadata() or {}).get("key") == key and known.shape == (
                len(examples),
                len(examples[0].responses),
            ):
                for example, logps in zip(examples, known):
                    example.ref_logps = logps
                return
        print(
            f"{path} belongs to other weights, data or template; computing it again",
            file=sys.stderr,
        )
    methods_base.add_reference_logps(policy, vlm, examples)
    save_tensors(
        {"logps": torch.stack([example.ref_logps for example in examples])}, path, {"key": key}
    )


def method_of(options, name, policy, vlm, examples, folder):
    """The Method called `name` over a policy, as the options ask for it."""

    def pairs(collect=collect_offline):
        weights = (1.0,) if options.gamma is None else (options.gamma, 1 - options.gamma)
        return preference_method(
            vlm, options.loss, options.beta, options.smoothing, weights, collect
        )

    def reinforced(method):
        reward = reward_of(options, options.reward or folder / "reward")
        policy.add_scalar_head() if method is ppo_method else None
        return method(
            policy,
            vlm,
            reward,
            reward_statistics(reward, [example.record for example in examples]),
            sampling,
            options.beta,
        )

    sampling = SamplingParams(
        options.max_new_tokens, options.temperature, options.top_p, options.seed
    )
    return {
        "sft": lambda: sft_method(vlm),
        "dpo": pairs,
        "bdhs": pairs,
        "online-dpo": lambda: pairs(collect_online(policy, vlm, annotator_of(options), sampling)),
        "mixed-dpo": lambda: pairs(
            collect_online(policy, vlm, annotator_of(options), sampling, options.mix)
        ),
        "online-bdhs": lambda: pairs(
            collect_online_bdhs(policy, vlm, bdhs.bdhs_sampler(options, vlm))
        ),
        "distortion": lambda: pairs(
            collect_distortion(policy, vlm, options.noise_steps, options.seed)
        ),
        "reward": lambda: reward_model_method(policy, vlm),
        "rloo": lambda: reinforced(rloo_method),
        "ppo": lambda: reinforced(ppo_method),
    }[name]()


def train_arm(options, vlm, usable, folder, name, clock, key):
    """Train one arm in `folder` (adapter/ or model/ in it when done) and leave it in `subject`. (number of steps, policy)."""
    policy = Policy(vlm.model, options.lora_rank, options.lora_alpha, options.seed)
    vlm.model.language_model.checkpointing = options.checkpoint_layers
    policy.add_scalar_head() if name == "reward" else None
    examples = [methods_base.encode_example(vlm, record, texts) for record, texts in usable]
    began = time.perf_counter()
    method = method_of(options, name, policy, vlm, examples, folder)
    if name in ("dpo", "bdhs", "mixed-dpo"):
        references(policy, vlm, examples, folder, key)
    clock["reference"] += time.perf_counter() - began
    began = time.perf_counter()
    steps = options.steps or math.ceil(len(examples) * options.epochs / options.batch_size)
    schedule = Schedule(
        steps,
        options.batch_size,
        options.lr,
        options.projector_lr,
        options.seed,
        options.tokens_per_microbatch,
        constant=options.schedule == "constant",
    )
    train(policy, method, examples, schedule, folder, {"sft": "supervised"}.get(name, name))
    if options.lora_rank:
        save_adapter(policy, folder / "adapter", options.model)
    else:
        policy.merge()
        save_model(vlm.model, options.model, folder / "model")
    if name == "reward":  # last, since a folder with a head in it is a whole reward
        reward_models.save_reward_model(policy, vlm.template, folder)
    distributed.barrier()  # until the first process has written what others read
    clock["train"] += time.perf_counter() - began
    left_out(folder)
    return steps, policy


def left_out(folder):
    """Say what share of an online method's prompts gave nothing to learn from."""
    log = read_jsonl(folder / "metrics.jsonl")
    for what, said in (
        ("same", "gave one response twice, or the chosen one"),
        ("tied", "were ties to the annotator"),
    ):
        if what in log[0]:
            print(
                f"{100 * sum(line[what] for line in log) / len(log):.1f} % of the sampled prompts {said} and were skipped",
                file=sys.stderr,
            )


def ranked(vlm, head, parts):
    """Pair accuracy of a scalar head on each part of the pairs, in the place of scores on pictures."""
    return {
        name: pair_accuracy(RewardAnnotator(reward_models.RewardModel(vlm, head)), records)
        for name, records in parts.items()
    }


def measure(vlm, sets, arm, out, clock):
    """Scores of the subject on every set; kept in OUT/.evaluation.json so that a restart need not repeat them."""
    path, began = out / ".evaluation.json", time.perf_counter()
    results = read_json(path, dict) if path.exists() else {}
    whole = all(
        isinstance(found, dict) and found.keys() == sets.keys() for found in results.values()
    )
    check(whole, f"{path}: not this run's scores; remove it, and they are measured again")
    if arm not in results:
        results[arm] = {
            name: evaluate_set(vlm, held, f"{arm}, {name}")[0] for name, held in sets.items()
        }
        write_json(path, results)
    clock["evaluate"] += time.perf_counter() - began
    return results


def sentence(results, method, out):
    """What changed and where the files are, in one sentence."""

    def said_of(name):
        """The set's shares."""
        base, aligned, *control = (
            f"{100 * results[arm][name]['chair_i']:.1f}"
            for arm in ("base", "aligned", "control")
            if arm in results
        )
        return f"{base} to {aligned} %{f' (control {control[0]})' if control else ''} on {name}"

    changes = [said_of(name) for name, scores in results["base"].items() if "chair_i" in scores]
    said = (
        f"{method} took the share of mentioned objects that are not there from {', '.join(changes)}"
        if changes
        else f"{method} is done"
    )
    return f"{said}; model and logs are in {out}"


def train_reward(options, vlm, records, folder, clock):
    """Train a reward model on nine tenths of the pairs, and rank them and the held-out tenth by it, before and after."""
    held = set(random.Random(options.seed).sample(range(len(records)), max(1, len(records) // 10)))
    parts = {
        name: [record for i, record in enumerate(records) if (i in held) == (name == "held-out")]
        for name in ("train", "held-out")
    }
    if not parts["train"]:
        raise InputError(
            "one record is not enough to train a reward model and to test it; give more --data"
        )
    results = {"base": ranked(vlm, scalar_head(vlm.model), parts)}
    usable = [(record, [record.chosen, record.rejected]) for record in parts["train"]]
    steps, policy = train_arm(options, vlm, usable, folder, "reward", clock, None)
    began = time.perf_counter()
    results["aligned"] = ranked(vlm, policy.scalar_head, parts)
    clock["evaluate"] += time.perf_counter() - began
    print("| pairs | reward model | accuracy | ties | n |\n|---|---|---|---|---|")
    for name in parts:
        for arm, scores in results.items():
            print(
                f"| {name} | {arm} | {100 * scores[name]['accuracy']:.1f} | {100 * scores[name]['ties']:.1f} | {scores[name]['n']} |"
            )
    write_json(folder / "evaluation.json", results)
    return {"steps": steps, "pairs": len(usable)}, policy


def job(options, vlm, records, sets, out, identity, clock):
    """Everything after the checks: evaluation of the base, pairs, one arm after the other. What summary.json says of the work."""
    if options.method == "reward":
        work, policy = train_reward(options, vlm, records, out, clock)
        print(
            f"the reward model is in {out}: give it to --method rloo or ppo with --reward, or to an annotator as reward:{out}"
        )
        return export(options, policy, vlm, work)
    results = measure(vlm, sets, "base", out, clock)
    if options.method in ("rloo", "ppo") and not (
        options.reward or (out / "reward" / "score.safetensors").exists()
    ):
        settings = argparse.Namespace(**vars(options) | options.first_reward | {"method": "reward"})
        train_reward(
            settings, fresh_subject(options, vlm.feature_cache), records, out / "reward", clock
        )
    began = time.perf_counter()
    usable = texts_of(options, vlm, records, out)
    clock["sample"] = time.perf_counter() - began
    arms = (
        [("control", "sft", out / "control")] if options.control and options.method != "sft" else []
    )
    for number_of_arm, (arm, name, folder) in enumerate([*arms, ("aligned", options.method, out)]):
        if number_of_arm:  # the first arm's weights are in the model: take a fresh one
            vlm = fresh_subject(options, vlm.feature_cache)
        key = repr(
            [
                identity,
                vlm.template,
                repr(vlm.image_processor),
                [(r.id, r.paths, r.turns, texts) for r, texts in usable],
            ]
        )
        steps, policy = train_arm(
            options, vlm, usable, folder, name, clock, hashlib.sha256(key.encode()).hexdigest()
        )
        results = measure(vlm, sets, arm, out, clock)
    write_json(out / "evaluation.json", results)
    distributed.barrier()  # until all have read it
    if distributed.is_main_process():
        (out / ".evaluation.json").unlink()
    if sets:
        print(results_table(results))
    print(sentence(results, options.method, out))
    return export(options, policy, vlm, {"steps": steps, "pairs": len(usable)})


def export(options, policy, vlm, work):
    """Write the merged model where --export asks for it; gives `work` back."""
    if options.export:
        policy.merge()
        save_model(vlm.model, options.model, options.export)
    return work


def worked(out):
    """Whether OUT holds work that a restart can go on from: sampled pairs or a trained step."""
    part = out / "pairs.jsonl.part"
    return (
        (out / "pairs.jsonl").exists()
        or part.exists()
        and part.read_bytes().count(b"\n") > 1
        or any(out.rglob("state.safetensors"))
    )


def main():
    options = parse(sys.argv[1:])
    distributed.init_distributed(options.device)
    out, settings = open_out(options)
    distributed.barrier()
    if (out / "summary.json").exists():
        print(f"{out} is finished already", file=sys.stderr)
        return
    clock = dict.fromkeys(("load", "sample", "reference", "train", "evaluate"), 0.0)
    began = time.perf_counter()
    vlm, records, sets = checked(options)
    identity = fingerprint(vlm.model)
    clock["load"] = time.perf_counter() - began
    new = not out.exists()
    if (
        not new
        and (out / "config.json").exists()
        and read_json(out / "config.json", dict).get("checkpoint") != identity
    ):
        raise InputError(
            f"{out}: was begun with other weights in {options.model}; start a new --out"
        )
    write_json(
        out / "config.json",
        {
            "settings": settings,
            "template": vlm.template,
            "checkpoint": identity,
            "similarity": options.similarity or similarity.PolicyEmbeddings.name,
            "versions": {
                "minialign": minialign.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        },
    )
    print(
        f"model {options.model}, template {vlm.template}, {len(records)} records, results in {out}",
        file=sys.stderr,
    )
    try:
        work = job(options, vlm, records, sets, out, identity, clock)
    except InputError:
        if new and not worked(out) and distributed.is_main_process():
            shutil.rmtree(out)  # found late, a damaged picture say: nothing half-written stays
        raise
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if options.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    write_json(
        out / "summary.json",
        {
            "seconds": {name: round(value, 2) for name, value in clock.items()},
            **work,
            "peak_memory_mb": round(peak),
        },
    )
    for state in (
        out.rglob("state.safetensors") if distributed.is_main_process() else ()
    ):  # of use to a restart alone
        state.unlink()


if __name__ == "__main__":
    sys.exit(run_script(main))
