"""Freed memory stays in the process."""

import platform
import resource

import pytest
import torch
from processes import RunningProcess

from minialign.utils.cli import run_script
from minialign.utils.memory import KEPT_BYTES, KEPT_TENSOR_BYTES

NUM_BYTES = 40 << 20  # more than glibc ever keeps by itself
NUM_TENSORS = 4
NUM_PAGES = NUM_TENSORS * NUM_BYTES // resource.getpagesize()  # of all tensors


def count_page_faults():
    """Free a large tensor. Print how many pages the system gives out for smaller ones after it."""
    torch.ones(5 * NUM_BYTES, dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(NUM_TENSORS):
        torch.ones(NUM_BYTES, dtype=torch.uint8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def count_page_faults_in_script():
    """Do the same inside a script."""
    run_script(count_page_faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_script_uses_freed_memory_again():
    """Outside of a script the system gives out all pages of each tensor anew."""
    outside = RunningProcess(count_page_faults).wait()
    inside = RunningProcess(count_page_faults_in_script).wait()

    assert int(outside.stdout) > 0.9 * NUM_PAGES
    assert int(inside.stdout) < 0.1 * NUM_PAGES


def test_the_sizes_fit_the_c_int_that_mallopt_takes():
    assert KEPT_TENSOR_BYTES < KEPT_BYTES < 1 << 31
