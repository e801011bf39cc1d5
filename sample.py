"""Ask a LLaVA-type model: its own rejected answers (BDHS), a plain answer, or the log-probs of given ones.

python sample.py                                  BDHS pairs of the tiny instruction data, with a contact sheet
python sample.py answer --image F --prompt T      an answer, streamed
python sample.py score --data FILE                log-probs of chosen and rejected responses
"""

import difflib
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from minialign.data.chat_templates import TEMPLATES, encode_prompt, end_token_id
from minialign.data.diffusion import diffuse
from minialign.data.image_processor import preprocess
from minialign.data.images import check_images, open_image
from minialign.data.records import read_records
from minialign.data.stream_decoder import StreamDecoder
from minialign.generation.decoding import (
    SamplingParams,
    branch_requests,
    decode,
    prefill,
    share_prefix,
)
from minialign.logprobs import response_logps
from minialign.methods.base import encode_example, pack_examples
from minialign.models.adapters import load_adapter
from minialign.models.loading import load_vlm
from minialign.options import add_data_options, add_model_options, add_sampling_options
from minialign.pairs.annotators import GroundTruthAnnotator, captions_file_of
from minialign.pairs.bdhs import bdhs_sampler
from minialign.pairs.corruption import MLLMCorrupter, RuleCorrupter
from minialign.pairs.distortion import DistortionSampler
from minialign.pairs.pair_files import check_pairs, sample_pair_file
from minialign.utils.cli import Parser, check_new, new_folder, number_type, run_script
from minialign.utils.files import InputError, atomic_write, read_json
from minialign.utils.seeding import seeded_generator

TINY = Path(__file__).resolve().parent / "data" / "tiny"
INK, FAINT, CHOSEN, REJECTED = (30, 30, 34), (120, 120, 128), (0, 125, 60), (205, 30, 30)


def parse(argv):
    """The options; no sub-command means `pairs`."""
    parser = Parser(
        prog="sample.py", description=__doc__.splitlines()[0], epilog="Without a command: pairs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser(
        "pairs", help="chosen and rejected responses as JSONL, with a contact sheet"
    )
    pairs.add_argument(
        "--by",
        choices=("attention", "noise", "distortion", "corrupt"),
        default="attention",
        help="BDHS with picture vectors hidden, BDHS on a noisy picture, every token predicted under noise, the chosen response rewritten",
    )
    pairs.add_argument(
        "--corrupter",
        default="truth",
        metavar="truth|DIR",
        help="who rewrites: a rule on captions.json beside --data, an MLLM",
    )
    add_data_options(
        pairs, "LLaVA-Instruct records", default=[str(TINY / "train" / "instruct.json")]
    )
    add_sampling_options(pairs)
    pairs.add_argument(
        "--limit", type=number_type(int, 1), help="a random subset of this many records"
    )
    pairs.add_argument(
        "--out",
        metavar="FILE",
        help="where the JSONL goes, the sheet beside it; none: a new folder under runs/",
    )
    pairs.add_argument("--resume", action="store_true", help="go on with --out")
    answer = commands.add_parser("answer", help="the answer alone on standard output, streaming")
    answer.add_argument("--image", required=True, metavar="F", help="the picture")
    answer.add_argument("--prompt", required=True, metavar="T", help="the question")
    answer.add_argument("--adapter", metavar="DIR", help="adapter to put on the model")
    score = commands.add_parser(
        "score", help="summed log-probs (nats, end token counted) of preference records"
    )
    add_data_options(score, "POVID records or pairs", default=[str(TINY / "train" / "povid.json")])
    score.add_argument("--out", metavar="FILE", help="where the JSONL goes; none: standard output")
    for one in (pairs, answer):
        one.add_argument(
            "--max-new-tokens",
            type=number_type(int, 1, 1 << 16),
            default=256,
            help="of a completion",
        )
        one.add_argument(
            "--temperature",
            type=number_type(float, 0),
            default=1.0 if one is pairs else 0.0,
            help="0 is greedy",
        )
        one.add_argument(
            "--seed", type=number_type(int, 0, 2**32 - 1), default=0, help="of everything drawn"
        )
    pairs.add_argument(
        "--top-p", type=number_type(float, 0, 1, above=True), default=1.0, help="nucleus sampling"
    )
    for one in (pairs, answer, score):
        add_model_options(one, default=str(TINY / "model"))
    if not any(word == "--model" or word.startswith("--model=") for word in argv):
        recipe = read_json(
            TINY / "recipe.json"
        )  # 64 vectors a picture want another share hidden than 576
        pairs.set_defaults(
            **{
                name: recipe[name]
                for name in ("rho", "rounds", "epsilon", "max_new_tokens", "group")
            }
        )
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["pairs", *argv]
    return parser.parse_args(argv)


