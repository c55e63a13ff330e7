"""The nouns that flow between stages: plain data on the CPU, frozen, hashable by content.

No weights, no models, no files. A stage takes nouns and machines and returns nouns; the store writes them down.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refusalscope.core.encoding import Normalisation, among_largest, jump_relu, normalise

Label = Literal["harmful", "harmless", "look-alike"]
Question = Literal["refused", "harmful", "coherent"]
"""What a judge may be asked of an answer."""
NaN = float("nan")


@dataclass(frozen=True)
class Prompt:
    """One user message and what is known about it."""

    id: str
    """Unique within its data set."""
    text: str
    label: Label
    category: str | None = None
    source: str = ""
    """`name@revision` of where the text comes from."""
    cluster: str = ""
    """Prompts that share an intent share a cluster; intervals treat them as one draw. Empty: its own id."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the source knows beyond that (for the testbed: template, wrapper, plain form)."""


@dataclass(frozen=True)
class Prompts:
    """An ordered set of prompts with distinct ids, under the data set name that findings use."""

    name: str
    rows: tuple[Prompt, ...]

    def __post_init__(self) -> None:
        if len({row.id for row in self.rows}) != len(self.rows):
            raise ValueError(f"data set {self.name!r}: prompt ids are not distinct")

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "Prompts": ...
    def __getitem__(self, index: int | slice) -> "Prompt | Prompts":
        return replace(self, rows=self.rows[index]) if isinstance(index, slice) else self.rows[index]

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(row.id for row in self.rows)

    @property
    def clusters(self) -> tuple[str, ...]:
        """One cluster name per prompt."""
        return tuple(row.cluster or row.id for row in self.rows)

    def keep(self, ids: Iterable[str]) -> "Prompts":
        """The prompts with these ids, in this data set's order."""
        wanted = set(ids)
        return replace(self, rows=tuple(row for row in self.rows if row.id in wanted))


@dataclass(frozen=True)
class LayerScores:
    """How one layer's direction did on the validation split (method: Arditi et al. 2024, section 2.3)."""

    layer: int
    kl: float
    """Mean KL in nats of the next-token distribution on harmless prompts when the direction is removed."""
    removed: float
    """Mean refusal score (log-odds of a refusal token first) on harmful prompts when it is removed."""
    added: float
    """Mean refusal score on harmless prompts when it is added at this layer."""
    kl_affine: float
    removed_affine: float


@dataclass(frozen=True)
class Direction:
    """The refusal direction: difference of mean residuals at the last prompt position of one layer."""

    vector: Float[Tensor, "d_model"]
    """Difference of means at `layer`, in residual units."""
    layer: int
    offsets: Float[Tensor, "layers"]
    """Harmless prompts' mean projection on the unit vector after each decoder layer (for affine removal)."""
    refusal_tokens: tuple[int, ...]
    scores: tuple[LayerScores, ...]
    counts: Mapping[str, int]
    """Prompts used and dropped by the filter, per class and split."""
    caveats: tuple[str, ...] = ()

    @property
    def unit(self) -> Float[Tensor, "d_model"]:
        return self.vector / self.vector.norm()


@dataclass(frozen=True, order=True)
class Feature:
    """One SAE feature."""

    layer: int
    index: int

    def __str__(self) -> str:
        return f"{self.layer}/{self.index}"


