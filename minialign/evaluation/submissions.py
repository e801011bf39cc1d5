"""Write answers in the form that a judge's script, a server or a benchmark's own scorer reads."""

from minialign.utils.files import InputError, write_json, write_jsonl
from minialign.utils.messages import print_message


def note_unsubmitted(name, submission, questions):
    """Print why no submission of a benchmark can be written, if so. It is known before asking.

    Empty answers are tried to find this out, since only the questions can lack something.
    """
    if submission is None:
        return
    try:
        submission(questions, [""] * len(questions))
    except InputError as error:
        print_message(f"{name}: no submission will be written: {error}")


def write_submission(path, submission, questions, answers):
    """Write the submission of a benchmark to `path`, if it has one.

    Nothing is written if the questions lack what it needs: `note_unsubmitted` has printed why.

    submission: the function of the benchmark that makes the content (benchmarks.py), or None.
    path: a file, which ends with .json or .jsonl, or a folder for a file of each split of POPE.
    """
    # 1. Make the content.
    if submission is None:
        return
    try:
        content = submission(questions, answers)
    except InputError:
        return

    # 2. Write it.
    if path.suffix == ".jsonl":
        write_jsonl(path, content)
    elif path.suffix == ".json":
        write_json(path, content)
    else:
        for split, records in content.items():
            write_jsonl(path / f"pope_{split}.jsonl", records)
