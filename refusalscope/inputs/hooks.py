"""How a pass is run: as the model was written, and without what nobody reads or what is known.

For `ChatModel` alone. Each is a context manager that leaves the model as it was, whatever happens inside.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

PIECE = 2048
"""Tokens whose logits a CPU makes at a time, in float32: of 16 prompts in 9.4 ms instead of 13.2 (width 512, vocabulary
32,000, two cores), or in 94 instead of 162 (640, 256,000)."""


@contextmanager
def as_written() -> Iterator[None]:
    """Leave aside what `torch.compile` made of the model: it has the hooks it was compiled with and silently no others.

    The stance belongs to the process, as hooks do to the model: one thread at a time.
    """
    # The compiler is a second's import; where nobody imported it, nothing is compiled.
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield


@contextmanager
def known(layers: Iterable[Any], residual: Float[Tensor, "prompt position d_model"]) -> Iterator[None]:
    """Let `layers` return a residual instead of running."""
    with ExitStack() as stack:
        for module in layers:
            # Where weights are offloaded a module has a `forward` of its own beside that of its class.
            own = vars(module).get("forward")
            stack.callback(setattr, module, "forward", own) if own else stack.callback(delattr, module, "forward")
            module.forward = lambda *_, **__: residual
        yield


@contextmanager
def at_last_position(layer: Any) -> Iterator[None]:
    """Spare a layer's MLP all positions but the last: it adds nothing there then. Without an `mlp` nothing changes."""
    mlp = getattr(layer, "mlp", None)
    if not isinstance(mlp, nn.Module):
        yield
        return
    missing: list[int] = []

    def cut(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        missing.append(inputs[0].shape[1] - 1)
        return inputs[0][:, -1:], *inputs[1:]

    def fill(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return fill(_module, _inputs, output[0]), *output[1:]
        return nn.functional.pad(output, (0, 0, missing[-1], 0))

    with mlp.register_forward_pre_hook(cut), mlp.register_forward_hook(fill):
        yield


@contextmanager
def some_tokens(head: nn.Module, wanted: Int[Tensor, "token"]) -> Iterator[None]:
    """Let the unembedding make the logits of some tokens alone, in their order.

    Where it is no plain matrix that is in memory it makes all of them, and those wanted are taken out.
    """

    def few(hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch token"]:
        rows = wanted.to(weight.device)
        return nn.functional.linear(hidden, weight[rows], None if bias is None else bias[rows])

    def pick(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return output[..., wanted.to(output.device)]

    weight: Any = head.weight
    bias: Any = getattr(head, "bias", None)
    with head.register_forward_hook(pick) if weight.is_meta or not _is_plain(head) else _run_as(head, few):
        yield


@contextmanager
def quick_unembedding(head: nn.Module) -> Iterator[None]:
    """Let the unembedding see its input in one piece and, on a CPU, make its output in pieces.

    Last positions cut out of a batch lie apart, and torch then reads the weights once for each prompt: the logits of 64
    prompts (width 512, vocabulary 32,000) took 198 ms on two cores, in one piece 20.
    """
    weight: Any = head.weight
    width = weight.shape[-1]
    in_reach = weight.device.type == "cpu" and weight.dtype == torch.float32 and getattr(head, "bias", None) is None

    def gather(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in inputs)

    def in_pieces(hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch token"]:
        if hidden.requires_grad or hidden.dtype != torch.float32 or hidden.numel() == width:
            return nn.functional.linear(hidden, weight)
        logits = hidden.new_empty(*hidden.shape[:-1], len(weight))
        pieces = zip(logits.view(-1, len(weight)).split(PIECE, 1), weight.split(PIECE), strict=True)
        for piece, rows in pieces:
            torch.mm(hidden.view(-1, width), rows.T, out=piece)
        return logits

    with (
        head.register_forward_pre_hook(gather),
        _run_as(head, in_pieces) if in_reach and _is_plain(head) else nullcontext(),
    ):
        yield


def _is_plain(head: nn.Module) -> bool:
    """Whether it is torch's matrix and runs as that does: where weights are offloaded it has a `forward` besides."""
    return type(head) is nn.Linear and "forward" not in vars(head)


@contextmanager
def _run_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a function stand in for a module that has no `forward` of its own."""
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
