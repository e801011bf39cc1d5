"""The benchmarks of the paper by name: how each is read, asked and scored, and the table of them.

OUT/NAME.answers.jsonl   the answers to one benchmark (benchmark_answers.py)
OUT/NAME.judge.json(l)   the answers in the form that the published script of its judge reads
OUT/scores.json          the scores of all benchmarks by name
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from minialign.data.images import check_images
from minialign.evaluation import judged
from minialign.evaluation.benchmark_answers import ask_benchmark, question_settings
from minialign.evaluation.questions import Question, match_answers, read_answers
from minialign.evaluation.shares import NO_VALUE
from minialign.models.checkpoint import fingerprint
from minialign.utils.cli import check_new, resume_hint
from minialign.utils.files import check, write_json, write_jsonl
from minialign.utils.locks import file_lock
from minialign.utils.messages import print_message

ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."
SCORES_FILE = "scores.json"
BASE_MODEL = "LLaVA-1.6-7B, the paper's"


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is read, asked and scored. Each function is in the module of its own."""

    column: str  # its column in the tables of the paper
    paper: float  # what the paper reports for LLaVA-1.6-7B, which it aligns
    read: Callable[[Path, Path | None], list[Question]]
    max_new_tokens: int  # the published length of an answer
    prompt: str  # the end of every question, or the whole of it, as published
    score: Callable | None = None  # (questions, answers) -> scores
    result: Callable | None = None  # scores -> the number of the column
    # For benchmarks that a larger model judges: (questions, answers) -> what its script reads.
    answer_file: Callable | None = None
    answer_file_name: str = ""


# In the order of the paper's columns. MMHal-Bench and MMHal-Bench-V differ in the judge alone.
BENCHMARKS: dict[str, Benchmark] = {}

BENCHMARKS["mmhal"] = Benchmark(
    column="MMHal-V",
    paper=2.75,
    read=judged.read_mmhal,
    max_new_tokens=judged.MAX_NEW_TOKENS,
    prompt="",
    answer_file=judged.mmhal_answer_file,
    answer_file_name="mmhal.judge.json",
)

BENCHMARKS["llava-bench"] = Benchmark(
    column="LLaVA-W",
    paper=80.85,
    read=judged.read_llava_bench,
    max_new_tokens=judged.MAX_NEW_TOKENS,
    prompt="",
    answer_file=judged.llava_bench_answer_file,
    answer_file_name="llava-bench.judge.jsonl",
)

BENCHMARKS["mmvet"] = Benchmark(
    column="MM-Vet",
    paper=43.94,
    read=judged.read_mmvet,
    max_new_tokens=judged.MAX_NEW_TOKENS,
    prompt="",
    answer_file=judged.mmvet_answer_file,
    answer_file_name="mmvet.judge.json",
)


def read_benchmarks(paths: dict, folders: dict, prompts: dict) -> dict[str, list[Question]]:
    """Read the questions of several benchmarks.

    Args:
        paths: name: the published file, or its folder.
        folders: name: the folder of the images. Without one no image is looked for.
        prompts: name: what ends every question in place of the published text.
    """
    questions_of = {}
    for name, path in paths.items():
        questions = BENCHMARKS[name].read(path, folders.get(name))
        if name in prompts:
            questions = change_prompts(questions, BENCHMARKS[name].prompt, prompts[name])
        questions_of[name] = questions
    return questions_of


