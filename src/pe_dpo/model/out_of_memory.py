"""Memory that ran out, in all the words of torch and the libraries below it; and how much a machine has."""

import errno
from pathlib import Path

import psutil
import torch

SPELLINGS = (
    "out of memory",  # the caching allocator, CUDA itself, a child process
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its workspace did not fit
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # the CPU's allocator
    "not enough memory",  # the same on Windows
    "bad_alloc",  # C++ below torch
    "Cannot allocate memory",  # the system: a file that is mapped, a process that is forked
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out, on the device or on the host.

    torch.OutOfMemoryError comes from the caching allocator alone: cuBLAS, CUDA (torch.AcceleratorError) and the allocator of a
    CPU raise plain errors with words of their own.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):  # NumPy's and Arrow's own are MemoryErrors
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(spelling in str(error) for spelling in SPELLINGS)


def host_memory() -> int:
    """Return the bytes of the machine's memory, or what a container may take of it."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or none with a limit
        return total
