"""Write a miniature of each of the paper's benchmarks, in its published form, from the tiny world.

    python data/tiny_world/benchmarks.py --out OUT

The files have the names and the fields of the real ones, so that one command can be tried before
gigabytes are downloaded. The numbers mean nothing: the questions are few, and MMHal-Bench asks
about the same images again and again.
"""

import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

from minialign.evaluation.coco import coco_vocabulary  # noqa: E402
from minialign.evaluation.judged import MMHAL_TYPES, NUM_MMHAL_QUESTIONS  # noqa: E402
from minialign.utils.cli import Parser, check_new, number_type, run_script  # noqa: E402
from minialign.utils.files import (  # noqa: E402
    InputError,
    read_json,
    read_jsonl,
    write_errors,
    write_json,
    write_jsonl,
)

TINY_SET = ROOT / "data" / "tiny" / "final" / "balanced"
SPLITS = ("random", "popular", "adversarial")
NAMES = ("pope", "mmhal", "llava-bench", "textvqa", "gqa", "mmvet", "coco")


def main():
    """Write the miniatures, and print the command that asks all of them."""
    parser = Parser(
        prog="python data/tiny_world/benchmarks.py", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", required=True, help="new folder")
    parser.add_argument(
        "--num-images",
        type=number_type(int, 1, 300),
        default=12,
        help="how many images of data/tiny/final/balanced the questions are about",
    )
    options = parser.parse_args()
    check_new(options.out)
    write_miniatures(Path(options.out), options.num_images)

    words = ["python", "-m", "minialign.evaluate", "--model", "data/tiny/model", "--benchmark"]
    words += [f"{name}={options.out}/{name}" for name in NAMES]
    words += ["--images", f"{options.out}/images", "--out", f"{options.out}/results"]
    print(shlex.join(words))


def write_miniatures(out, num_images):
    """Write a folder for each benchmark, and the images of all of them."""
    captions = read_json(TINY_SET / "captions.json")["captions"][:num_images]
    copy_images(captions, out / "images")
    write_pope(captions, out / "pope")
    write_gqa(captions, out / "gqa")
    write_textvqa(captions, out / "textvqa")
    write_judged(captions, out)
    write_coco(captions, out / "coco")


def image_id(caption) -> str:
    """Return the name that COCO would give to an image, without its ending."""
    return f"COCO_val2014_{int(Path(caption['image']).stem):012d}"


def copy_images(captions, folder):
    """Copy the images. Their content says that they are PNG, whatever their names say."""
    with write_errors(folder):  # on a full disk the system names the image that is read
        folder.mkdir(parents=True)
        for caption in captions:
            source = TINY_SET / "images" / caption["image"]
            shutil.copy(source, folder / f"{image_id(caption)}.jpg")


def write_pope(captions, folder):
    """Write the three files of POPE."""
    id_of = {caption["image"]: image_id(caption) for caption in captions}
    for split in SPLITS:
        questions = []
        for question in read_jsonl(TINY_SET / f"pope_{split}.jsonl"):
            if question["image"] in id_of:
                name = f"{id_of[question['image']]}.jpg"
                questions.append(question | {"image": name})
        write_jsonl(folder / f"coco_pope_{split}.json", questions)


def color_questions(captions) -> list[tuple[dict, str, str]]:
    """Return a (caption, question, color) for each object."""
    questions = []
    for caption in captions:
        for item in caption["objects"]:
            questions.append((caption, f"What color is the {item['name']}?", item["colour"]))
    return questions


def write_gqa(captions, folder):
    """Write GQA's questions: open ones about colors, binary ones about objects."""
    records = {}
    for i, (caption, question, color) in enumerate(color_questions(captions)):
        records[f"1{i:04d}"] = gqa_record(caption, question, color, "query")
    for i, caption in enumerate(captions):
        name = caption["objects"][0]["name"]
        records[f"2{i:04d}"] = gqa_record(caption, f"Is there a {name}?", "yes", "verify")
    write_json(folder / "testdev_balanced_questions.json", records)


def gqa_record(caption, question, answer, structural_type) -> dict:
    """Return a question in GQA's form."""
    return {
        "question": question,
        "imageId": image_id(caption),
        "answer": answer,
        "isBalanced": True,
        "types": {"structural": structural_type, "semantic": "attr", "detailed": "tiny"},
    }


def write_textvqa(captions, folder):
    """Write TextVQA's questions. The ten people agree, and nothing is written in the images."""
    records = []
    for i, (caption, question, color) in enumerate(color_questions(captions)):
        record = {
            "question_id": 34602 + i,
            "question": question,
            "image_id": image_id(caption),
            "answers": [color] * 10,
        }
        records.append(record)
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": records})


def write_judged(captions, out):
    """Write the questions of the benchmarks that a larger model judges."""
    # 1. MM-Vet and LLaVA-Bench: the requests of the tiny world.
    mmvet = {}
    llava_bench = []
    for i, caption in enumerate(captions):
        name = f"{image_id(caption)}.jpg"
        objects = "<AND>".join(item["name"] for item in caption["objects"])
        question = caption["prompt"]
        mmvet[f"v1_{i}"] = {
            "imagename": name,
            "question": question,
            "answer": objects,
            "capability": ["rec"],
        }
        record = {"question_id": i, "image": name, "text": question, "category": "detail"}
        llava_bench.append(record)
    write_json(out / "mmvet" / "mm-vet.json", mmvet)
    write_jsonl(out / "llava-bench" / "questions.jsonl", llava_bench)

    # 2. MMHal-Bench: its published script takes exactly 96 questions.
    mmhal = []
    for i in range(NUM_MMHAL_QUESTIONS):
        caption = captions[i % len(captions)]
        record = {
            "question_type": MMHAL_TYPES[i % len(MMHAL_TYPES)],
            "question_topic": "tiny",
            "image_src": f"https://example.org/{image_id(caption)}.jpg",
            "image_content": [item["name"] for item in caption["objects"]],
            "question": caption["prompt"],
            "gt_answer": ", ".join(item["name"] for item in caption["objects"]),
            "model_answer": "",
        }
        mmhal.append(record)
    write_json(out / "mmhal" / "response_template.json", mmhal)


def write_coco(captions, folder):
    """Write COCO's annotations of the objects that COCO knows."""
    # 1. The categories.
    names = {}
    for caption in captions:
        for item in caption["objects"]:
            name = coco_name(item["name"])
            if name:
                names.setdefault(name, len(names) + 1)

    # 2. Instances and captions of each image.
    images = []
    instances = []
    references = []
    for caption in captions:
        number = int(Path(caption["image"]).stem)
        images.append({"id": number, "file_name": f"{image_id(caption)}.jpg"})
        objects = [item["name"] for item in caption["objects"]]
        text = f"There is a {' and a '.join(objects)}."
        references.append({"id": number, "image_id": number, "caption": text})
        for name in objects:
            if coco_name(name):
                category_id = names[coco_name(name)]
                instances.append({"image_id": number, "category_id": category_id})
    categories = [{"id": number, "name": name} for name, number in names.items()]
    content = {"images": images, "annotations": instances, "categories": categories}
    write_json(folder / "instances_val2014.json", content)
    write_json(folder / "captions_val2014.json", {"images": images, "annotations": references})


def coco_name(name) -> str | None:
    """Return COCO's name of an object of the tiny world, None if it has none."""
    try:
        return coco_vocabulary().object_name(name, "tiny world")
    except InputError:
        return None


if __name__ == "__main__":
    sys.exit(run_script(main))
