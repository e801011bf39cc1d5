"""Sample from a multimodal language model: preference pairs, an answer, or log-probs.

python sample.py                                pairs of the shipped tiny data, by BDHS
python sample.py pairs --keep .3 --by-score S   the best of them, as scorer S ranks them
python sample.py pairs --explain ID             how BDHS samples the pair of one record
python sample.py answer --image F --prompt T    an answer, streamed
python sample.py answer ... --explain           and what the image adds to each of its words
python sample.py score --data FILE              log-probs of chosen and rejected responses
"""

import contextlib
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

import torch
from tqdm import tqdm

from minialign.data.chat_templates import encode_prompt, stop_ids
from minialign.data.images import check_image_file, open_image, print_clipped
from minialign.data.records import ADDRESS, check_record_images, read_records
from minialign.data.stream_decoder import StreamDecoder
from minialign.data.templates import find_template
from minialign.evaluation.answers import check_room
from minialign.evaluation.reliance import reliance_table, token_reliance
from minialign.generation.decoding import (
    SamplingParams,
    branch_requests,
    decode,
    prefill,
    share_prefix,
)
from minialign.logprobs import batches_that_fit, response_logps
from minialign.methods.base import encode_example, pack_examples
from minialign.models.adapters import load_adapter
from minialign.models.loading import VLM, load_vlm
from minialign.models.split import split_models
from minialign.options import read_data, with_default_system
from minialign.pairs.annotators import GroundTruthAnnotator, captions_file_of
from minialign.pairs.bdhs import bdhs_sampler
from minialign.pairs.contact_sheet import contact_sheet
from minialign.pairs.corruption import MLLMCorrupter, RuleCorrupter
from minialign.pairs.curation import (
    ScoringSampler,
    dropped_path,
    load_scorer,
    sample_best_pairs,
)
from minialign.pairs.distortion import DistortionSampler
from minialign.pairs.explanation import explain_pair, explain_record, explain_round, find_group
from minialign.pairs.pair_files import (
    GivenPairs,
    check_pairs,
    read_finished_pairs,
    sample_pair_file,
    unfinished_path,
)
from minialign.sample_options import parse_options
from minialign.utils.cli import check_new, new_folder, resume_hint, run_script
from minialign.utils.distributed import (
    broadcast_from_main,
    init_distributed,
    is_main_process,
    map_across_ranks,
)
from minialign.utils.files import InputError, atomic_write, check, write_jsonl
from minialign.utils.locks import file_lock, remove_empty
from minialign.utils.messages import print_message
from minialign.utils.seeding import seeded_generator

SCORE_BATCH_SIZE = 16  # the most records that are scored together
MAX_WIDTH = 100  # of the lines of an explanation


def main():
    """Run the command that the command line names."""
    options = parse_options(sys.argv[1:])
    init_distributed(options.device)
    split_models(options.split)
    if options.command == "pairs" and options.explain is not None:
        explain_sampling(options)
    elif options.command == "pairs":
        with output_file(options) as path, resume_hint(path):
            sample_pairs(options, path)
    elif options.command == "answer":
        answer(options)
    else:
        score(options)


def sample_pairs(options, path):
    """Sample preference pairs into a JSONL file, and draw some of them on a contact sheet."""
    # 1. Choose the files to write, and load everything. Bad input is refused here, before any work.
    sheet_path = path.with_suffix(".png")
    if options.resume and path.exists() and sheet_path.exists():
        print_message(f"{path} is finished already")
        return
    check_output(path, sheet_path, options)
    records = read_data(options)
    if options.by == "data":
        check_pairs(records, "--by data")
    vlm = load_model(options)
    check_records(vlm, records, with_rejected=options.by == "data")
    sampler = make_sampler(options, vlm, records)
    if options.keep is not None:
        scorer = load_scorer(options, vlm, records)
        sampler = ScoringSampler(sampler, scorer, options.keep, options.seed)
    annotator = find_annotations(options)
    print_message(
        f"model {options.model}, template {vlm.template}, {len(records)} records, "
        f"{sampler.metadata()}, pairs in {path}",
    )

    # 2. Sample the pairs, and choose among them if --keep says so.
    progress = {"group_size": options.group, "resume": options.resume}
    are_sampled = path.exists()  # an earlier process was stopped before it drew the sheet
    if are_sampled:
        records, pairs = read_finished_pairs(
            path, records, "give the same options, or remove the file"
        )
    elif options.keep is None:
        pairs = sample_pair_file(sampler, records, path, **progress)
    else:
        records, pairs = sample_best_pairs(sampler, records, path, **progress)
    # The file does not say by which options finished pairs were sampled.
    description = "sampled earlier" if are_sampled else describe_pairs(pairs, options)

    # 3. Draw a few of them, to look at.
    sheet = contact_sheet(vlm, records, pairs, annotator, max_rows=options.sheet)
    with atomic_write(sheet_path) as temporary:
        sheet.save(temporary, format="png")
    print_message(
        f"{len(pairs)} pairs in {path}, {description}; "
        f"{min(options.sheet, len(pairs))} of them drawn in {sheet_path}",
    )


