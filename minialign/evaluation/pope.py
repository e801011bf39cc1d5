"""POPE: yes-or-no questions about which objects are in an image (Li et al., arXiv 2305.10355)."""

import re
from dataclasses import replace
from pathlib import Path

from minialign.evaluation.questions import (
    SHORT_ANSWER_SUFFIX,
    Question,
    check_id,
    check_unique_ids,
    find_image,
    question_text,
    read_question_file,
)
from minialign.evaluation.shares import share
from minialign.utils.files import check, read_json_records

MAX_NEW_TOKENS = 128  # the published limit of an answer

# The published splits. A file of questions may be of another split, with any name.
POPE_SPLITS = ("random", "popular", "adversarial")

# LLaVA's file of all splits has no labels. They are in the published files, in these folders
# beside it.
LLAVA_FILE = "llava_pope_test.jsonl"
LABEL_FOLDERS = (".", "coco")

# The object that a published question asks for. It ends at "ima" because one published version
# has a typing error: "Is there an apple in the imange?"
OBJECT = re.compile(r"Is there an? (.+) in the ima")

# The words that make an answer a no, and the word that shows that a yes is meant.
NO_WORDS = frozenset({"No", "not", "no"})
YES = re.compile(r"\byes\b", re.IGNORECASE)


def counts_as_yes(text: str) -> bool:
    """Return whether a text in an answer file means yes, by POPE's published rule to the letter.

    Only the text before the first full stop counts, without its commas. If one of its words is
    exactly "No", "not" or "no", the answer means no. Every other answer means yes, even "NO" and an
    empty one. Words are cut at blanks alone, so "No\\n" means yes. These oddities are kept on
    purpose, because published numbers contain them.
    """
    first_sentence = text.split(".")[0]
    words = first_sentence.replace(",", "").split(" ")
    return NO_WORDS.isdisjoint(words)


def is_unparsed(text: str) -> bool:
    """Return whether a text counts as yes only because the rule finds no "no" in it.

    Such a text has no "yes" in it either: "Nothing.", "NO." and an empty one are examples.
    """
    return counts_as_yes(text) and YES.search(text) is None


