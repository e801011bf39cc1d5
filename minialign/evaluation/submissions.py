"""Write answers in the form that a judge's script, a server or a benchmark's own scorer reads."""

from minialign.utils.files import InputError, write_json, write_jsonl


def missing_in_questions(function, questions) -> str | None:
    """Return why `function` cannot score or submit these questions, None if it can.

    It is tried with empty answers, so this is known before a model is asked.

    function: that of a benchmark which scores or submits (questions, answers). If the benchmark has
        none, nothing is missing.
    """
    if function is None:
        return None
    try:
        function(questions, [""] * len(questions))
    except InputError as error:
        return str(error)
    return None


def write_submission(path, content):
    """Write the submission of a benchmark.

    path: a file, which ends with .json or .jsonl, or a folder, which gets one file for each split
        of POPE.
    content: what the function of the benchmark returned, {split: records} for a folder.
    """
    if path.suffix == ".jsonl":
        write_jsonl(path, content)
    elif path.suffix == ".json":
        write_json(path, content)
    else:
        for split, records in content.items():
            write_jsonl(path / f"pope_{split}.jsonl", records)
