"""The benchmarks of the paper by name: how each is read, asked and scored, and the table of them.

OUT/NAME.answers.jsonl   the answers to one benchmark (benchmark_answers.py)
OUT/NAME.submission*     the answers in the form that a judge's script, a server or a scorer reads
OUT/scores.json          the scores of all benchmarks by name
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from minialign.data.images import check_images
from minialign.evaluation import coco, coco_captions, gqa, judged, pope, textvqa
from minialign.evaluation.answers import check_questions
from minialign.evaluation.benchmark_answers import ask_benchmark, question_settings
from minialign.evaluation.pope_answers import pope_answer_file, read_pope_answers
from minialign.evaluation.questions import (
    SHORT_ANSWER_SUFFIX,
    Question,
    match_answers,
    read_answers,
)
from minialign.evaluation.shares import NO_VALUE
from minialign.evaluation.submissions import missing_in_questions, write_submission
from minialign.models.checkpoint import fingerprint
from minialign.utils.cli import check_new, resume_hint
from minialign.utils.digests import file_digest
from minialign.utils.distributed import barrier
from minialign.utils.files import check, write_json
from minialign.utils.locks import file_lock
from minialign.utils.messages import print_message
from minialign.utils.text_tables import aligned_table

SCORES_FILE = "scores.json"
BASE_MODEL = "LLaVA-1.6-7B, the paper's"


def read_plain_answers(questions, path) -> list[str]:
    """Return the answers of a file in LLaVA's form, in the order of the questions."""
    return match_answers(questions, read_answers(path), path)


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read, asked and scored. The functions are those of its module."""

    column: str  # its column in the tables of the paper
    paper: float  # the number in that column for LLaVA-1.6-7B, the model that the paper aligns
    read: Callable  # (path, image folder or None) -> questions
    max_new_tokens: int  # the published limit of an answer
    prompt: str = ""  # the published text that ends every question, or is the whole of it (coco)
    read_answers: Callable = read_plain_answers  # (questions, path) -> answers
    score: Callable | None = None  # (questions, answers) -> scores; None if a judge scores
    result: str = ""  # the name of the score that the column shows, in percent
    # (questions, answers) -> content of the file that a judge's script, a server or a scorer reads.
    submission: Callable | None = None
    submission_ending: str = ".json"


# In the order of the paper's columns. MMHal-Bench and MMHal-Bench-V differ in the judge alone.
BENCHMARKS: dict[str, Benchmark] = {}

BENCHMARKS["pope"] = Benchmark(
    column="POPE",
    paper=86.40,
    read=pope.read_pope,
    max_new_tokens=pope.MAX_NEW_TOKENS,
    prompt=SHORT_ANSWER_SUFFIX,
    read_answers=read_pope_answers,
    score=pope.score_pope,
    result="f1",
    submission=pope_answer_file,
    submission_ending="",  # a folder with a file for each split
)

BENCHMARKS["mmhal"] = Benchmark(
    column="MMHal-V",
    paper=2.75,
    read=judged.read_mmhal,
    max_new_tokens=judged.MAX_NEW_TOKENS,
    submission=judged.mmhal_answer_file,
)

BENCHMARKS["llava-bench"] = Benchmark(
    column="LLaVA-W",
    paper=80.85,
    read=judged.read_llava_bench,
    max_new_tokens=judged.MAX_NEW_TOKENS,
    submission=judged.llava_bench_answer_file,
    submission_ending=".jsonl",
)

BENCHMARKS["textvqa"] = Benchmark(
    column="TextVQA",
    paper=64.85,
    read=textvqa.read_textvqa,
    max_new_tokens=textvqa.MAX_NEW_TOKENS,
    prompt=SHORT_ANSWER_SUFFIX,
    read_answers=textvqa.read_textvqa_answers,
    score=textvqa.score_textvqa,
    result="accuracy",
    submission=textvqa.textvqa_answer_file,
)

BENCHMARKS["gqa"] = Benchmark(
    column="GQA",
    paper=64.23,
    read=gqa.read_gqa,
    max_new_tokens=gqa.MAX_NEW_TOKENS,
    prompt=SHORT_ANSWER_SUFFIX,
    read_answers=gqa.read_gqa_answers,
    score=gqa.score_gqa,
    result="accuracy",
    submission=gqa.gqa_answer_file,
)

BENCHMARKS["mmvet"] = Benchmark(
    column="MM-Vet",
    paper=43.94,
    read=judged.read_mmvet,
    max_new_tokens=judged.MAX_NEW_TOKENS,
    submission=judged.mmvet_answer_file,
)

BENCHMARKS["coco"] = Benchmark(
    column="Recall",
    paper=68.13,
    read=coco.read_coco,
    max_new_tokens=coco.MAX_NEW_TOKENS,
    prompt=coco.PROMPT,
    score=coco.score_coco,
    result="recall",
)


def read_questions(name, options) -> list[Question]:
    """Read the questions of a benchmark that is to be asked, with the --prompt of the options."""
    benchmark = BENCHMARKS[name]
    path = options.benchmark[name]
    folder = options.images.get(name)
    if name == "coco" and options.coco_list:
        image_ids = coco_captions.read_image_ids(options.coco_list)
        questions = coco.read_coco(path, folder, image_ids)
    else:
        questions = benchmark.read(path, folder)
    if name in options.prompt:
        questions = change_prompts(questions, benchmark.prompt, options.prompt[name])
    return questions


def read_answered_questions(name, options) -> tuple[list[Question], list[str]]:
    """Read the questions of a benchmark and the answers of its answer file.

    For COCO the captions come first: they say which images are questions. An image that has
    several captions is a question as many times.
    """
    path = options.benchmark[name]
    folder = options.images.get(name)
    answers_path = options.answers[name]
    if name == "coco":
        captions = coco_captions.read_coco_captions(answers_path)
        image_ids = [image_id for image_id, _ in captions]
        return coco.read_coco(path, folder, image_ids), [caption for _, caption in captions]
    questions = BENCHMARKS[name].read(path, folder)
    return questions, BENCHMARKS[name].read_answers(questions, answers_path)


def change_prompts(questions, published, prompt) -> list[Question]:
    """Return the questions with the text `prompt` in place of the `published` end of each.

    If the published text is the whole question, the new text is the whole question too.
    """
    changed = []
    for question in questions:
        beginning = question.text.removesuffix(published).rstrip("\n")
        lines = [line for line in (beginning, prompt) if line]
        check(lines, f"question {question.id}: would be empty; give another --prompt")
        changed.append(replace(question, text="\n".join(lines)))
    return changed


def measure_benchmarks(options, load_model) -> dict[str, dict]:
    """Return the scores of each benchmark of the options, by name.

    Args:
        options: those of `evaluate.py` after `check_benchmark_options`, which makes a dict
            {benchmark: value} of --benchmark, --images, --answers, --max-new-tokens and --prompt.
        load_model: a function that returns the model. It is called only if a benchmark is asked.
    """
    # 1. Find what is wrong with the input before any work.
    if options.out:
        check_out(options)
    questions_of = {}
    answers_of = {}
    asked = {}  # the questions of the benchmarks that have no answer file
    for name in options.benchmark:
        if name in options.answers:
            questions_of[name], answers_of[name] = read_answered_questions(name, options)
        else:
            questions_of[name] = read_questions(name, options)
            asked[name] = questions_of[name]
            check_question_images(asked[name], options.benchmark[name])

    # 2. Score the answers of files, so that a bad one is found before a model is asked.
    scores = {}
    for name, answers in answers_of.items():
        scores[name] = score_benchmark(name, questions_of[name], answers)

    # 3. Without a folder nothing is asked or written. The check of the options demands one unless
    #    every benchmark has an answer file.
    if not options.out:
        return scores

    # 4. Say what cannot be scored or submitted, and ask.
    scoring = {name: BENCHMARKS[name].score for name in asked}
    unscored = find_lacking(asked, scoring, "its answers will not be scored")
    submitting = {name: BENCHMARKS[name].submission for name in questions_of}
    unsubmitted = find_lacking(questions_of, submitting, "no submission will be written")
    barrier()  # all processes have looked for the folder before one of them makes it
    out = Path(options.out)
    with file_lock(out / ".lock", out):
        if asked:
            with resume_hint(out):
                answers_of |= ask_benchmarks(load_model(), asked, options)
        for name, questions in asked.items():
            scores[name] = {"n": len(questions)}
            if name not in unscored:
                scores[name] = score_benchmark(name, questions, answers_of[name])

        # 5. Write the scores, and the files for judges, servers and scorers.
        write_json(out / SCORES_FILE, scores)
        for name, questions in questions_of.items():
            benchmark = BENCHMARKS[name]
            if benchmark.submission is not None and name not in unsubmitted:
                path = out / f"{name}.submission{benchmark.submission_ending}"
                write_submission(path, benchmark.submission(questions, answers_of[name]))
    return scores


def check_question_images(questions, path):
    """Raise InputError, which names the question, unless the image of each can be opened."""
    check_images((question.image, f"{path}, question {question.id!r}") for question in questions)


def check_out(options):
    """Raise InputError if the folder of the answers cannot be made, or is there without --resume.

    If all answers are given, nothing is asked that could be resumed.
    """
    is_asked = not options.benchmark.keys() <= options.answers.keys()
    if is_asked and Path(options.out).is_dir():
        check(
            options.resume,
            f"{options.out}: exists already; give --resume to go on, or another --out",
        )
    else:
        check_new(options.out)


def ask_benchmarks(vlm, asked, options) -> dict[str, list[str]]:
    """Ask a model the questions of several benchmarks. Return the answers by name."""
    # 1. A question that cannot be asked is found before any is, which may take hours.
    for name, questions in asked.items():
        placed = []
        for question in questions:
            place = f"{options.benchmark[name]}, question {question.id!r}"
            placed.append(((str(question.image),), question.text, place))
        check_questions(vlm, placed)

    # 2. Ask one benchmark after the other.
    answers_of = {}
    for name, questions in asked.items():
        max_new_tokens = options.max_new_tokens.get(name, BENCHMARKS[name].max_new_tokens)
        print_message(describe_asking(name, questions, max_new_tokens, options.contrast))
        decoding = {"max_new_tokens": max_new_tokens, "contrast": options.contrast}
        settings = {**model_settings(vlm, options), **decoding, **question_settings(questions)}
        answers_of[name] = ask_benchmark(
            vlm, name, questions, options.out, settings=settings, decoding=decoding
        )
    return answers_of


def model_settings(vlm, options) -> dict:
    """Return what answers depend on besides the questions and the decoding: the model."""
    settings = {
        "model": str(options.model),
        "adapter": options.adapter,
        "weights": fingerprint(vlm.model),
        "template": vlm.template,
        "system": vlm.system,
        **vlm.file_digests,
    }
    if options.adapter:
        # Its lora_alpha scales the adapter, and no weight shows it.
        config_file = Path(options.adapter, "adapter_config.json")
        settings[str(config_file)] = file_digest(config_file)
    return settings


def describe_asking(name, questions, max_new_tokens, contrast) -> str:
    """Return one line that says how the questions of a benchmark are asked."""
    decoding = f"contrast {contrast:g}" if contrast else "greedy"
    return (
        f"{name}: {len(questions)} questions, {decoding}, up to {max_new_tokens} new tokens; "
        f"the first is {questions[0].text!r}"
    )


def find_lacking(questions_of, functions, consequence) -> set[str]:
    """Return the benchmarks whose questions lack what a function reads in them, and print what.

    questions_of: {name of a benchmark: its questions}.
    functions: {name of a benchmark: its function that scores or submits, None if it has none}.
    consequence: what will not be done with the answers.
    """
    lacking = set()
    for name, questions in questions_of.items():
        missing = missing_in_questions(functions[name], questions)
        if missing is not None:
            print_message(f"{name}: {consequence}: {missing}")
            lacking.add(name)
    return lacking


def score_benchmark(name, questions, answers) -> dict:
    """Return the scores of a benchmark, or only the number of questions if a judge scores it."""
    score = BENCHMARKS[name].score
    if score is None:
        return {"n": len(questions)}
    return score(questions, answers)


def benchmark_table(scores: dict[str, dict], model_name: str = "this model") -> str:
    """Return a table: the scores of a model, and the paper's for the model that it aligns.

    A cell is empty if the benchmark was not measured. It is a dash if there is no score: a judge
    has to read the answers first, or the right answers were missing.
    """
    headings = ["model"]
    cells = [model_name]
    paper_cells = [BASE_MODEL]
    for name, benchmark in BENCHMARKS.items():
        headings.append(benchmark.column)
        cells.append(_result_text(benchmark, scores[name]) if name in scores else "")
        paper_cells.append(f"{benchmark.paper:.2f}")
    return aligned_table(headings, [cells, paper_cells])


def _result_text(benchmark, scores):
    """Return the cell of a benchmark, in percent."""
    value = scores.get(benchmark.result)
    return NO_VALUE if value is None else f"{100 * value:.2f}"
