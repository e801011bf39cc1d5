"""What a run starts from: the model, the records, the evaluation sets, and the examples."""

from minialign.data.records import Record, check_record_images
from minialign.evaluation.evaluation_sets import EvaluationSet, read_folder, set_name_of
from minialign.evaluation.results import check_set
from minialign.methods.base import Example, encode_example
from minialign.methods.registry import METHODS
from minialign.models.adapters import open_adapter
from minialign.models.loading import VLM, load_vlm
from minialign.options import read_data
from minialign.pairs.annotators import load_annotator
from minialign.pairs.bdhs import bdhs_sampler
from minialign.pairs.pair_files import check_pairs, read_finished_pairs, sample_pair_file
from minialign.pairs.reward_model import load_reward_model
from minialign.pairs.similarity import load_similarity
from minialign.utils.files import InputError, check
from minialign.utils.messages import print_message


def load_and_validate(options) -> tuple[VLM, list[Record], dict[str, EvaluationSet]]:
    """Load the model, the records and the evaluation sets, and raise InputError for bad input.

    Everything that can be wrong with the input is looked for here, before any work is done.
    """
    # 1. Read the records and the evaluation sets.
    records = read_data(options)
    if METHODS[options.method].needs_pairs(options):
        check_pairs(records, f"--method {options.method}")
    evaluation_sets = read_evaluation_sets(options.eval or [])

    # 2. Load the model, and once in advance whatever the method will load later.
    vlm = load_model(options)
    check_models_of_method(options, vlm, records)

    # 3. Each image must be complete. Each record and question must fit the model's context.
    check_record_images(records)
    check_lengths(vlm, records)
    for evaluation_set in evaluation_sets.values():
        check_set(vlm, evaluation_set)
    return vlm, records, evaluation_sets


def check_lengths(vlm, records):
    """Raise InputError for a record that does not fit the model's context.

    What `encode_example` returns is not kept. `build_examples` encodes again, when it is known
    which responses are learned from.
    """
    for record in records:
        responses = [record.chosen]
        if record.rejected:
            responses.append(record.rejected)
        encode_example(vlm, record, responses)


def load_model(options, feature_cache=None) -> VLM:
    """Load the checkpoint as it is on disk.

    feature_cache: image features that another VLM of the same checkpoint has computed.
    """
    return load_vlm(
        options.model,
        template=options.template,
        dtype=options.dtype,
        device=options.device,
        system=options.system,
        feature_cache=feature_cache,
        feature_cache_bytes=options.keep_features << 20,
    )


def read_evaluation_sets(folders) -> dict[str, EvaluationSet]:
    """Read the evaluation sets, by the names of their folders."""
    evaluation_sets = {set_name_of(folder): read_folder(folder) for folder in folders}
    check(
        len(evaluation_sets) == len(folders),
        f"--eval {' '.join(folders)}: two folders have the same name, "
        "and results are stored by that name; rename one",
    )
    return evaluation_sets


def check_models_of_method(options, vlm, records):
    """Raise InputError if an annotator, a reward model or a sentence encoder cannot be used."""
    spec = METHODS[options.method]
    if spec.needs_annotator():
        annotator = load_annotator(options, both_orders=not options.one_order)
        annotator.check_records(records)
    if spec.needs_reward_model() and options.reward:
        reward_model = load_reward_model(
            options.reward,
            base=options.model,
            dtype=options.dtype,
            device=options.device,
        )
        reward_model.check_records(records)
    if options.reference_adapter:
        open_adapter(options.reference_adapter)  # raises if it is none, or is not supported
    if options.similarity and "similarity" in spec.options:
        load_similarity(options.similarity, vlm.model, vlm.tokenizer)


def build_examples(options, vlm, records, folder) -> list[Example]:
    """Return the examples to learn from, and count on standard error the records left out.

    The responses of an example are the chosen one, then the rejected one of the data if the method
    uses it, then the one that BDHS sampled. `folder` keeps what was sampled.
    """
    # 1. The responses of the data.
    keeps_rejected = METHODS[options.method].keeps_rejected(options)
    responses_of_records = []
    for record in records:
        responses = [record.chosen]
        if keeps_rejected:
            responses.append(record.rejected)
        responses_of_records.append(responses)

    # 2. BDHS: rejected responses of the model itself, sampled with its image masked.
    if METHODS[options.method].samples_before_training:
        pairs = sample_or_read_pairs(options, vlm, records, folder / "pairs.jsonl")
        for responses, pair in zip(responses_of_records, pairs, strict=True):
            responses.append(pair["rejected"])

    # 3. Encode what can be learned from.
    examples = []
    for record, responses in zip(records, responses_of_records, strict=True):
        example = encode_if_usable(vlm, record, responses)
        if example is not None:
            examples.append(example)
    num_left_out = len(records) - len(examples)
    if num_left_out > 0:
        print_message(
            f"{num_left_out} of {len(records)} records left out: the rejected response is empty, "
            "the same as the chosen one, or too long for the model's context",
        )
    check(examples, "no usable pair is left; lower --rho or raise --rounds")
    return examples


def sample_or_read_pairs(options, vlm, records, path):
    """Return the pairs of all records: those in `path`, or new ones that are written there."""
    if not path.exists():
        sampler = bdhs_sampler(options, vlm)
        # A part of the file exists only if this run was interrupted, and then it is continued.
        return sample_pair_file(sampler, records, path, group_size=options.group, resume=True)
    remedy = "use a new --out directory"
    records_of_pairs, pairs = read_finished_pairs(path, records, remedy)
    check(
        len(records_of_pairs) == len(records),
        f"{path}: has pairs for {len(pairs)} of the {len(records)} records of --data; {remedy}",
    )
    return pairs


def encode_if_usable(vlm, record, responses) -> Example | None:
    """Return a record with its responses as an Example, or None if it has nothing to teach."""
    has_empty = "" in responses
    has_duplicates = len(set(responses)) < len(responses)
    if has_empty or has_duplicates:
        return None
    try:
        return encode_example(vlm, record, responses)
    except InputError:  # a sampled response may be too long, which is no mistake in the data
        return None
