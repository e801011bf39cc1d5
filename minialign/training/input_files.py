"""The files that a run reads: their content must be the same when the run is resumed.

All of them are read whole and hashed at every start. That is cheap beside what a start does anyway,
which is to decode every image: a thousand photographs take about a second to hash. Sizes and times
alone would miss an edited picture of the same size, and refuse a file that was only touched.
"""

from pathlib import Path

from tqdm import tqdm

from minialign.methods.registry import METHODS
from minialign.pairs.annotators import ANNOTATORS, annotator_kind
from minialign.utils.digests import file_digest
from minialign.utils.files import check, read_json, write_json

INPUTS_FILE = ".inputs.json"  # in OUT until the run is finished: path -> digest
# Patterns of the files that are read in the folder of an evaluation set, and in that of a model.
EVALUATION_FILES = ("captions.json", "pope_*")
MODEL_FILES = ("*.json", "*.jinja", "*.safetensors", "adapter/*", "model/*", "1_Pooling/*")


def digest_inputs(options, records, evaluation_sets) -> dict[str, str]:
    """Return path -> digest of every file that a run reads besides the model of --model.

    Of that model the weights are compared by their fingerprint in config.json, and the other files
    by the digests that it was loaded with.
    """
    # 1. The data, and what an evaluation reads.
    paths = list(options.data)
    for folder in options.eval or []:
        paths += files_in(folder, EVALUATION_FILES)

    # 2. What the method reads besides its model: an annotator, a reward model, a sentence encoder,
    #    a second reference.
    for source in other_sources(options):
        if Path(source).is_dir():
            paths += files_in(source, MODEL_FILES)
        else:
            paths.append(source)

    # 3. The images, which are most of the files.
    for record in records:
        paths += record.paths
    for evaluation_set in evaluation_sets.values():
        for row in (*evaluation_set.captions, *questions_of(evaluation_set)):
            paths.append(evaluation_set.images / row["image"])

    unique_paths = dict.fromkeys(str(path) for path in paths)
    return {path: file_digest(path) for path in tqdm(unique_paths, "inputs", leave=False)}


def files_in(folder, patterns) -> list[Path]:
    """Return the files in a folder that match one of the patterns, in order."""
    paths = []
    for pattern in patterns:
        paths += sorted(path for path in Path(folder).glob(pattern) if path.is_file())
    return paths


def questions_of(evaluation_set) -> list[dict]:
    """Return the POPE questions of an evaluation set, all splits in one list."""
    questions = []
    for questions_of_split in evaluation_set.pope.values():
        questions += questions_of_split
    return questions


def other_sources(options) -> list:
    """Return the files, and the folders of models, that the method reads besides its model."""
    spec = METHODS[options.method]
    sources = []
    if spec.needs_annotator():
        kind = ANNOTATORS[annotator_kind(options.annotator)]
        sources.append(kind.source(options))
    if spec.needs_reward_model() and options.reward:
        sources.append(options.reward)
    if options.reference_adapter:
        sources.append(options.reference_adapter)
    if "similarity" in spec.options and options.similarity:
        sources.append(options.similarity)
    return sources


def check_same_inputs(folder, digests):
    """Raise InputError if the run in `folder` was started from files with other content.

    digests: path -> digest of the files now. A new run stores them in `folder`.
    """
    path = Path(folder) / INPUTS_FILE
    if not path.exists():
        write_json(path, digests)
        return
    stored_digests = read_json(path, dict)
    for file in {**digests, **stored_digests}:
        check(
            file in stored_digests,
            f"{file}: was not there when the run in {folder} was started, or an earlier version "
            "did not note it; remove it if it is new, or use a new --out directory",
        )
        check(
            stored_digests[file] == digests.get(file),
            f"{file}: is not what it was when the run in {folder} was started; restore it, or use "
            "a new --out directory",
        )