def load(options):
    return load_vlm(options.model, options.template, options.dtype, device=options.device)


def pairs(options):
    """Sample BDHS pairs of all records into a JSONL file and draw the first of them."""
    if options.resume and not options.out:
        raise InputError("--resume needs --out, the file to go on with")
    path = Path(options.out) if options.out else new_folder() / "pairs.jsonl"
    if path.suffix == ".png":
        raise InputError(
            f"{path}: the pairs are JSONL, the sheet beside them takes .png; give --out another ending"
        )
    if path.exists() and options.resume:
        print(f"{path} is finished already", file=sys.stderr)
        return
    if path.exists() or Path(f"{path}.part").exists() and not options.resume:
        raise InputError(
            f"{path}: exists already, or was begun; give another --out, or --resume to go on with it"
        )
    check_new(
        path.with_suffix(".png")
    )  # the sheet's place: it is drawn last, so there is none to go on with
    records = read_records(
        options.data, options.images, options.limit, options.seed, options.format
    )
    vlm = load(options)
    for record in records:  # encoded here for its errors alone
        encode_example(vlm, record, [record.chosen])
    check_images(path for record in records for path in record.paths)
    sampler = sampler_of(options, vlm)
    if options.by == "corrupt" and options.corrupter == "truth":
        for record in records:
            sampler.truth.annotated_objects(record)
    print(
        f"model {options.model}, template {vlm.template}, {len(records)} records, {sampler.metadata()}",
        file=sys.stderr,
    )
    made = sample_pair_file(
        sampler, records, path, group_size=options.group, resume=options.resume
    )
    said = statistics(made, options)
    with atomic_write(path.with_suffix(".png")) as beside:
        contact_sheet(vlm, records, made).save(beside, format="png")
    print(
        f"{len(made)} pairs in {path}, {said}; the first of them drawn in {path.with_suffix('.png')}",
        file=sys.stderr,
    )


def sampler_of(options, vlm):
    """What makes the rejected responses, as --by says."""
    if options.by == "distortion":
        return DistortionSampler(vlm, options.noise_steps, options.seed)
    if options.by == "corrupt" and options.corrupter == "truth":
        return RuleCorrupter(vlm, GroundTruthAnnotator(captions_file_of(options)), options.seed)
    if options.by == "corrupt":
        return MLLMCorrupter(
            vlm,
            load_vlm(options.corrupter, None, options.dtype, device=options.device),
            options.corrupter,
            options.max_new_tokens,
        )
    return bdhs_sampler(options, vlm)


def statistics(made, options):
    """What is said of the pairs: in which rounds they settled, what was rejected of a model's answers, how many are the same."""
    if options.by == "corrupt":
        return ", ".join(
            f"{what}: {count}"
            for what, count in Counter(pair["corrupted"] for pair in made).most_common()
        )
    if options.by == "distortion":
        return f"{sum(pair['rejected'] == pair['chosen'] for pair in made)} of them with nothing changed"
    return f"settled in round 1 to {options.rounds}: {[sum(pair['rounds'] == r for pair in made) for r in range(1, options.rounds + 1)]}"


def answer(options):
    """Stream the answer to a question about one picture."""
    vlm = load(options)
    if options.adapter:
        load_adapter(vlm.model, options.adapter)
    prompt = encode_prompt(
        vlm.tokenizer,
        vlm.template,
        [options.prompt if "<image>" in options.prompt else f"<image>\n{options.prompt}"],
    )
    rows = [share_prefix([prompt], vlm.encode_images([options.image]))]
    cache, batch = prefill(vlm.model, rows)
    end = end_token_id(vlm.tokenizer, vlm.template)
    uniforms = (
        [torch.rand(options.max_new_tokens, generator=seeded_generator(options.seed, "answer"))]
        if options.temperature
        else None
    )
    stream = StreamDecoder(vlm.tokenizer, strip_prefix=TEMPLATES[vlm.template].response_prefix)
    for ((_, token),) in decode(
        vlm.model,
        cache,
        branch_requests(batch, rows, uniforms, stop_ids={end}),
        SamplingParams(options.max_new_tokens, options.temperature),
    ):
        print(stream.push(token), end="", flush=True)
    print(stream.flush(), flush=True)