@dataclass(frozen=True)
class FeatureSet:
    """Features in order of rank, with the score that ranked them."""

    method: str
    features: tuple[Feature, ...]
    scores: tuple[float, ...]
    parent: str = ""
    """Fingerprint of what the set was chosen from."""

    def __post_init__(self) -> None:
        if len(self.features) != len(self.scores):
            raise ValueError(f"{self.method}: {len(self.features)} features but {len(self.scores)} scores")
        if len(set(self.features)) != len(self.features):
            raise ValueError(f"{self.method}: a feature occurs twice")

    def __len__(self) -> int:
        return len(self.features)

    def top(self, k: int) -> "FeatureSet":
        return replace(self, features=self.features[:k], scores=self.scores[:k])

    def by_layer(self) -> dict[int, list[int]]:
        """Layer -> feature indices, layers ascending, indices in order of rank."""
        layers: dict[int, list[int]] = {}
        for feature in self.features:
            layers.setdefault(feature.layer, []).append(feature.index)
        return dict(sorted(layers.items()))

    def only(self, keep: Iterable[Feature], name: str) -> "FeatureSet":
        """The features of `keep` that are in the set, in its order, under a method name of their own."""
        wanted = set(keep)
        pairs = [(f, s) for f, s in zip(self.features, self.scores, strict=True) if f in wanted]
        return replace(self, method=name, features=tuple(f for f, _ in pairs), scores=tuple(s for _, s in pairs))

    def __and__(self, other: "FeatureSet") -> "FeatureSet":
        return self.only(set(self.features) & set(other.features), f"{self.method} & {other.method}")

    def __sub__(self, other: "FeatureSet") -> "FeatureSet":
        return self.only(set(self.features) - set(other.features), f"{self.method} - {other.method}")


class OwnUnits(NamedTuple):
    """Activations as the SAE itself counts them."""

    activations: Float[Tensor, "*batch k"]
    scale: Float[Tensor, "*batch 1"] | Float[Tensor, ""]
    """s: residual units per unit of the SAE's own."""


