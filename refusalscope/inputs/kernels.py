"""An RMS norm in one launch forwards and one backwards, for a card: read in its own type, computed in float32.

torch has such an operation where weights are of the input's type; elsewhere it takes a cast before and one after. On an
H200 the norm of 6,400 tokens of 2,304 numbers took 62 us in one launch, 106 in three, and 225 as Gemma 2 spells it out.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton import language as tl  # pyright: ignore[reportMissingImports]


def rms_norm(given: Tensor, gain: Tensor, eps: float) -> Tensor:
    """`given / rms(given) * gain` over the last dimension, rounded once; no gradient for the gain (float32)."""
    return _RmsNorm.apply(given.contiguous(), gain, eps)  # pyright: ignore[reportReturnType]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, gain: Tensor, eps: float) -> Tensor:
        made, columns = torch.empty_like(given), given.shape[-1]
        rows = given.numel() // columns
        scale = torch.empty(rows, dtype=torch.float32, device=given.device)
        _launched(_forward, rows, given, gain, made, scale, columns, eps)
        ctx.save_for_backward(given, gain, scale)
        return made

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        given, gain, scale = ctx.saved_tensors
        made, columns = torch.empty_like(given), given.shape[-1]
        _launched(_backward, len(scale), given, gain, scale, slopes[0].contiguous(), made, columns)
        return made, None, None


def _launched(kernel: Any, rows: int, *arguments: Any) -> None:
    """A row is a block; a warp takes 256 of its numbers, more where eight of them are not enough."""
    block = triton.next_power_of_2(arguments[0].shape[-1])
    if rows:
        kernel[(rows,)](*arguments, block=block, num_warps=min(8, max(1, block // 256)))


@triton.jit
def _forward(given, gain, made, scale, columns, eps, block: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    inside = at < columns
    x = tl.load(given + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.rsqrt(tl.sum(x * x, axis=0) / columns + eps)
    g = tl.load(gain + at, mask=inside, other=0.0)
    tl.store(made + row * columns + at, (x * s * g).to(made.dtype.element_ty), mask=inside)
    tl.store(scale + row, s)


@triton.jit
def _backward(given, gain, scale, slope, made, columns, block: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    inside = at < columns
    x = tl.load(given + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(slope + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    d *= tl.load(gain + at, mask=inside, other=0.0)
    s = tl.load(scale + row)
    along = tl.sum(d * x, axis=0) / columns
    tl.store(made + row * columns + at, (s * (d - x * (s * s * along))).to(made.dtype.element_ty), mask=inside)