def explain_sampling(options):
    """Print step by step how BDHS samples the pair of one record, and the pair."""
    # 1. Find the record, and load everything.
    group, index = find_group(read_data(options), options.explain, options.group)
    record = group[index]
    vlm = load_model(options)
    check_records(vlm, group)
    sampler = make_sampler(options, vlm, group)
    width = min(MAX_WIDTH, shutil.get_terminal_size().columns)
    print(*explain_record(sampler, record, width), sep="\n")

    # 2. Sample its group as `sample_pairs` does, and print each round of the record.
    for result in sampler.rounds(group):
        if result.index == index:
            print(*explain_round(sampler, record, result, width), sep="\n", flush=True)
            if result.is_taken:
                pair = sampler.as_pair(record, result)
                break  # the rounds of the other records in the group are not needed

    # 3. Print the pair.
    print(*explain_pair(pair, width), sep="\n")


def answer(options):
    """Stream the answer to a question about one image to standard output."""
    # 1. Look at the image, load the model, and encode the question.
    check_image(options.image)
    vlm = load_model(options)
    if options.adapter:
        load_adapter(vlm.model, options.adapter, options.model)
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, [options.prompt], system=vlm.system)
    check_room(vlm, (options.image,), options.prompt, prompt_ids)
    example = share_prefix([prompt_ids], vlm.encode_images([options.image]))

    # 2. Prefill the cache. At temperature 0 the answer is greedy and needs no random numbers.
    cache, batch = prefill(vlm.model, [example])
    uniforms = None
    if options.temperature > 0:
        generator = seeded_generator(options.seed, "answer")
        uniforms = [torch.rand(options.max_new_tokens, generator=generator)]
    end_ids = stop_ids(vlm.tokenizer, vlm.template)
    requests = branch_requests(batch, [example], uniforms, stop_ids=end_ids)

    # 3. Decode, and print the text of each token as it comes.
    sampling = SamplingParams(options.max_new_tokens, options.temperature)
    response_prefix = find_template(vlm.template).response_prefix
    stream = StreamDecoder(vlm.tokenizer, strip_prefix=response_prefix)
    response_ids = []
    try:
        for new_tokens in decode(vlm.model, cache, requests, sampling):
            ((_, token),) = new_tokens  # one request, so one pair of its index and its token
            response_ids.append(token)
            if token not in end_ids:  # an end token may be an ordinary one, with a text
                print(stream.push(token), end="", flush=True)
    finally:
        print(stream.flush(), flush=True)  # after Ctrl-C too, so that the message has its own line

    # 4. Show what the image adds to each word.
    if options.explain:
        words = token_reliance(vlm, [options.image], options.prompt, response_ids)
        print("", *reliance_table(words), sep="\n")


def check_image(path):
    """Raise InputError unless --image names an image that can be opened."""
    check(
        not ADDRESS.match(path),
        f"--image {path[:60]}: is an address or the image itself; give the name of a file",
    )
    check_image_file(path, remedy="give another --image")
    image = open_image(path)
    if image.info["clipped"]:
        print_clipped([path], num_images=1)


@torch.no_grad()
def score(options):
    """Write the log-probs and lengths of the responses of preference records, a line a record."""
    # 1. Read the records. Bad input is refused here, before any work.
    if options.out:
        check_new(options.out)
    records = read_records(
        options.data,
        image_folder=options.images,
        format=options.format,
        skip_text_only=options.skip_text_only,
    )
    records = with_default_system(records, options)
    check_pairs(records, "score")
    check_record_images(records)
    vlm = load_model(options)

    examples = []
    for record in records:
        examples.append(encode_example(vlm, record, [record.chosen, record.rejected]))

    # 2. Score them in batches, which the processes share.
    lengths = [example.length for example in examples]
    batches = [examples[batch] for batch in batches_that_fit(lengths, SCORE_BATCH_SIZE)]

    def score_share(share):
        """Score some of the batches. Return the lines of each."""
        return [score_records(vlm, batch) for batch in tqdm(share, "score")]

    lines = []
    for lines_of_batch in map_across_ranks(batches, score_share):
        lines += lines_of_batch

    # 3. Write them.
    if options.out:
        write_jsonl(options.out, lines)
    else:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))


