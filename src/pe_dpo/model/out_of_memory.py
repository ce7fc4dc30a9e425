"""Memory that ran out, in all the words of torch and the libraries below it."""

import torch

SPELLINGS = (
    "out of memory",  # the caching allocator, CUDA itself, a child process
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its workspace did not fit
    "CUDNN_STATUS_ALLOC_FAILED",
    "can't allocate memory",  # the CPU's allocator
    "not enough memory",  # the same on Windows
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out, on the device or on the host.

    torch.OutOfMemoryError comes from the caching allocator alone: cuBLAS, CUDA (torch.AcceleratorError) and the allocator of a
    CPU raise plain errors with words of their own.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(spelling in str(error) for spelling in SPELLINGS)
