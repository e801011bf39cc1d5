"""Measure the runs of a study with a train.py that is forked, so that it need not import torch."""

import multiprocessing
import os
import subprocess
from unittest.mock import patch

from processes import run_file
from tiny_study.running import measure_run


def measure_with_forked_training(*arguments, **options):
    """Take the place of `measure_run` in a process of the study's pool."""
    with patch.object(subprocess, "run", run_in_fork):
        measure_run(*arguments, **options)


def run_in_fork(command, *, stdout, stderr, env, check):
    """Take the place of `subprocess.run` for a script."""
    _, script, *words = map(str, command)
    process = multiprocessing.get_context("fork").Process(
        target=run_script_in_fork, args=(script, words, stdout.fileno(), env)
    )
    process.start()
    process.join()
    return subprocess.CompletedProcess(command, process.exitcode)


def run_script_in_fork(script, words, log, env):
    """Run a script whose output goes to the file with the number `log`."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(env)
    run_file(script, *words)