@torch.no_grad()
def score(options):
    """A line for each preference record: its responses' log-probs and lengths."""
    if options.out:
        check_new(options.out)
    records = check_pairs(
        read_records(options.data, options.images, format=options.format), "score"
    )
    check_images(path for record in records for path in record.paths)
    vlm, lines = load(options), []
    for first in tqdm(range(0, len(records), 16), "score"):
        some = records[first : first + 16]
        examples = [
            encode_example(vlm, record, [record.chosen, record.rejected]) for record in some
        ]
        logps, counts = response_logps(vlm.model, pack_examples(vlm, examples))
        for record, (chosen, rejected), (n_chosen, n_rejected) in zip(
            some, logps.tolist(), counts.tolist()
        ):
            found = {
                "logp_chosen": chosen,
                "logp_rejected": rejected,
                "tokens_chosen": n_chosen,
                "tokens_rejected": n_rejected,
            }
            lines.append(json.dumps({"id": record.id} | found, ensure_ascii=False) + "\n")
    if options.out:
        with atomic_write(options.out) as beside:
            beside.write_text("".join(lines), encoding="utf-8")
    else:
        sys.stdout.write("".join(lines))


def contact_sheet(vlm, records, pairs, most=8, size=256, width=1180):
    """A picture of the first pairs: what the model saw (hidden patches dimmed, visible ones framed), prompt, chosen, rejected."""
    sheet = Image.new("RGB", (width, min(most, len(pairs)) * (size + 24) + 24), "white")
    draw, font, small = (
        ImageDraw.Draw(sheet),
        ImageFont.load_default(19),
        ImageFont.load_default(14),
    )
    for place, (record, pair) in enumerate(zip(records[:most], pairs)):
        top = 24 + place * (size + 24)
        sheet.paste(seen(vlm, record, pair, size), (24, top))
        left = size + 56
        note = f"record {pair['id']}" + (
            f", round {pair['rounds']}, similarity {pair['similarity']:.3f}"
            if "rounds" in pair
            else ""
        )
        note += (
            f", visible vectors: {len(pair['visible'])}"
            if "visible" in pair
            else f", {pair['noise']} steps of noise"
            if "noise" in pair
            else ""
        )
        draw.text((left, top - 2), note, FAINT, small)
        y = write(
            draw,
            (left, top + 20),
            record.turns[-1].replace("<image>", "").strip().split(),
            set(),
            font,
            INK,
            INK,
            width - 24,
        )
        old, new = pair["chosen"].split(), pair["rejected"].split()
        changes = [
            change
            for change in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
            if change[0] != "equal"
        ]
        for title, words, colour, differing in (
            ("chosen", old, CHOSEN, {i for _, a, b, _, _ in changes for i in range(a, b)}),
            ("rejected", new, REJECTED, {i for _, _, _, a, b in changes for i in range(a, b)}),
        ):
            draw.text((left, y + 10), title, FAINT, small)
            y = write(draw, (left, y + 28), words, differing, font, INK, colour, width - 24)
    return sheet


def seen(vlm, record, pair, size):
    """The whole-picture tile as the model is given it: with noise, or its hidden patches dimmed and the visible ones framed."""
    tiles = preprocess(open_image(record.paths[0]), vlm.image_processor)[0]
    if "noise" in pair:
        tiles = diffuse(
            tiles,
            pair["noise"],
            seeded_generator(
                pair["seed"], record.id, *([pair["rounds"]] if "rounds" in pair else []), "noise"
            ),
        )
    tile = tiles[0]
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (vlm.image_processor.mean, vlm.image_processor.std)
    )
    pixels = ((tile * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
    if "visible" not in pair:
        return picture
    dimmed = Image.blend(picture, Image.new("RGB", picture.size, (235, 235, 238)), 0.62)
    side = vlm.model.config.vision.patches_per_side
    edges = [round(i * size / side) for i in range(side + 1)]
    for index in (index for index in pair["visible"] if index < side * side):
        row, column = divmod(index, side)
        box = (edges[column], edges[row], edges[column + 1], edges[row + 1])
        dimmed.paste(picture.crop(box), box)
        ImageDraw.Draw(dimmed).rectangle(
            (box[0], box[1], box[2] - 1, box[3] - 1), outline=(255, 140, 0), width=3
        )
    return dimmed


def write(draw, at, words, differing, font, colour, other, right):
    """Write words from `at`, breaking lines before `right`; words whose index is in `differing` take the other colour. The next y."""
    x, y = at
    for index, word in enumerate(words):
        length = draw.textlength(word + " ", font)
        if x + length > right:
            x, y = at[0], y + font.size + 6
        draw.text((x, y), word, other if index in differing else colour, font)
        x += length
    return y + font.size + 6


def main():
    options = parse(sys.argv[1:])
    return {"pairs": pairs, "answer": answer, "score": score}[options.command](options)


if __name__ == "__main__":
    sys.exit(run_script(main))