def score_records(vlm, examples) -> list[dict]:
    """Return the summed log-probs (nats) and lengths of the two responses of some records."""
    logps, token_counts = response_logps(vlm.model, pack_examples(vlm, examples))  # both (B, 2)
    lines = []
    for i, example in enumerate(examples):
        line = {
            "id": example.record.id,
            "logp_chosen": float(logps[i, 0]),
            "logp_rejected": float(logps[i, 1]),
            "tokens_chosen": int(token_counts[i, 0]),
            "tokens_rejected": int(token_counts[i, 1]),
        }
        lines.append(line)
    return lines


def load_model(options) -> VLM:
    """Load the checkpoint that the options name."""
    return load_vlm(
        options.model,
        options.template,
        options.dtype,
        device=options.device,
        system=options.system,
    )


# --- what the command `pairs` needs


@contextlib.contextmanager
def output_file(options):
    """Yield the path of the JSONL file: --out, or in a new folder under runs/.

    No other process may write this file until the block ends.
    """
    check(
        options.out is not None or not options.resume,
        "--resume needs --out, the file to resume",
    )
    if options.out is None:
        # The main process makes the folder, and tells the others which one it is.
        folder = None
        if is_main_process():
            folder = str(new_folder("pairs"))
        folder = Path(broadcast_from_main(folder))
        try:
            yield folder / "pairs.jsonl"
        finally:
            remove_empty([folder, folder.parent])  # they are empty if nothing was sampled
        return

    path = Path(options.out)
    check(
        path.suffix != ".png",
        f"{path}: the pairs are JSONL, the contact sheet next to them takes .png; "
        "give --out another ending",
    )
    with file_lock(path.with_name(f".{path.name}.lock"), path):
        yield path


def check_output(path, sheet_path, options):
    """Raise InputError if the files to write exist, unless unfinished pairs are to be resumed."""
    if not options.resume:
        check_new(path)
    has_begun = path.exists() or unfinished_path(path).exists()
    check(
        options.resume or not has_begun,
        f"{path}: was begun already; give another --out, or --resume to finish it",
    )
    check_new(sheet_path)  # it is drawn last, so there is no unfinished one
    if options.keep is not None and not has_begun:
        check_new(dropped_path(path))


def check_records(vlm, records, with_rejected=False):
    """Raise InputError for a record that does not fit the model or whose image is damaged."""
    for record in records:
        responses = [record.chosen]
        if with_rejected:
            responses.append(record.rejected)
        encode_example(vlm, record, responses)
    check_record_images(records)


def make_sampler(options, vlm, records):
    """Return the object that makes the rejected responses, as --by says."""
    if options.by == "data":
        return GivenPairs(vlm, records)
    if options.by == "distortion":
        return DistortionSampler(vlm, options.noise_steps, options.seed)
    if options.by == "corrupt":
        return make_corrupter(options, vlm, records)
    return bdhs_sampler(options, vlm)


def make_corrupter(options, vlm, records):
    """Return what rewrites the chosen responses: a rule that knows the objects, or a model."""
    if options.corrupter != "truth":
        writer = load_vlm(options.corrupter, None, options.dtype, device=options.device)
        return MLLMCorrupter(vlm, writer, options.corrupter, options.max_new_tokens)
    annotator = GroundTruthAnnotator(captions_file_of(options), "--corrupter")
    annotator.check_records(records)
    return RuleCorrupter(vlm, annotator, options.seed)


def find_annotations(options) -> GroundTruthAnnotator | None:
    """Return the annotations of the images for the contact sheet, or None if there are none."""
    try:
        path = captions_file_of(options)
        if not path.exists():
            return None
        return GroundTruthAnnotator(path)
    except InputError as error:
        print_message(f"the contact sheet shows no annotations: {error}")
        return None


def describe_pairs(pairs, options):
    """Return in a few words how the sampling went, such as the pairs settled in each round."""
    if options.by == "data":
        return "with the rejected responses of the data"
    if options.by == "corrupt":
        counts = Counter(pair["corrupted"] for pair in pairs)
        return ", ".join(f"{outcome}: {count}" for outcome, count in counts.most_common())
    if options.by == "distortion":
        num_same = sum(pair["rejected"] == pair["chosen"] for pair in pairs)
        return f"{num_same} of them with nothing changed"
    pairs_by_round = Counter(pair["rounds"] for pair in pairs)
    counts = [pairs_by_round[round_number] for round_number in range(1, options.rounds + 1)]
    return f"settled in round 1 to {options.rounds}: {counts}"


if __name__ == "__main__":
    sys.exit(run_script(main))
