"""Time a whole run by the real commands, from a checkpoint of random weights to the exported model.

python tests/bench/bench_whole_run.py                                       SMALL on the CPU
python tests/bench/bench_whole_run.py --shape 7b --device cuda --dtype bfloat16
python tests/bench/bench_whole_run.py --shape next7b --device cuda --dtype bfloat16

1. Write a checkpoint of the shape, with the tokenizer of the tiny world and random weights, and
   enlarged images of the tiny world with their texts.
2. `train.py --plan`, then `train.py`: measure the model, sample BDHS pairs, train, measure again,
   export.
3. Load the export by transformers if it is installed, and let `sample.py answer` ask it.

Random weights answer nonsense, which takes as long as sense: no answer ends before its limit.
Prints the seconds of each phase, and the peak memory beside that of the plan. On a CPU the
peak is that of the whole process. Python and its libraries are measured by themselves.
"""

import importlib.util
import json
import re
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

TINY = ROOT / "data" / "tiny"
# What the tokenizer and the images of a checkpoint need, beside config.json and the weights.
COPIED_FILES = (
    "chat_template.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# The sizes of a run where nothing else is given: of SMALL on a CPU, and of a 7B.
SMALL_RUN = dict(records=8, steps=4, pictures=4, batch=4, new_tokens=16)
LARGE_RUN = dict(records=256, steps=50, pictures=64, batch=16, new_tokens=256)
LOAD_BY_TRANSFORMERS = """
import sys, transformers
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])
print(f"transformers {transformers.__version__}: {model.num_parameters():,} parameters")
"""
MEASURE_LIBRARIES = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import train
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""

# --- what the run starts from ---


def write_model(options, folder):
    """Write a checkpoint directory of random weights that the real commands can load."""
    folder.mkdir()
    write_checkpoint(options, folder)
    config = raw_config(options) | {"torch_dtype": options.dtype}
    (folder / "config.json").write_text(json.dumps(config))
    for name in COPIED_FILES:
        shutil.copyfile(TINY / "model" / name, folder / name)
    for name in ("preprocessor_config.json", "processor_config.json"):
        settings = json.loads((TINY / "model" / name).read_text())
        (folder / name).write_text(json.dumps(adapt(settings, options, config)))


def adapt(settings, options, config):
    """Return the settings of a processor of the tiny world for the tiles of this shape."""
    if "size" in settings:
        settings["size"] = {"shortest_edge": options.tile}
        settings["crop_size"] = {"height": options.tile, "width": options.tile}
        if options.anyres:
            settings["image_processor_type"] = "LlavaNextImageProcessor"
            settings["image_grid_pinpoints"] = config["image_grid_pinpoints"]
    else:
        settings["patch_size"] = PATCH_SIZE
        if options.anyres:
            settings["processor_class"] = "LlavaNextProcessor"
    return settings


def write_data(options, folder):
    """Write the first records of the tiny world, and their images in the size of this shape."""
    records = json.loads((TINY / "train" / "instruct.json").read_text())[: options.records]
    names = {record["image"] for record in records}
    write_images(options, TINY / "train" / "images", folder / "images", names)
    (folder / "data.json").write_text(json.dumps(records))


def write_evaluation_set(options, folder):
    """Write the captions of the first images of an evaluation set, and these images."""
    source = TINY / "final" / "typical"
    captions = json.loads((source / "captions.json").read_text())
    captions["captions"] = captions["captions"][: options.pictures]
    names = {row["image"] for row in captions["captions"]}
    write_images(options, source / "images", folder / "images", names)
    (folder / "captions.json").write_text(json.dumps(captions))


def write_images(options, source, folder, names):
    """Write images in the size of this shape."""
    folder.mkdir(parents=True)
    for name in sorted(names):
        image = Image.open(source / name)
        image.resize((options.breadth, options.height)).save(folder / name)


# --- the commands ---


def run_command(script, *words):
    """Run a command. Return its output and the seconds it took."""
    started = time.perf_counter()
    process = subprocess.run(
        [sys.executable, *script, *map(str, words)], capture_output=True, text=True, check=False
    )
    if process.returncode != 0:
        raise SystemExit(f"{script}: status {process.returncode}\n{process.stderr[-2000:]}")
    return process.stdout, time.perf_counter() - started


def training_words(options, folder):
    """Return the command line of train.py."""
    return {
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


def run_all(options, folder):
    """Write the inputs, run the commands, and return the figures."""
    # 1. The inputs.
    write_model(options, folder / "model")
    write_data(options, folder)
    write_evaluation_set(options, folder / "pictures")

    # 2. The plan, and the run.
    words = []
    for name, value in training_words(options, folder).items():
        words += [name, value]
    script = [ROOT / "train.py"]
    plan, _ = run_command(script, "--plan", *words)
    print(plan, flush=True)
    number, unit = re.search(r"^peak: ([\d.]+) (GB|MB)", plan, re.MULTILINE).groups()
    _, seconds_of_run = run_command(script, *words)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    figures = {"seconds": summary["seconds"] | {"whole run": round(seconds_of_run, 2)}}
    figures["planned_mb"] = float(number) * {"GB": 1000, "MB": 1}[unit]
    figures["peak_mb"] = summary["peak_memory_mb"] * 2**20 / 1e6
    figures["libraries_mb"] = 0.0
    if options.device == "cpu":
        num_bytes, _ = run_command(["-c", MEASURE_LIBRARIES], ROOT)
        figures["libraries_mb"] = int(num_bytes) / 1e6

    # 3. The export.
    if importlib.util.find_spec("transformers"):
        loaded, seconds = run_command(["-c", LOAD_BY_TRANSFORMERS], folder / "exported")
        print(loaded.strip())
        figures["seconds"]["load by transformers"] = round(seconds, 2)
    image = sorted((folder / "images").iterdir())[0]
    ask = {
        "--model": folder / "exported",
        "--template": "vicuna",
        "--image": image,
        "--prompt": "What is it?",
        "--max-new-tokens": 8,
        "--device": options.device,
    }
    words = ["answer"]
    for name, value in ask.items():
        words += [name, value]
    _, seconds = run_command([ROOT / "sample.py"], *words)
    figures["seconds"]["load and ask the export"] = round(seconds, 2)
    return figures


def main():
    """Run the benchmark."""
    # 1. The options. A size that is not given is that of the shape.
    options = parse_options(__doc__, **dict.fromkeys(LARGE_RUN, 0))
    sizes = LARGE_RUN if "7b" in options.shape else SMALL_RUN
    for name, size in sizes.items():
        if getattr(options, name) == 0:
            setattr(options, name, size)

    # 2. The run.
    given = ", ".join(f"{option_flag(name)} {getattr(options, name)}" for name in sizes)
    print(f"{heading(options)}\n{given}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        figures = run_all(options, Path(folder))

    # 3. The figures.
    for phase, seconds in figures["seconds"].items():
        print(f"{phase:24}{seconds:10.1f} s")
    print(f"{'peak memory, planned':24}{figures['planned_mb']:10.0f} MB")
    print(f"{'libraries, measured':24}{figures['libraries_mb']:10.0f} MB")
    print(f"{'peak memory, measured':24}{figures['peak_mb']:10.0f} MB")
    write_figures(options, figures)


if __name__ == "__main__":
    main()
