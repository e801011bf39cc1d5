"""Time a whole run by the real commands, from a checkpoint of random weights to the exported model.

python tests/bench/bench_whole_run.py                                       SMALL on the CPU
python tests/bench/bench_whole_run.py --shape 7b --device cuda --dtype bfloat16
python tests/bench/bench_whole_run.py --shape next7b --device cuda --dtype bfloat16

1. Write a checkpoint of the shape, with the tokenizer of the tiny world and random weights, and
   enlarged images of the tiny world with their texts.
2. `train.py --plan`, then `train.py`: measure the model, sample BDHS pairs, train, measure again,
   export.
3. Load the export by transformers if it is installed, and let `sample.py answer` ask it.

Random weights answer nonsense, which takes at least as long as sense: hardly an answer ends before
its limit. Everything runs once, by the wall clock. The texts are those of the tiny world, so
--prompt, --response, --pairs and --repeats have no effect.

Prints the seconds of each phase, and the peak memory beside that of the plan. On a CPU the peak is
that of the whole process. Python and its libraries, which the plan leaves out, are measured by
themselves.
"""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_split import write_checkpoint
from common import PATCH_SIZE, ROOT, option_flag, parse_options, raw_config
from PIL import Image
from report import heading, write_figures

from minialign.utils.files import read_json, write_json

