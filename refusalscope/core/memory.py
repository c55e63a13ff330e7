"""Running out of memory, told apart from every other fault; and memory handed back."""

import ctypes
import errno


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at a time may do: torch's allocators on any device, numpy's, Python's, and the system's refusals."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if isinstance(error, Exception) and should_reduce_batch_size(error):
        return True
    # A file that could not be mapped, a thread that found no room for its stack.
    return isinstance(error, RuntimeError) and str(error).endswith(
        ("Cannot allocate memory (12)", "can't start new thread")
    )


def give_back() -> None:
    """Hand to the system what the C library's heap still holds of tensors that are gone.

    It keeps whatever lies below a block that is in use, more than a gigabyte after the gradients of a small model. Does
    nothing where the library has no such call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
