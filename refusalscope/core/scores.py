"""The nouns of attribution: what forward and backward passes leave behind, and the scores read off them.

Plain data on the CPU like those of `core/types.py`; knows nothing of how a gradient is taken.
"""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from refusalscope.core.types import Feature


@dataclass(frozen=True)
class Trace:
    """One batch: its clean run, its direction-removed run, and the mean gradient of the metric between them.

    All that attribution needs of the model; SAEs are read against it afterwards, one layer at a time.
    """

    prompt_ids: tuple[str, ...]
    ids: Int[Tensor, "prompt position"]
    roles: Int[Tensor, "prompt position"]
    """A `Role` per position."""
    layers: tuple[int, ...]
    clean: Float[Tensor, "layer prompt position d_model"]
    patched: Float[Tensor, "layer prompt position d_model"]
    """Residuals whose features are the patched ones."""
    end: Float[Tensor, "layer prompt position d_model"] | None
    """Where the path of the gradients ends, if not at `patched`."""
    gradient: Float[Tensor, "layer prompt position d_model"]
    """Weighted mean over the path of d metric / d residual, float32."""
    answer: Int[Tensor, "prompt"]
    """j: the likeliest first token once the direction is removed."""
    refusal: Int[Tensor, "prompt"]
    """r: the clean run's likeliest refusal token."""
    metric_clean: Float[Tensor, "prompt"]
    """`logit[j] - logit[r]` at the last position of the clean run."""
    metric_patched: Float[Tensor, "prompt"]
    flipped: Bool[Tensor, "prompt"]
    """False where j is itself a refusal token: removal did not change this prompt."""

    def bare(self) -> "Trace":
        """The same without any layer: what is left when all that is wanted has been read off."""
        names = ("clean", "patched", "gradient", "end")
        parts = {name: None if (part := getattr(self, name)) is None else part[:0].clone() for name in names}
        return replace(self, layers=(), **parts)


@dataclass(frozen=True)
class Attribution:
    """Sparse feature attributions of the refusal metric: one entry per prompt, layer, position and feature.

    Positions count from the end of the prompt: -1 is the last one, so they do not depend on padding.
    """

    prompt_ids: tuple[str, ...]
    prompt: Int[Tensor, "entry"]
    layer: Int[Tensor, "entry"]
    position: Int[Tensor, "entry"]
    feature: Int[Tensor, "entry"]
    value: Float[Tensor, "entry"]
    """Attribution in units of the metric (logits)."""
    scored: Int[Tensor, "prompt"]
    """Instruction and closing tokens per prompt: the last positions, over which a feature's score is averaged."""
    length: Int[Tensor, "prompt"]
    """Tokens per prompt, padding excluded."""
    answer: Int[Tensor, "prompt"]
    refusal: Int[Tensor, "prompt"]
    metric_clean: Float[Tensor, "prompt"]
    metric_patched: Float[Tensor, "prompt"]
    dropped: tuple[str, ...] = ()
    """Ids of prompts whose first token stays a refusal token when the direction is removed."""

    @property
    def gap(self) -> Float[Tensor, "prompt"]:
        """Metric of the patched run minus that of the clean run."""
        return self.metric_patched - self.metric_clean


@dataclass(frozen=True)
class Scores:
    """One score per prompt and feature: what feature sets are chosen from, and resampled to see how firmly."""

    method: str
    prompt_ids: tuple[str, ...]
    features: tuple[Feature, ...]
    values: Float[Tensor, "prompt feature"]


@dataclass(frozen=True)
class Activity:
    """How active every feature of every layer is on a prompt set: what random draws are matched on."""

    layers: tuple[int, ...]
    sizes: tuple[int, ...]
    """d_sae of each layer."""
    mean: Float[Tensor, "feature"]
    """Mean activation over the scored tokens in residual units, the layers one after the other."""
    tokens: int
    """Scored tokens, over which the means are taken."""
