"""Say on what machine and with what options a benchmark ran, and write its figures as JSON."""

import platform
import re
from pathlib import Path

import torch
from common import num_image_tokens
from timing import choose_clock

from minialign.utils.files import write_json


def describe_run(options):
    """Return the machine, the versions and every option."""
    device = cpu_name()
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    option_values = dict(vars(options))
    del option_values["out"]
    return {
        "device": device,
        "torch": torch.__version__,
        "clock": choose_clock(options).__name__,
        "options": option_values,
    }


def cpu_name():
    """Return the model of the CPU, and how many threads torch uses."""
    name = platform.processor() or platform.machine()
    cpu_info = Path("/", "proc", "cpuinfo")
    if cpu_info.exists():
        match = re.search(r"^model name\s*: (.*)$", cpu_info.read_text(), re.MULTILINE)
        if match:
            name = match[1]
    return f"{name}, {torch.get_num_threads()} threads"


def heading(options, clock=None):
    """Return the line above a table.

    clock: the name of the timer, if it is another one than that of `alternate`.
    """
    run = describe_run(options)
    return (
        f"{run['device']}, torch {run['torch']}, {options.dtype}, shape {options.shape}, "
        f"{num_image_tokens(options)} image tokens, {options.repeats} repeats, "
        f"{clock or run['clock']}"
    )


def write_figures(options, figures):
    """Write the figures of a benchmark as JSON if `--out` names a file."""
    if options.out:
        content = describe_run(options)
        content.update(figures)
        write_json(options.out, content)