def change_prompts(questions, published, prompt) -> list[Question]:
    """Return the questions with another text in place of the published end of each.

    Where the published text is the whole question, so is the new one.
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
        options: those of `evaluate.py`, checked, with a dict by name for each of --benchmark,
            --images, --answers, --max-new-tokens and --prompt.
        load_model: returns the model. It is called if a benchmark is to be asked.
    """
    # 1. Find what is wrong with the input before any work.
    if options.out:
        check_out(options.out, options.resume)
    questions_of = read_benchmarks(options.benchmark, options.images, options.prompt)
    answers_of = {}
    for name, path in options.answers.items():
        answers_of[name] = read_answer_file(questions_of[name], path)
    asked = {name: items for name, items in questions_of.items() if name not in answers_of}
    for questions in asked.values():
        check_images(question.image for question in questions)

    # 2. Ask the rest, and score.
    if not options.out:
        return score_benchmarks(questions_of, answers_of)
    out = Path(options.out)
    with file_lock(out / ".lock", out):
        if asked:
            with resume_hint(out):
                answers_of |= ask_benchmarks(load_model(), asked, options)

        # 3. Write the scores, and what the scripts of the judges read.
        for name, questions in questions_of.items():
            write_judge_file(name, questions, answers_of[name], out)
        scores = score_benchmarks(questions_of, answers_of)
        write_json(out / SCORES_FILE, scores)
    return scores


def check_out(out, resume):
    """Raise InputError if the folder of the answers cannot be written to, or is not to be."""
    if Path(out).is_dir():
        check(resume, f"{out}: exists already; give --resume to go on, or another --out")
    else:
        check_new(out)


def ask_benchmarks(vlm, asked, options) -> dict[str, list[str]]:
    """Ask a model the questions of several benchmarks. Return the answers by name."""
    answers_of = {}
    for name, questions in asked.items():
        max_new_tokens = options.max_new_tokens.get(name, BENCHMARKS[name].max_new_tokens)
        print_message(describe_asking(name, questions, max_new_tokens, options.contrast))
        decoding = {"max_new_tokens": max_new_tokens, "contrast": options.contrast}
        settings = {
            "model": str(options.model),
            "adapter": options.adapter,
            "weights": fingerprint(vlm.model),
            "template": vlm.template,
            **decoding,
            **question_settings(questions),
        }
        answers_of[name] = ask_benchmark(
            vlm, name, questions, options.out, settings=settings, decoding=decoding
        )
    return answers_of


def describe_asking(name, questions, max_new_tokens, contrast) -> str:
    """Return one line that says how the questions of a benchmark are asked."""
    decoding = f"contrast {contrast:g}" if contrast else "greedy"
    return (
        f"{name}: {len(questions)} questions, {decoding}, up to {max_new_tokens} new tokens; "
        f"the first is {questions[0].text!r}"
    )


def read_answer_file(questions, path) -> list[str]:
    """Return the answers that an answer file holds, in the order of the questions."""
    return match_answers(questions, read_answers(path), path)


def score_benchmarks(questions_of, answers_of) -> dict[str, dict]:
    """Return the scores of each benchmark. A judged one has none before the judge was asked."""
    scores = {}
    for name, questions in questions_of.items():
        score = BENCHMARKS[name].score
        if score is None:
            scores[name] = {"n": len(questions)}
        else:
            scores[name] = score(questions, answers_of[name])
    return scores


def write_judge_file(name, questions, answers, out) -> Path | None:
    """Write what the published script of a judge reads. Return its path, None if none judges."""
    benchmark = BENCHMARKS[name]
    if benchmark.answer_file is None:
        return None
    path = Path(out) / benchmark.answer_file_name
    content = benchmark.answer_file(questions, answers)
    if path.suffix == ".jsonl":
        write_jsonl(path, content)
    else:
        write_json(path, content)
    return path


def benchmark_table(scores: dict[str, dict], model_name: str = "this model") -> str:
    """Return a Markdown table: the scores of a model, and the paper's for the model it aligns.

    An empty cell was not measured, a dash is for the judge to fill or a share of nothing.
    """
    headings = ["model"]
    cells = [model_name]
    paper_cells = [BASE_MODEL]
    for name, benchmark in BENCHMARKS.items():
        headings.append(benchmark.column)
        cells.append(_result_text(benchmark, scores[name]) if name in scores else "")
        paper_cells.append(f"{benchmark.paper:.2f}")
    rows = [headings, ["---"] * len(headings), cells, paper_cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _result_text(benchmark, scores):
    """Return the cell of a benchmark, in percent."""
    value = benchmark.result(scores) if benchmark.result else None
    return NO_VALUE if value is None else f"{100 * value:.2f}"
