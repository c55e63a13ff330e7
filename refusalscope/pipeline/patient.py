"""What doctor knows of a model at any moment: loaded when a check first needs it, on the few prompts that it is shown.

Knows nothing of verdicts but their shape.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from refusalscope.core.types import Prompts, SaeSlice
from refusalscope.evals import rules
from refusalscope.inputs import prompts
from refusalscope.inputs.chat import ChatModel
from refusalscope.mechanism.direction import FitData
from refusalscope.pipeline import fit
from refusalscope.pipeline.job import Job

Word = Literal["ok", "warning", "FAILED", "not checked"]
OK, WARNING, FAILED, NOT_CHECKED = "ok", "warning", "FAILED", "not checked"
FEW: Mapping[str, int] = {"train": 32, "validation": 16}
"""Prompts of each class."""
UNPLANNED = 16
"""Prompts per batch where no plan can be made, as its SAEs do not fit."""
SHOWN = 4
"""Prompts of each class that SAEs and edits are tried on."""
EDITED = 8
"""Features of each layer in the edit that changes nothing."""
TUNED = ("-it", "-instruct", "-chat")
"""How the names of chat models end, where those of their base models do not."""


class Verdict(NamedTuple):
    """One line of doctor's."""

    word: Word
    line: str
    """What was looked at."""
    detail: str
    """One sentence."""
    more: tuple[str, ...] = ()
    """Lines below it, one a layer say."""


class Opened(NamedTuple):
    """What is kept of an SAE that fits."""

    size: int
    """d_sae."""
    hook: str | None
    """The site it says it reads."""
    model: str | None
    """The model it says it was trained on."""
    slice: SaeSlice
    seconds: float
    """What opening it took."""
    note: str
    """What must be known of how it is read; mostly empty."""


@dataclass
class Patient:
    """A model with its SAEs and prompts."""

    job: Job
    opened: dict[int, Opened] = field(default_factory=dict)
    """Layer -> its SAE, once that is known to fit."""
    tokens: tuple[int, ...] = ()
    """The refusal tokens, once they are known."""
    encoding: float = 0.0
    """Seconds per token that one SAE encodes, once that was measured."""

    @cached_property
    def model(self) -> ChatModel:
        """Whatever its SAEs are."""
        # The batch size is planned while the weights are not there yet.
        self.job.progress(f"loading the model, for batches of {self.batch}", 0, 1)
        return self.job.load_model()

    @cached_property
    def batch(self) -> int:
        """Prompts per batch, as a run would answer them."""
        planned = set(self.opened) == set(self.job.target.saes.names)
        return self.job.options.batch_size or (self.job.size("answer") if planned else UNPLANNED)

    @cached_property
    def asked(self) -> Prompts:
        """A few train prompts of either class, whether they fit the model's context or not."""
        source = next(iter(self._sources.values()))
        rows = [row for name in prompts.FITTING[:2] for row in source.fitting[name][:SHOWN]]
        return Prompts("doctor", tuple(rows))

    @cached_property
    def chats(self) -> Prompts:
        """The same, of those that leave room for an answer."""
        data = self.trials[0]
        return Prompts("doctor", (*data.harmful_train[:SHOWN], *data.harmless_train[:SHOWN]))

    @cached_property
    def trials(self) -> list[FitData]:
        """What to fit a direction on: a few prompts, and all there are where those do not do; source by source."""
        made = []
        for source in self._sources.values():
            every = {name: self._within(source.fitting[name]) for name in prompts.FITTING}
            few = {name: rows[: FEW[name.partition("-")[2]]] for name, rows in every.items()}
            made += [FitData(*few.values()), FitData(*every.values())]
        return made

    @cached_property
    def _sources(self) -> dict[str, prompts.PromptSets]:
        return fit.sources_of(self.job, self.job.given)

    def _within(self, rows: Prompts) -> Prompts:
        if self.job.context is None:
            return rows
        room = self.job.context - self.job.max_new_tokens
        return rows.keep(row.id for row in rows if len(self.job.template.encode(row.text).ids) <= room)

    def open(self, layer: int) -> None:
        """Open a layer's SAE. Raises ValueError, one line, where it is none of this layer of this model."""
        config, name = self.job.described.config, self.job.target.name
        if layer >= config.num_hidden_layers:
            raise ValueError(
                f"there is an SAE for layer {layer}, but {name} has layers 0 to {config.num_hidden_layers - 1}"
            )
        started = time.monotonic()
        sae = self.job.saes.layer(layer)
        seconds = time.monotonic() - started
        if sae.width != config.hidden_size:
            raise ValueError(
                f"the SAE of layer {layer} reads residuals of width {sae.width}, but {name} has width "
                f"{config.hidden_size}: choose SAEs trained on this model"
            )
        about = sae.sae.cfg.metadata
        site, model = about.hook_name or about.hf_hook_name, about.model_name
        part = sae.slice(range(min(EDITED, sae.size)))
        self.opened[layer] = Opened(sae.size, site, model, part, seconds, sae.note)

    def trained_elsewhere(self) -> list[str]:
        """The models that SAEs say they were trained on, as far as these are others than this one.

        The name of a folder says nothing, unless it is that of a base model's chat model.
        """
        target = self.job.target
        own = {_short(target.name), _short(target.model)}
        bases = {name.removesuffix(end) for name in own for end in TUNED if name.endswith(end)}
        named = dict.fromkeys(opened.model for opened in self.opened.values() if opened.model)
        others = [name for name in named if _short(name) not in own]
        return others if target.revision is not None else [name for name in others if _short(name) in bases]


def is_refusal(text: str) -> bool:
    return bool(rules.refused_by_phrase(text).score)


def listed(numbers: Iterable[int]) -> str:
    """3, 4, 5, 9 as `3-5, 9`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _short(name: str) -> str:
    return name.rstrip("/").split("/")[-1].casefold()
