"""Keep freed memory in the process, so that the next tensor need not ask the system for it.

The C library returns what a large tensor has used to the system as soon as the tensor is freed. The
system fills every page with zeros before it gives it out again. A training step or a batch of
answers frees hundreds of megabytes and asks for as many a moment later. Without this a tenth of the
time of a run on a CPU goes into these pages.
"""

import ctypes
import platform

# Names and numbers of malloc.h. `man mallopt` describes them.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

KEPT_TENSOR_BYTES = 1 << 28  # a larger tensor goes back to the system at once
KEPT_BYTES = 1 << 30  # of free memory at the end of the heap, what is beyond goes back


def keep_freed_memory():
    """Let the C library keep freed memory. Only the time that a run takes changes.

    Has no effect with another C library than glibc, or with one that refuses the sizes.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # Each of the two settings ends glibc's own adjustment of the other, so both are made or none.
    is_accepted = mallopt(M_MMAP_THRESHOLD, KEPT_TENSOR_BYTES)
    if is_accepted:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