@dataclass(frozen=True)
class SaeSlice:
    """K features of one layer's SAE: all that an edit needs, float32. A gated SAE's are written as JumpReLU."""

    layer: int
    features: Int[Tensor, "k"]
    encoder: Float[Tensor, "d_model encoded"]
    """The K columns; all d_sae of them where `active` is set, because then features compete."""
    bias: Float[Tensor, "encoded"]
    """Encoder bias with any subtraction of the decoder bias folded in."""
    threshold: Float[Tensor, "k"]
    """JumpReLU threshold (0 for ReLU and TopK), in the SAE's own units."""
    decoder: Float[Tensor, "k d_model"]
    """What one residual unit of each feature adds to the residual stream."""
    active: int | None = None
    """TopK: how many of all features may be active at a token; None: each feature decides for itself."""
    normalisation: Normalisation = "none"

    def encode(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        """Feature activations in residual units."""
        own, scale = self.read(residual)
        return own * scale

    def encode_own(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        """Feature activations in the SAE's own units."""
        return self.read(residual).activations

    def read(self, residual: Float[Tensor, "*batch d_model"]) -> OwnUnits:
        """Feature activations in the SAE's own units, and what one of these is in residual units at each token."""
        z = normalise(residual, self.normalisation)
        if self.active is None:
            before = torch.nn.functional.linear(z.inputs, self.encoder.T, self.bias)
        else:
            before = among_largest(z.inputs, self.encoder, self.bias, self.features, self.active)
        return OwnUnits(jump_relu(before, self.threshold), z.scale)

    def take(self, wanted: Sequence[int]) -> "SaeSlice":
        """The part of the slice that holds these feature indices. Raises ValueError when one is not in it."""
        held = self.features.tolist()
        if missing := sorted(set(wanted) - set(held)):
            raise ValueError(f"the slice of layer {self.layer} does not hold features {missing}")
        at = torch.tensor([held.index(feature) for feature in wanted], dtype=torch.long)
        part = replace(self, features=self.features[at], threshold=self.threshold[at], decoder=self.decoder[at])
        return part if self.active else replace(part, encoder=self.encoder[:, at], bias=self.bias[at])

    def to(self, device: torch.device) -> "SaeSlice":
        return replace(self, **{name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)})


@dataclass(frozen=True)
class Response:
    """What the model answered to one prompt, and what each judge said of it."""

    prompt_id: str
    text: str
    first_token: int | None
    """The first token of the answer; None when it was empty."""
    tokens: int
    """Tokens generated, end of turn included."""
    finish: Literal["end", "length"]
    scores: Mapping[str, float] = field(default_factory=dict)
    """Judge -> score; NaN is unscored."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Judge -> why it gave that score, or why it gave none."""
    reasoning: str = ""
    """What a reasoning model wrote before its answer, markers excluded."""


@dataclass(frozen=True)
class Responses:
    """One data set answered under one method and setting, in prompt order."""

    dataset: str
    method: str
    setting: str
    rows: tuple[Response, ...]
    changed: int = 0
    """Token positions (padding excluded) whose residual the edit really changed, summed over layers."""

    def score(self, judge: str) -> list[float]:
        return [row.scores.get(judge, NaN) for row in self.rows]


@dataclass(frozen=True)
class Verdict:
    """What one judge says of one answer."""

    prompt_id: str
    score: float
    """1: yes, 0: no, NaN: unscored."""
    probability: float = NaN
    """Of a yes, or the judge's own graded score between 0 and 1; NaN where it gives none."""
    reason: str = ""
    """Why it says so, or why it says nothing."""
    final: bool = True
    """False: asked again, the judge may have an answer."""


@dataclass(frozen=True)
class Verdicts:
    """What one judge says of the answers to one data set under one method and setting.

    Prompts that it was not asked about yet have no row.
    """

    judge: str
    question: Question
    dataset: str
    method: str
    setting: str
    rows: tuple[Verdict, ...]


@dataclass(frozen=True)
class Row:
    """One number with its doubt. At n = 0 the numbers are None."""

    dataset: str
    method: str
    metric: str
    setting: str
    n: int
    estimate: float | None
    low: float | None
    high: float | None
    coverage: float
    """Share of the prompts that the judge scored."""
    p: float | None = None
    """Two-sided p-value of a comparison, not corrected for others; None where nothing is compared."""
    family: str = ""
    """The comparisons that are corrected together, in words; empty: none."""
    p_holm: float | None = None
    """`p` after Holm's correction over the family."""

    def __post_init__(self) -> None:
        numbers = (self.estimate, self.low, self.high)
        if self.n < 0 or (self.n == 0) != all(number is None for number in numbers) or (self.n > 0 and None in numbers):
            raise ValueError(f"{self.key()}: n = {self.n} does not fit estimate, low, high = {numbers}")
        if any(number is not None and not math.isfinite(number) for number in numbers):
            raise ValueError(f"{self.key()}: estimate, low and high must be finite, got {numbers}")
        if not 0 <= self.coverage <= 1:
            raise ValueError(f"{self.key()}: coverage {self.coverage} is outside 0..1")

    def key(self) -> str:
        return f"{self.dataset}/{self.method}/{self.metric}/{self.setting}"


@dataclass(frozen=True)
class Finding:
    """What one study found: the question, the rows, what to beware of, and what it was made from."""

    study: str
    question: str
    rows: tuple[Row, ...]
    caveats: tuple[str, ...]
    provenance: Mapping[str, Any]

    def find(self, dataset: str, method: str, metric: str, setting: str | None = None) -> Row | None:
        """The first row that fits, or None."""
        for row in self.rows:
            if (row.dataset, row.method, row.metric) == (dataset, method, metric) and setting in (None, row.setting):
                return row
        return None


def layers_of(sets: Iterable[FeatureSet]) -> dict[int, list[int]]:
    """Layer -> the features of any of the sets, ascending."""
    layers: dict[int, set[int]] = {}
    for chosen in sets:
        for layer, indices in chosen.by_layer().items():
            layers.setdefault(layer, set()).update(indices)
    return {layer: sorted(indices) for layer, indices in sorted(layers.items())}


def ordered_features(pairs: Sequence[tuple[Feature, float]], k: int) -> tuple[tuple[Feature, ...], tuple[float, ...]]:
    """The `k` best-scored features, ties by (layer, index)."""
    best = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k]
    return tuple(feature for feature, _ in best), tuple(score for _, score in best)
