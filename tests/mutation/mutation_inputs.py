"""The valid inputs that are mutated, one folder for all of them, and the commands that read them.

The names of the folders occur in no message by chance, so that a message that has one of them
really names the file.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from data_folder import EXAMPLES
from golden.encoder import cases as encoder_cases
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data"))
from tiny_world import benchmarks as miniatures  # noqa: E402

from minialign.evaluation.benchmarks import BENCHMARKS  # noqa: E402

TINY = ROOT / "data" / "tiny"
PICTURE = TINY / "train" / "images" / "0001.png"
TEMPLATE = TINY / "model" / "chat_template.json"

DATA = "--data recs/pairs.json --images pics"
BRIEF = "--limit 2 --batch-size 2 --steps 1 --lora-rank 2 --no-control --eval"
RUN = f"--model ckpt --method bdhs {DATA} {BRIEF} --max-new-tokens 2 --rounds 1"
SCORE = "score --model ckpt --images pics --data"
ANSWER = "answer --model ckpt --image pics/a.png --prompt Q? --max-new-tokens 2"
EVALUATE = "--model ckpt --images evalset/images"
SAMPLE = f"pairs --model ckpt {DATA} --rounds 1 --max-new-tokens 2 --out out.jsonl"
CURATE = f"pairs --model ckpt {DATA} --by data --keep .5 --by-score policy --out out.jsonl"
ANNOTATE = f"{DATA} --annotator"


@dataclass(frozen=True)
class Target:
    """A file to mutate, and the command that reads it. Without a file the command is mutated."""

    command: str  # one of COMMANDS (mutate.py)
    words: str
    path: str = ""  # relative to the folder of inputs
    kind: str = "words"  # json, jsonl, text, safetensors or picture
    weight: int = 1  # how often it is chosen
    writes: str = ""  # a folder that the command writes to, so that it has to be a copy


def data_targets():
    """Return a target for each format of records."""
    targets = []
    for name in EXAMPLES:
        # Supervised data has no pairs to score. `sample.py pairs` reads all formats.
        words = f"{SCORE} recs/{name}.json"
        if name == "llava":
            words = SAMPLE.replace("recs/pairs.json", "recs/llava.json")
        targets.append(Target("sample", words, f"recs/{name}.json", "json", weight=2))
    jsonl = Target("sample", f"{SCORE} recs/lines.jsonl", "recs/lines.jsonl", "jsonl", weight=3)
    return [*targets, jsonl]


def model_targets():
    """Return a target for each file of a checkpoint, of an adapter and of a sentence encoder."""
    targets = []
    for name, kind, weight in (
        ("config.json", "json", 8),
        ("tokenizer.json", "json", 6),
        ("tokenizer_config.json", "json", 4),
        ("generation_config.json", "json", 2),
        ("preprocessor_config.json", "json", 4),
        ("special_tokens_map.json", "json", 1),
        ("processor_config.json", "json", 1),
        ("chat_template.json", "json", 3),
        ("model.safetensors", "safetensors", 6),
    ):
        targets.append(Target("sample", ANSWER, f"ckpt/{name}", kind, weight))
    sharded = ANSWER.replace("ckpt", "shards")
    adapted = f"{ANSWER} --adapter adapt"
    similar = SAMPLE.replace("--rounds 1", "--rounds 1 --similarity simil")
    return [
        *targets,
        Target("sample", sharded, "shards/model.safetensors.index.json", "json", 3),
        Target("sample", adapted, "adapt/adapter_config.json", "json", 3),
        Target("sample", adapted, "adapt/adapter_model.safetensors", "safetensors", 2),
        Target("sample", similar, "simil/config.json", "json", 2),
        Target("sample", similar, "simil/modules.json", "json"),
        Target("sample", similar, "simil/tokenizer.json", "json", 2),
        Target("sample", similar, "simil/model.safetensors", "safetensors"),
    ]


def evaluation_targets():
    """Return the targets of an evaluation, and of annotations."""
    captions = f"{EVALUATE} --captions evalset/captions.json"
    pope = f"{EVALUATE} --pope evalset/pope_random.jsonl"
    truth = f"{ANNOTATE} truth"
    return [
        Target("evaluate", captions, "evalset/captions.json", "json", 4),
        Target("evaluate", pope, "evalset/pope_random.jsonl", "jsonl", 4),
        Target("annotators", truth, "captions.json", "json", 2),
        Target(
            "annotators",
            f"{ANNOTATE} reward:rewards --model ckpt",
            "rewards/score.safetensors",
            "safetensors",
        ),
        Target(
            "annotators", f"{ANNOTATE} reward:rewards --model ckpt", "rewards/config.json", "json"
        ),
    ]


def benchmark_targets():
    """Return the targets of benchmarks whose answers exist: their questions and the answers."""
    targets = []
    for name, questions in (
        ("pope", "coco_pope_popular.json"),
        ("gqa", "testdev_balanced_questions.json"),
        ("textvqa", "TextVQA_0.5.1_val.json"),
        ("coco", "instances_val2014.json"),
        ("mmvet", "mm-vet.json"),
    ):
        words = f"--benchmark {name}=minis/{name} --answers {name}=said/{name}.json"
        kind = "jsonl" if name == "pope" else "json"
        targets.append(Target("evaluate", words, f"minis/{name}/{questions}", kind))
        targets.append(Target("evaluate", words, f"said/{name}.json", "json"))
    return targets


def run_targets():
    """Return the targets of a run that is resumed, which is a copy, because it is written to."""
    resumed = f"{RUN} --out runfolder --resume"
    targets = []
    for name, kind, weight in (
        ("config.json", "json", 2),
        ("metrics.jsonl", "jsonl", 2),
        ("pairs.jsonl", "jsonl", 2),
        ("state.safetensors", "safetensors", 2),
        ("reference.safetensors", "safetensors", 2),
    ):
        target = Target("train", resumed, f"runfolder/{name}", kind, weight, writes="runfolder")
        targets.append(target)
    return targets


def picture_targets():
    """Return the targets of one picture, seen alone, in a batch and on a contact sheet."""
    return [
        Target("sample", ANSWER, "pics/a.png", "picture", 6),
        Target("sample", SAMPLE, "pics/a.png", "picture", 2),
        Target(
            "evaluate",
            f"{EVALUATE} --pope evalset/pope_random.jsonl",
            "evalset/images/a.png",
            "picture",
            2,
        ),
    ]


def word_targets():
    """Return the command lines that are mutated themselves."""
    commands = [
        ("train", f"{RUN} --out out"),
        ("train", f"--method dpo {DATA} --limit 2 --out out"),
        ("train", f"--method rloo {DATA} --reward rewards --limit 2 --out out"),
        ("train", f"--method online-dpo --annotator truth {DATA} --limit 2 --out out"),
        ("sample", SAMPLE),
        ("sample", CURATE),
        ("sample", ANSWER),
        ("sample", f"{SCORE} recs/pairs.json"),
        ("evaluate", f"{EVALUATE} --captions evalset/captions.json"),
        ("annotators", f"{ANNOTATE} truth"),
    ]
    return [Target(command, words, weight=3) for command, words in commands]


def all_targets():
    """Return all targets."""
    return [
        *data_targets(),
        *model_targets(),
        *evaluation_targets(),
        *benchmark_targets(),
        *run_targets(),
        *picture_targets(),
        *word_targets(),
    ]


def write_inputs(folder, run_command):
    """Write all valid inputs into a folder. `run_command(command, words)` makes adapters.

    The run is one that was killed after its last step: it has its state, and no summary.
    """
    write_pictures(folder)
    write_records(folder / "recs")
    (folder / "captions.json").write_text(json.dumps(annotations()))  # beside the pictures' folder
    write_checkpoints(folder)
    write_evaluation_set(folder / "evalset")
    write_benchmarks(folder / "minis", folder / "said")
    encoder_cases.write(folder / "simil", "mpnet")
    run_command("train", f"{RUN} --out runfolder")
    shutil.copytree(folder / "runfolder" / "adapter", folder / "adapt")
    reward = f"--model ckpt --method reward {DATA} {BRIEF} --out rewards"
    run_command("train", reward)


def write_pictures(folder):
    """Write the pictures of all records."""
    (folder / "pics").mkdir()
    shutil.copy(PICTURE, folder / "pics" / "a.png")
    Image.open(PICTURE).convert("RGB").save(folder / "pics" / "b.jpg")


def write_records(folder):
    """Write a file of records for each format."""
    folder.mkdir()
    for name, record in EXAMPLES.items():
        records = [record, {**record, "id": "8"}, {**record, "id": "9"}]
        (folder / f"{name}.json").write_text(json.dumps(records, indent=1))
    lines = [json.dumps({**EXAMPLES["pairs"], "id": str(i)}) + "\n" for i in range(3)]
    (folder / "lines.jsonl").write_text("".join(lines))


def annotations():
    """Return annotations of the picture of all records."""
    return {
        "vocabulary": {"objects": {"cup": ["cup", "mug"], "dog": ["dog"]}, "colours": ["red"]},
        "captions": [
            {
                "image": "a.png",
                "prompt": "Describe the picture.",
                "objects": [{"name": "cup", "colour": "red", "place": "top left"}],
            }
        ],
    }


def write_checkpoints(folder):
    """Write the tiny model, and once more with an index of its tensors, as links."""
    for name in ("ckpt", "shards"):
        (folder / name).mkdir()
        for path in (TINY / "model").iterdir():
            os.symlink(path, folder / name / path.name)
    content = (TINY / "model" / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__", None)
    shard = "model-00001-of-00001.safetensors"
    (folder / "shards" / "model.safetensors").rename(folder / "shards" / shard)
    index = {"metadata": {"total_size": len(content)}, "weight_map": dict.fromkeys(header, shard)}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))


def write_evaluation_set(folder):
    """Write an evaluation set of one picture, with a caption to write and two questions."""
    (folder / "images").mkdir(parents=True)
    shutil.copy(PICTURE, folder / "images" / "a.png")
    (folder / "captions.json").write_text(json.dumps(annotations()))
    lines = []
    for i, (name, label) in enumerate((("cup", "yes"), ("dog", "no"))):
        question = {
            "question_id": i,
            "image": "a.png",
            "text": f"Is there a {name} in the image?",
            "label": label,
        }
        lines.append(json.dumps(question) + "\n")
    (folder / "pope_random.jsonl").write_text("".join(lines))


def write_benchmarks(folder, answer_folder):
    """Write a miniature of each benchmark, and a file of answers to each."""
    miniatures.write_miniatures(folder, 1)
    answer_folder.mkdir()
    for name in miniatures.NAMES:
        answers = []
        for question in BENCHMARKS[name].read(folder / name, None):
            answer = {
                "question_id": question.id,
                "image": question.image.name,
                "prompt": question.text,
                "text": "A red cup.",
            }
            answers.append(answer)
        (answer_folder / f"{name}.json").write_text(json.dumps(answers))


def link_inputs(inputs, workspace, target):
    """Link all inputs into a workspace, and copy the folder that the command writes to.

    The folder of the mutated file is linked file by file, so that the file can be replaced.
    """
    mutated = target.path.split("/")[0]
    for path in inputs.iterdir():
        link = workspace / path.name
        if path.name == target.writes:
            shutil.copytree(path, link)
        elif path.name == mutated and path.is_dir():
            shutil.copytree(path, link, copy_function=os.symlink)
        else:
            os.symlink(path, link)