def pope_scores(predictions: list[bool], labels: list[bool]) -> dict:
    """Return POPE's scores as shares from 0 to 1, and the number of questions.

    Args:
        predictions: for each question, whether the model answered yes.
        labels: for each question, whether yes is the right answer.

    Accuracy, precision, recall and F1 are those of a classifier whose positive class is yes. `yes`
    is the share of questions that the model answered with yes, which shows a bias towards yes. `n`
    is the number of questions. A score is None where it is a share of nothing: without a yes among
    the answers there is no precision.
    """
    num_correct = 0
    num_true_positives = 0
    for prediction, label in zip(predictions, labels, strict=True):
        num_correct += prediction == label
        num_true_positives += prediction and label

    precision = share(num_true_positives, sum(predictions))
    recall = share(num_true_positives, sum(labels))
    if num_true_positives:
        f1 = 2 * precision * recall / (precision + recall)
    else:
        # F1 is also 2 TP / (2 TP + FP + FN). With TP = 0 this is 0, or None if yes is neither an
        # answer nor a label. The form above would divide by zero.
        f1 = share(0.0, sum(predictions) + sum(labels))

    return {
        "accuracy": share(num_correct, len(labels)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes": share(sum(predictions), len(labels)),
        "n": len(labels),
    }


def score_texts(texts: list[str], labels: list[bool]) -> dict:
    """Return the `pope_scores` of the answers to one split, and the number of `unparsed` ones.

    The texts are scored as they are, white space included.
    """
    predictions = [counts_as_yes(text) for text in texts]
    num_unparsed = sum(is_unparsed(text) for text in texts)
    return pope_scores(predictions, labels) | {"unparsed": num_unparsed}


def score_pope(questions: list[Question], answers: list[str]) -> dict:
    """Return the scores of each split of POPE, and their means.

    They are {"f1": mean, "accuracy": mean, "splits": {split: scores}}. The number that papers
    report is the mean of the three published splits. Another choice of splits has no mean.
    """
    # 1. The answers and labels of each split.
    texts_of = {}
    labels_of = {}
    for question, answer in zip(questions, answers, strict=True):
        record = question.record
        check(
            "label" in record,
            f"question {question.id!r}: its label is not known; put coco_pope_"
            f"{record['category']}.json beside {LLAVA_FILE}",
        )
        texts_of.setdefault(record["category"], []).append(answer)
        labels_of.setdefault(record["category"], []).append(record["label"] == "yes")
    scores_of_splits = {}
    for split, texts in texts_of.items():
        scores_of_splits[split] = score_texts(texts, labels_of[split])

    # 2. The means.
    return {
        "f1": _mean_of_splits(scores_of_splits, "f1"),
        "accuracy": _mean_of_splits(scores_of_splits, "accuracy"),
        "splits": scores_of_splits,
    }


def _mean_of_splits(scores_of_splits, name):
    """Return the mean of a score over the three published splits.

    It is None if there are other splits, or if a split has no such score.
    """
    values = [scores[name] for scores in scores_of_splits.values()]
    if set(scores_of_splits) != set(POPE_SPLITS) or None in values:
        return None
    return sum(values) / len(values)


# --- the published files


def find_pope_files(folder) -> list[Path]:
    """Return the POPE files of a folder: those of the published splits, then the others by name.

    They are called pope_SPLIT.jsonl or .json, perhaps with more in front, as in
    coco_pope_random.json.
    """
    paths = [path for path in sorted(folder.glob("*pope_*")) if _is_pope_file(path)]
    order = {split: i for i, split in enumerate(POPE_SPLITS)}
    return sorted(paths, key=lambda path: order.get(split_of(path), len(order)))


def _is_pope_file(path):
    """Return whether a path with "pope_" in its name is the file of one split.

    LLaVA's file of all splits is not. Nor are hidden files such as ._pope_random.jsonl, which some
    systems put beside each file that they copy.
    """
    is_json = path.suffix in (".json", ".jsonl") and path.name != LLAVA_FILE
    return is_json and not path.name.startswith(".") and path.is_file()


def split_of(path) -> str:
    """Return the split in the name of a POPE file: what follows "pope_", or else the whole name.

    The published files about GQA and A-OKVQA have "seem_", a segmentation model, before the split.
    """
    return Path(path).stem.rpartition("pope_")[2].removeprefix("seem_")


def read_pope(path, image_folder) -> list[Question]:
    """Read the questions of POPE. Each record has its split under "category", and its "label".

    Args:
        path: a published file such as coco_pope_random.json, or the folder of the three, about
            images of COCO, GQA or A-OKVQA. Their questions are asked with LLaVA's prompt.
            Or LLaVA's llava_pope_test.jsonl, which has all splits and no labels. The labels are
            taken from the published files, if these are beside it or in coco/. Without labels the
            questions can be asked, but not scored.
            In a folder with both kinds of files, LLaVA's is not read.
        image_folder: the folder of the images.
    """
    # 1. LLaVA's file.
    path = Path(path)
    paths = find_pope_files(path) if path.is_dir() else [path]
    if not paths and (path / LLAVA_FILE).is_file():
        paths = [path / LLAVA_FILE]
    check(
        paths,
        f"{path}: no POPE file is in this folder; give coco_pope_random.json, "
        f"coco_pope_popular.json and coco_pope_adversarial.json, or {LLAVA_FILE}",
    )
    if _has_all_splits(paths[0]):
        return _read_llava_file(paths[0], image_folder)

    # 2. The published files.
    questions = []
    for split_path in paths_by_split(paths).values():
        questions += _read_split(split_path, image_folder)
    return questions


def _has_all_splits(path):
    """Return whether a file has LLaVA's form, in which a question names its split."""
    first = read_json_records(path)[0]
    return isinstance(first, dict) and "category" in first


def paths_by_split(paths) -> dict[str, Path]:
    """Return files by the split in their names. Raise InputError if two are of one split."""
    path_of = {}
    for path in paths:
        other = path_of.setdefault(split_of(path), path)
        check(other == path, f"{path}: {other.name} is of the same split; give one of them")
    return path_of


def _read_split(path, image_folder):
    """Return the questions of a published file, with LLaVA's prompt."""
    questions = []
    for i, record in enumerate(read_json_records(path), start=1):
        where = f"{path}, record {i}"
        text = question_text(record, "text", where)
        check_id(record.get("question_id"), where)
        _check_label(record.get("label"), where)
        question = Question(
            id=record["question_id"],
            image=find_image(image_folder, record.get("image"), where),
            text=text.removesuffix(SHORT_ANSWER_SUFFIX) + SHORT_ANSWER_SUFFIX,
            record=record | {"category": split_of(path)},
        )
        questions.append(question)
    check_unique_ids(questions, path)
    return questions


def _check_label(label, where):
    """Raise InputError unless a label is "yes" or "no". The published scorer has others as yes."""
    check(label in ("yes", "no"), f'{where}: the label is {label!r}, not "yes" or "no"; restore it')


def _read_llava_file(path, image_folder):
    """Return the questions of LLaVA's file, with the labels of the published files beside it."""
    # 1. The questions of each split.
    questions = read_question_file(path, image_folder)
    check_unique_ids(questions, path)
    questions_of = {}
    for i, question in enumerate(questions, start=1):
        where = f"{path}, record {i}"
        split = question.record.get("category")
        is_split = isinstance(split, str) and Path(split).name == split  # names a file of answers
        check(is_split, f"{where}: 'category' is not a split; restore it")
        _check_label(question.record.get("label", "yes"), where)  # it may be missing
        questions_of.setdefault(split, []).append(question)

    # 2. The files with the labels. Either every split has one, or none has.
    label_paths = []
    for folder in LABEL_FOLDERS:
        label_paths = label_paths or find_pope_files(path.parent / folder)
    if not label_paths:
        return questions
    path_of = paths_by_split(label_paths)
    for split in questions_of:
        check(
            split in path_of,
            f"{path}: no labels of the split {split!r}; put coco_pope_{split}.json beside the "
            "others",
        )

    # 3. The labels, by the position in the split.
    labeled = {}
    for split, questions_of_split in questions_of.items():
        for question in _add_labels(questions_of_split, path, path_of[split]):
            labeled[question.id] = question
    return [labeled[question.id] for question in questions]


def _add_labels(questions, path, label_path):
    """Return the questions of a split with the labels of its published file.

    They belong together by their position in the split, as in the published scorer. There are two
    versions of the random split, so the image and the object of each question are compared too.
    """
    labeled_questions = _read_split(label_path, None)
    remedy = f"give the version of {label_path} that belongs to these questions"
    check(
        len(labeled_questions) == len(questions),
        f"{path}: {len(questions)} questions of this split, but {len(labeled_questions)} labels "
        f"in {label_path}; {remedy}",
    )
    complete = []
    for i, labeled in enumerate(labeled_questions):
        question = questions[i]
        same_image = question.image.name == labeled.image.name
        same_object = _object_of(question.text) == _object_of(labeled.text)
        check(
            same_image and same_object,
            f"{path}: question {question.id!r} is not the one in {label_path}, record {i + 1}; "
            f"{remedy}",
        )
        label = {"label": labeled.record["label"]}
        complete.append(replace(question, record=question.record | label))
    return complete


def _object_of(text):
    """Return the object that a question asks for, or a question in another wording as it is."""
    match = OBJECT.match(text)
    return match[1] if match else text
