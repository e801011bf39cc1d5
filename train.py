"""Align a LLaVA-type model and measure hallucination before and after.

    python train.py                                   the shipped tiny LLaVA on its own BDHS pairs, by data/tiny/recipe.json
    python train.py --model DIR --data FILE --images DIR --out DIR
"""
import hashlib
import math
import platform
import resource
import shutil
import sys
import time
from pathlib import Path

import torch

import minialign
from minialign import bdhs, methods, similarity
from minialign.adapters import save_adapter
from minialign.checkpoint import fingerprint, open_tensors, save_model, save_tensors
from minialign.subject import load_subject
from minialign.cli import Parser, add_model_options, add_sampling_options, new_folder, number, run
from minialign.data import FORMATS, read_records
from minialign.evaluate import evaluate_set, read_folder, table
from minialign.files import BadInput, read_json, read_jsonl, write_json
from minialign.lora import Policy
from minialign.losses import PAIR_LOSSES
from minialign.training import Schedule, train

TINY = Path(__file__).resolve().parent / "data" / "tiny"
METHODS = ("bdhs", "dpo", "sft")
NOT_SETTINGS = ("resume", "out", "export")  # may differ between a run and its continuation


def parse(argv):
    """The options; without --model the defaults are the tiny world's recipe, with it the paper's."""
    parser = Parser(prog="train.py", description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--method", choices=METHODS, default="bdhs", help="how rejected responses come about, or supervised training")
    parser.add_argument("--loss", choices=sorted(PAIR_LOSSES), default="dpo", help="the loss on pairs")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="records; for bdhs and sft supervised ones will do")
    parser.add_argument("--format", choices=sorted(FORMATS), help="of --data; none: told from the fields")
    parser.add_argument("--images", metavar="DIR", help="folder of their pictures; none: images/ beside each file")
    parser.add_argument("--eval", nargs="*", metavar="DIR", help="evaluation folders")
    parser.add_argument("--out", metavar="DIR", help="where results go; none: a new numbered folder under runs/")
    parser.add_argument("--export", metavar="DIR", help="also write the merged model there, for engines that take no adapter with a projector")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--steps", type=number(int, 1), help="optimiser steps; none: by --epochs")
    parser.add_argument("--epochs", type=number(int, 1), default=3, help="passes over the data")
    parser.add_argument("--batch-size", type=number(int, 1), default=16, help="records a step")
    parser.add_argument("--tokens-per-microbatch", type=number(int, 1), default=4096, help="padded slots, picture vectors included, computed together")
    parser.add_argument("--lr", type=number(float, 0, above=True), default=1e-6, help="peak learning rate")
    parser.add_argument("--projector-lr", type=number(float, 0), default=2e-6, help="the projector's own")
    parser.add_argument("--beta", type=number(float, 0, above=True), default=.1, help="strength of the reference")
    parser.add_argument("--lora-rank", type=number(int, 0), default=128, help="0 trains all weights of decoder and projector")
    parser.add_argument("--lora-alpha", type=number(float, 0, above=True), default=256, help="LoRA's scale times its rank")
    parser.add_argument("--limit", type=number(int, 1), help="a random subset of this many records")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    parser.add_argument("--control", action="store_true", help="also train a supervised control on the same chosen responses")
    add_sampling_options(parser)
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=256, help="of a completion, and of the last round's whole response")
    if not any(word == "--model" or word.startswith("--model=") for word in argv):
        recipe = read_json(TINY / "recipe.json")
        parser.set_defaults(**recipe, model=str(TINY / "model"), eval=[str(TINY / "final" / name) for name in ("typical", "shifted", "balanced")])
    options = parser.parse_args(argv)
    if options.resume and not options.out:
        parser.error("--resume needs --out, the folder to go on with")
    if options.data is None:
        if Path(options.model) != TINY / "model":
            parser.error("--model needs --data FILE...")
        options.data = [str(TINY / "train" / ("povid.json" if options.method == "dpo" else "instruct.json"))]
    return options


def open_out(options):
    """The result folder and whether it is already finished. Raises BadInput where an existing one does not fit."""
    out = Path(options.out) if options.out else new_folder()
    settings = {key: value for key, value in vars(options).items() if key not in NOT_SETTINGS}
    if options.export and Path(options.export).exists():
        raise BadInput(f"{options.export}: exists already; give another --export")
    if out.exists() and not options.resume:
        raise BadInput(f"{out}: exists already; give another --out, or --resume to go on with it")
    if (out / "config.json").exists():
        before = read_json(out / "config.json").get("settings", {})
        different = sorted(key for key in settings if before.get(key) != settings[key])
        if different:
            raise BadInput(f"{out}: was begun with another --{different[0].replace('_', '-')} ({before.get(different[0])!r}, now {settings[different[0]]!r})")
    return out, settings