TINY = ROOT / "data" / "tiny"
# The files of the tiny model that hold for any shape: its tokenizer, and how it is used.
COPIED_FILES = (
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# The sizes of a run, if the command line names no others: of a small shape, and of a 7B.
SMALL_RUN = dict(
    records=8,  # to learn from
    steps=4,  # of training
    pictures=4,  # in the evaluation set, one caption each
    batch=4,  # records a step
    new_tokens=16,  # the most of an answer or a completion
)
LARGE_RUN = dict(records=256, steps=50, pictures=64, batch=16, new_tokens=256)
# Programs for `python -c`. The first is given the folder of the export, the second the root of the
# repository.
LOAD_BY_TRANSFORMERS = """
import sys, transformers
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])
print(f"transformers {transformers.__version__}: {model.num_parameters():,} parameters")
"""
MEASURE_LIBRARIES = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import train
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # Linux counts KiB
"""

# --- what the run starts from ---


def write_model(options, folder):
    """Write a checkpoint directory of random weights that the real commands can load."""
    # 1. The weights, and config.json. It names their dtype too, as that of transformers does.
    folder.mkdir()
    write_checkpoint(options, folder)
    config = raw_config(options) | {"torch_dtype": options.dtype}
    write_json(folder / "config.json", config)

    # 2. The tokenizer of the tiny world. Of a larger vocabulary it knows the first tokens.
    for name in COPIED_FILES:
        shutil.copyfile(TINY / "model" / name, folder / name)

    # 3. The settings of its images and of its processor, for the tiles of this shape.
    image_settings = read_json(TINY / "model" / "preprocessor_config.json")
    image_settings["size"] = {"shortest_edge": options.tile}
    image_settings["crop_size"] = {"height": options.tile, "width": options.tile}
    processor_settings = read_json(TINY / "model" / "processor_config.json")
    processor_settings["patch_size"] = PATCH_SIZE
    if options.anyres:
        image_settings["image_processor_type"] = "LlavaNextImageProcessor"
        image_settings["image_grid_pinpoints"] = config["image_grid_pinpoints"]
        processor_settings["processor_class"] = "LlavaNextProcessor"
    write_json(folder / "preprocessor_config.json", image_settings)
    write_json(folder / "processor_config.json", processor_settings)


def write_data(options, folder):
    """Write the first records of the tiny world, and their images in the size of this shape."""
    records = read_json(TINY / "train" / "instruct.json")[: options.records]
    names = {record["image"] for record in records}
    write_images(options, TINY / "train" / "images", folder / "images", names)
    write_json(folder / "data.json", records)


def write_evaluation_set(options, folder):
    """Write the captions of the first images of an evaluation set, and these images."""
    source = TINY / "final" / "typical"
    content = read_json(source / "captions.json")
    content["captions"] = content["captions"][: options.pictures]
    names = {row["image"] for row in content["captions"]}
    write_images(options, source / "images", folder / "images", names)
    write_json(folder / "captions.json", content)


def write_images(options, source, folder, names):
    """Write the images of these names from the folder `source`, in the size of this shape."""
    folder.mkdir(parents=True)
    for name in sorted(names):
        image = Image.open(source / name)
        image.resize((options.breadth, options.height)).save(folder / name)


# --- the commands ---


def run_python(*words):
    """Run a Python program, given as the words behind `python`. Return its output and seconds."""
    command = [sys.executable, *map(str, words)]
    started = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        raise SystemExit(
            f"{shlex.join(command)}: status {process.returncode}\n{process.stderr[-2000:]}"
        )
    return process.stdout, seconds


def training_options(options, folder):
    """Return the options of train.py, as words of its command line."""
    values = {
        "--model": folder / "model",
        "--template": "vicuna",
        "--data": folder / "data.json",
        "--images": folder / "images",
        "--eval": folder / "pictures",
        "--out": folder / "run",
        "--export": folder / "exported",
        "--device": options.device,
        "--dtype": options.dtype,
        "--steps": options.steps,
        "--batch-size": options.batch,
        "--lora-rank": options.rank,
        "--max-new-tokens": options.new_tokens,
    }
    words = as_words(values)
    if options.checkpoint_layers:
        words.append("--checkpoint-layers")
    return words


def answer_options(options, folder):
    """Return the options of `sample.py answer`, as words of its command line."""
    first_image = sorted((folder / "images").iterdir())[0]
    values = {
        "--model": folder / "exported",
        "--template": "vicuna",
        "--image": first_image,
        "--prompt": "What is it?",
        "--max-new-tokens": 8,
        "--device": options.device,
    }
    return as_words(values)


def as_words(values):
    """Return {option: value} as words of a command line."""
    words = []
    for name, value in values.items():
        words += [name, value]
    return words


def measure_run(options, folder):
    """Write the inputs, plan the run and do it. Return its figures."""
    # 1. The inputs.
    write_model(options, folder / "model")
    write_data(options, folder)
    write_evaluation_set(options, folder / "pictures")

    # 2. The plan. Its units are decimal.
    words = training_options(options, folder)
    plan, _ = run_python(ROOT / "train.py", "--plan", *words)
    print(plan, flush=True)
    size, unit = re.search(r"^peak: ([\d.]+) (GB|MB)", plan, re.MULTILINE).groups()
    figures = {"planned_mb": float(size)}
    if unit == "GB":
        figures["planned_mb"] *= 1000

    # 3. The run, whose summary counts MiB.
    _, seconds_of_run = run_python(ROOT / "train.py", *words)
    summary = read_json(folder / "run" / "summary.json")
    figures["seconds"] = summary["seconds"] | {"whole run": round(seconds_of_run, 2)}
    figures["peak_mb"] = summary["peak_memory_mb"] * 2**20 / 1e6

    # 4. What Python and its libraries take of the peak. On a GPU they take nothing of it.
    figures["libraries_mb"] = 0.0
    if options.device == "cpu":
        num_bytes, _ = run_python("-c", MEASURE_LIBRARIES, ROOT)
        figures["libraries_mb"] = int(num_bytes) / 1e6
    return figures


def measure_export(options, folder):
    """Load what the run has exported. Return the seconds of each way to do so, by name."""
    seconds_of_ways = {}
    if importlib.util.find_spec("transformers"):
        output, seconds = run_python("-c", LOAD_BY_TRANSFORMERS, folder / "exported")
        print(output.strip())
        seconds_of_ways["load by transformers"] = round(seconds, 2)
    _, seconds = run_python(ROOT / "sample.py", "answer", *answer_options(options, folder))
    seconds_of_ways["load and ask the export"] = round(seconds, 2)
    return seconds_of_ways


def print_seconds(seconds_of_phases):
    """Print a line for each phase."""
    for phase, seconds in seconds_of_phases.items():
        print(f"{phase:24}{seconds:10.1f} s", flush=True)


def print_memory(figures):
    """Print the planned and the measured memory."""
    print(f"{'peak memory, planned':24}{figures['planned_mb']:10.0f} MB")
    print(f"{'libraries, measured':24}{figures['libraries_mb']:10.0f} MB")
    print(f"{'peak memory, measured':24}{figures['peak_mb']:10.0f} MB")


def main():
    """Run the benchmark."""
    # 1. The options. A size of the run that is not given, so 0, is that of the shape.
    options = parse_options(__doc__, repeats=1, **dict.fromkeys(LARGE_RUN, 0))
    run_sizes = LARGE_RUN if "7b" in options.shape else SMALL_RUN
    for name, size in run_sizes.items():
        if getattr(options, name) == 0:
            setattr(options, name, size)
    shown_sizes = [f"{option_flag(name)} {getattr(options, name)}" for name in run_sizes]
    clock = time.perf_counter.__name__  # also where other benchmarks take CPU time
    print(heading(options, clock))
    print(", ".join(shown_sizes), end="\n\n", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        # 2. The run. Its figures are printed at once, in case that its export cannot be loaded.
        figures = measure_run(options, Path(folder)) | {"clock": clock}
        print_memory(figures)
        print_seconds(figures["seconds"])

        # 3. What it has exported.
        seconds_of_loading = measure_export(options, Path(folder))
        print_seconds(seconds_of_loading)
        figures["seconds"] |= seconds_of_loading
    write_figures(options, figures)


if __name__ == "__main__":
    main()
