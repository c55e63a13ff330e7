"""What a checkpoint takes of memory, known before a weight is read.

The model is made without weights, on torch's `meta` device, and run there for one prompt while every tensor that it
makes is counted: for weights, forward passes and gradients that is exact but for the workspace of single operations,
whatever the architecture. Also what a device has left. Knows nothing of stages and batches.
"""

import resource
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refusalscope.inputs import loading
from refusalscope.inputs.loading import Placement, Skeleton, choose_device

UNCOUNTED = 40
"""Numbers kept per position, layer and unit of width, where an architecture cannot be run without weights."""


class Moment(NamedTuple):
    """Bytes held by tensors that a computation made."""

    peak: int
    left: int
    """When it was done, beside what it returned."""

    def shorter(self, positions: int, whole: int) -> "Moment":
        """The same for `positions` tokens instead of `whole`, in proportion: too much for attention's square."""
        return Moment(self.peak * positions // whole, self.left * positions // whole)


class Footprint:
    """One checkpoint's memory in bytes; what belongs to a prompt is for `positions` tokens, one prompt a batch."""

    def __init__(self, skeleton: Skeleton, placement: Placement) -> None:
        model = skeleton.model
        self._model = model.eval().requires_grad_(False)
        config = model.config.get_text_config()
        self.layers = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)
        self.vocabulary = int(config.vocab_size)
        self.item = model.dtype.itemsize
        """Bytes of a number as the model computes."""
        self.weights = _weights(model, placement.quantize)
        self.is_mapped = choose_device(placement.device) == "cpu" and skeleton.stored == model.dtype
        """Whether weights are read off their files as they are used, so that their memory can be let go."""
        self.forward = cache(self._forward)
        self.gradient = cache(self._gradient)

    def residuals(self, positions: int) -> int:
        """The residual streams after all layers, kept."""
        return self.layers * positions * self.width * self.item

    def _forward(self, positions: int) -> Moment:
        """A forward pass without gradients up to the last layer: its peak, and the cache of keys and values it leaves.

        Logits are not among it.
        """

        def run(inputs: Mapping[str, Tensor]) -> Any:
            return self._model.get_decoder()(**inputs, use_cache=True)

        return self._counted(positions, run) or Moment(8 * positions * self.width * self.item, self._cache(positions))

    def _gradient(self, positions: int) -> Moment:
        """A forward pass and the gradients of one logit with respect to every layer's output."""

        def run(inputs: Mapping[str, Tensor]) -> Any:
            with torch.enable_grad():
                found = self._model.get_decoder()(**inputs, use_cache=False, output_hidden_states=True)
                logits = self._model.get_output_embeddings()(found.last_hidden_state[:, -1])
                return torch.autograd.grad(logits.sum(), found.hidden_states[:-1])

        rule = UNCOUNTED * self.layers * positions * self.width * self.item
        return self._counted(positions, run, requires_grad=True) or Moment(rule, 0)

    def _counted(
        self, positions: int, run: Callable[[Mapping[str, Tensor]], Any], *, requires_grad: bool = False
    ) -> Moment | None:
        """None where the architecture looks at values, which are not there."""
        made: dict[str, Any] = {"device": "meta", "dtype": self._model.dtype}
        inputs = {
            "inputs_embeds": torch.zeros(1, positions, self.width, requires_grad=requires_grad, **made),
            # As transformers makes it of a padded batch; given whole, nobody looks into it.
            "attention_mask": torch.zeros(1, 1, positions, positions, **made),
            "position_ids": torch.zeros(1, positions, dtype=torch.long, device="meta"),
        }
        counter = _Counter([*self._model.parameters(), *self._model.buffers(), *inputs.values()])
        try:
            with torch.no_grad(), counter:
                found = run(inputs)
        except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError):
            return None
        output = getattr(found, "last_hidden_state", None)
        return Moment(counter.peak, counter.held - (0 if output is None else output.nbytes))

    def _cache(self, positions: int) -> int:
        config = self._model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or self.width // config.num_attention_heads
        return 2 * self.layers * positions * heads * size * self.item


class _Counter(TorchDispatchMode):
    """Counts the storage that operations make, while it is alive."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._seen: dict[int, int] = {part.untyped_storage()._cdata: 0 for part in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for part in tree_leaves(found):
            if isinstance(part, Tensor):
                self._count(part.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        name = storage._cdata
        if name not in self._seen:
            self._seen[name] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._gone, name)

    def _gone(self, name: int) -> None:
        self.held -= self._seen.pop(name, 0)


def footprint(
    source: str | Path, *, name: str, revision: str | None, placement: Placement, trust_remote_code: bool
) -> Footprint:
    """The footprint of a checkpoint, of which only the configuration is read.

    Raises ValueError, one line, as `loading.load` does.
    """
    known = loading.skeleton(
        source, name=name, revision=revision, placement=placement, trust_remote_code=trust_remote_code
    )
    return Footprint(known, placement)


def _weights(model: Any, quantize: str | None) -> int:
    """Bytes of all parameters and buffers; bitsandbytes packs the weights of linear layers inside the decoder."""
    packed, head = {"8bit": 1.0, "4bit": 0.5}.get(quantize or "", 0), model.get_output_embeddings()
    inside = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and quantize is not None and module is not head
    }
    parts = [*model.parameters(), *model.buffers()]
    return int(sum(part.numel() * packed if id(part) in inside else part.nbytes for part in parts))


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file that is mapped; False where the system does not tell."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.is_file() and tensor.device.type == "cpu" else ():
        place, _rights, _offset, _device, inode, *_name = line.split()
        first, last = (int(end, 16) for end in place.split("-"))
        if first <= tensor.data_ptr() < last:
            return inode != "0"
    return False


def free(device: str) -> int:
    """Bytes that this process can still have on a device; of the host where it is neither CUDA nor the CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    import psutil

    limits = [psutil.virtual_memory().available, *_group_limit()]
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        limits.append(most - psutil.Process().memory_info().vms)
    return max(0, min(limits))


GROUP = Path("/sys/fs/cgroup")


def _group_limit(folder: Path = GROUP) -> list[int]:
    """What a container leaves: its limit without what it holds, files that can be let go aside; empty: no limit."""
    try:
        most = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        files = next((int(size) for what, size in lines if what == "inactive_file"), 0)
    except (OSError, ValueError):
        return []  # no control groups of version 2
    return [] if most == "max" else [int(most) - used + files]