def checked(options):
    """(subject, records, evaluation sets), everything that can be wrong with the input found before any work."""
    records = read_records(options.data, options.images, options.limit, options.seed, options.format)
    if options.method == "dpo":
        for record in records:
            if record.rejected is None:
                raise BadInput(f"record {record.id} has no rejected response; --method dpo needs pairs, --method bdhs makes them")
    sets = {Path(folder).name: read_folder(folder) for folder in options.eval or []}
    if len(sets) < len(options.eval or []):
        raise BadInput(f"--eval {' '.join(options.eval)}: two folders have one name, and sets are named by their folder; rename one")
    subject = load_subject(options.model, options.template, options.dtype, options.device)
    if options.similarity and options.method == "bdhs":
        similarity.load(options.similarity, subject.model, subject.tokenizer)  # for its errors alone, as below
    for record in records:
        methods.encode_example(subject, record, [text for text in (record.chosen, record.rejected) if text])
    return subject, records, sets


def pairs_of(options, subject, records, out):
    """(record, chosen, rejected) of every usable pair; BDHS's are sampled into OUT/pairs.jsonl first."""
    rejected = [record.rejected for record in records]
    if options.method == "bdhs":
        path = out / "pairs.jsonl"
        if path.exists():
            pairs = read_jsonl(path)
            if [(pair["id"], pair["chosen"]) for pair in pairs] != [(record.id, record.chosen) for record in records]:
                raise BadInput(f"{path}: was sampled for other records than --data now holds; start a new --out")
        else:
            settings = bdhs.Settings(options.rho, options.rounds, options.epsilon, max_new_tokens=options.max_new_tokens)
            encoder = similarity.load(options.similarity, subject.model, subject.tokenizer)
            sampler = bdhs.Sampler(subject, settings, encoder, options.seed)
            pairs = bdhs.sample_file(sampler, records, path, options.group, resume=True)
        rejected = [pair["rejected"] for pair in pairs]
    usable = [(record, text) for record, text in zip(records, rejected) if options.method == "sft" or text and text != record.chosen and fits(subject, record, text)]
    if len(usable) < len(records):
        print(f"{len(records) - len(usable)} of {len(records)} pairs left out: rejected is the chosen one, empty, or too long for the model's context", file=sys.stderr)
    if not usable:
        raise BadInput("no usable pair is left; lower --rho or raise --rounds")
    return usable


def fits(subject, record, text):
    """Whether a sampled response fits the context: no fault of the record's if not."""
    try:
        methods.encode_example(subject, record, [text])
    except BadInput:
        return False
    return True


def references(policy, subject, examples, out, key):
    """Reference log-probs of all examples, from OUT/reference.safetensors if that was computed from the same things."""
    path = out / "reference.safetensors"
    if path.exists():
        with open_tensors(path) as tensors:
            if tensors.metadata().get("key") == key:
                for example, logps in zip(examples, tensors.get_tensor("logps")):
                    example.reference = logps
                return
        print(f"{path} belongs to other weights, data or template; computing it again", file=sys.stderr)
    methods.add_references(policy, subject, examples)
    save_tensors({"logps": torch.stack([example.reference for example in examples])}, path, {"key": key})


def train_arm(options, subject, usable, folder, method, clock, key):
    """Train one arm in `folder` (adapter/ or model/ in it when done) and leave it in `subject`."""
    policy = Policy(subject.model, options.lora_rank, options.lora_alpha, options.seed)
    examples = [methods.encode_example(subject, record, [record.chosen] if method == "sft" else [record.chosen, text]) for record, text in usable]
    began = time.perf_counter()
    if method == "sft":
        step = methods.supervised(subject)
    else:
        references(policy, subject, examples, folder, key)
        step = methods.preference(subject, options.loss, options.beta)
    clock["reference"] += time.perf_counter() - began
    began = time.perf_counter()
    steps = options.steps or math.ceil(len(examples) * options.epochs / options.batch_size)
    schedule = Schedule(steps, options.batch_size, options.lr, options.projector_lr, options.seed, options.tokens_per_microbatch)
    train(policy, step, examples, schedule, folder, {"sft": "supervised"}.get(method, method))
    if options.lora_rank:
        save_adapter(policy, folder / "adapter", options.model)
    else:
        policy.merge()
        save_model(subject.model, options.model, folder / "model")
    clock["train"] += time.perf_counter() - began
    return steps, policy


