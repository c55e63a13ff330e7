"""A call that is made again and again on the same tensors, recorded once and replayed from then on (CUDA graphs).

A token of Gemma-2-2b is some 1,500 launches, which take longer to ask for than to do: 100 edited answers of 256 tokens
took 10.5 s on an H200, and 4.4 replayed.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from refusalscope.core.memory import is_out_of_memory

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""What is called over and over -> what does the same from then on, if all of it is done on the device."""


def recorder(model: Any) -> Record | None:
    """How calls of a model are recorded; None unless all of it lies on one card and none is moved to it on the way."""
    devices = {weight.device for weight in model.parameters()}
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    return Recorder() if len(devices) == 1 and next(iter(devices)).type == "cuda" and not offloaded else None


class Recorder:
    """Makes of a call one that is as it was the first time, recorded the second time, and replayed ever after.

    What the call reads and writes must stay where it is, and what it makes of constants the first time must be kept.
    Where one cannot be recorded (a model that looks at values on the host), it and all later ones stay as they are, and
    a warning says why.
    """

    works = True

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        calls, graph = 0, None

        def again() -> None:
            nonlocal calls, graph
            calls += 1
            if calls == 2 and self.works:
                graph = _graph(call)
                self.works = graph is not None
            if graph is None:
                call()
            else:
                graph.replay()

        return again


def _graph(call: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """What `call` asks of the card, without doing it."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # What breaks off leaves the state of random numbers unusable: it has one of its own.
    random = torch.cuda.default_generators[torch.cuda.current_device()]
    state = random.graphsafe_get_state()
    random.graphsafe_set_state(random.clone_state())
    try:
        # `torch.cuda.graph` would give all cached memory back to the driver first, each time anew.
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            try:
                call()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = str(error.__context__ or error).partition("\n")[0]
        warnings.warn(f"tokens are asked for one launch at a time, which is slower: {reason}", stacklevel=2)
        return None
    finally:
        random.graphsafe_set_state(state)
    return graph
