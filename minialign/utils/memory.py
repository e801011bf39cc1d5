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

# 256 MiB: a larger tensor is no part of the heap, and still goes back to the system at once.
KEPT_TENSOR_BYTES = 1 << 28
# 1 GiB: if more than this is free at the end of the heap, nearly all of it goes back.
KEPT_BYTES = 1 << 30


def keep_freed_memory():
    """Let the C library keep freed memory.

    No result changes. The process takes less time, and holds memory that it does not use at the
    moment. Has no effect with another C library than glibc, or with one that refuses the sizes.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    # Each of the two settings ends glibc's own adjustment of the other, so both are made or none.
    is_accepted = mallopt(M_MMAP_THRESHOLD, KEPT_TENSOR_BYTES)
    if is_accepted:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