def measure(subject, sets, arm, out, clock):
    """Scores of the subject on every set; kept in OUT/.evaluation.json so that a restart need not repeat them."""
    path, began = out / ".evaluation.json", time.perf_counter()
    results = read_json(path) if path.exists() else {}
    if arm not in results:
        results[arm] = {name: evaluate_set(subject, held, f"{arm}, {name}") for name, held in sets.items()}
        write_json(path, results)
    clock["evaluate"] += time.perf_counter() - began
    return results


def sentence(results, method, out):
    """What changed and where the files are, in one sentence."""
    first, last = results["base"], results["aligned"]
    changes = [f"{100 * first[name]['chair_i']:.1f} to {100 * last[name]['chair_i']:.1f} % on {name}" for name in first if "chair_i" in first[name]]
    said = f"{method} took the share of mentioned objects that are not there from {', '.join(changes)}" if changes else f"{method} is done"
    return f"{said}; model and logs are in {out}"


def job(options, subject, records, sets, out, identity, clock):
    """Everything after the checks: evaluation of the base, pairs, one arm after the other. What summary.json says of the work."""
    results = measure(subject, sets, "base", out, clock)
    began = time.perf_counter()
    usable = pairs_of(options, subject, records, out)
    clock["sample"] = time.perf_counter() - began
    arms = [("control", "sft", out / "control")] if options.control and options.method != "sft" else []
    for number_of_arm, (arm, method, folder) in enumerate([*arms, ("aligned", options.method, out)]):
        if number_of_arm:  # the first arm's weights are in the model: take a fresh one
            subject = load_subject(options.model, options.template, options.dtype, options.device, subject.kept)
        key = repr([identity, subject.template, subject.preparation.key(), [(r.id, r.paths, r.turns, r.chosen, text) for r, text in usable]])
        steps, policy = train_arm(options, subject, usable, folder, method, clock, hashlib.sha256(key.encode()).hexdigest())
        results = measure(subject, sets, arm, out, clock)
    if options.export:
        policy.merge()
        save_model(subject.model, options.model, options.export)
    write_json(out / "evaluation.json", results)
    (out / ".evaluation.json").unlink()
    if sets:
        print(table(results))
    print(sentence(results, options.method, out))
    return {"steps": steps, "pairs": len(usable)}


def worked(out):
    """Whether OUT holds work that a restart can go on from: sampled pairs or a trained step."""
    part = out / "pairs.jsonl.part"
    return (out / "pairs.jsonl").exists() or part.exists() and part.read_bytes().count(b"\n") > 1 or any(out.rglob("state.safetensors"))


def main():
    options = parse(sys.argv[1:])
    out, settings = open_out(options)
    if (out / "summary.json").exists():
        print(f"{out} is finished already", file=sys.stderr)
        return
    clock = dict.fromkeys(("load", "sample", "reference", "train", "evaluate"), 0.0)
    began = time.perf_counter()
    subject, records, sets = checked(options)
    identity = fingerprint(subject.model)
    clock["load"] = time.perf_counter() - began
    new = not out.exists()
    if not new and (out / "config.json").exists() and read_json(out / "config.json").get("checkpoint") != identity:
        raise BadInput(f"{out}: was begun with other weights in {options.model}; start a new --out")
    write_json(out / "config.json", {
        "settings": settings, "template": subject.template, "checkpoint": identity, "similarity": options.similarity or similarity.OwnEmbeddings.name,
        "versions": {"minialign": minialign.__version__, "torch": torch.__version__, "python": platform.python_version()}})
    print(f"model {options.model}, template {subject.template}, {len(records)} records, results in {out}", file=sys.stderr)
    try:
        work = job(options, subject, records, sets, out, identity, clock)
    except BadInput:
        if new and not worked(out):
            shutil.rmtree(out)  # found late, a damaged picture say: nothing half-written stays
        raise
    peak = torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_json(out / "summary.json", {"seconds": {name: round(value, 2) for name, value in clock.items()}, **work, "peak_memory_mb": round(peak)})
    for state in out.rglob("state.safetensors"):  # of use to a restart alone
        state.unlink()


if __name__ == "__main__":
    sys.exit(run(main))
