"""One run: its options, prompts and folder, and the machines that are loaded when a stage first needs them.

A run that is complete, or a report that is rebuilt, loads neither model nor SAEs. Knows nothing of the stages.
"""

import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.store import Store
from refusalscope.inputs import presets, prompts
from refusalscope.inputs.chat import ChatModel, choose_device
from refusalscope.inputs.saes import SaeBank
from refusalscope.pipeline import options as run_options
from refusalscope.pipeline.environment import describe, versions
from refusalscope.pipeline.options import Options

Progress = Callable[[str, int, int], None]
LARGEST_BATCH = 64
VALUE_SHARES = (0.1, 0.2, 0.35, 0.5, 1.0, 2.0)
"""Of a set's mean largest activation on harmful prompts: small ones too, since the whole mean breaks the text."""


class Job:
    """One run: options, prompts and folder; machines on demand. Making one writes nothing."""

    def __init__(self, options: Options, folder: Path, progress: Progress = lambda *_: None) -> None:
        self.options = options
        self.progress = progress
        self.target = presets.resolve(options.model, options.saes)
        self.sets = load_prompts(options, self.target)
        self.store = Store(folder)
        self._recorded = run_options.recorded(folder, options)
        self._started = time.monotonic()

    @cached_property
    def model(self) -> ChatModel:
        target = self.target
        loaded = ChatModel.load(target.model, name=target.name, identity=target.identity, device=self.options.device)
        self.saes.check(loaded.width, target.name)
        return loaded

    @cached_property
    def saes(self) -> SaeBank:
        folders = self.target.sae_folders
        return SaeBank.from_folders(folders, identity=self.target.identity, device=self.device)

    @cached_property
    def derived(self) -> dict[str, Any]:
        """What was chosen once for this folder and is reused whenever it is resumed."""
        if self._recorded is not None:
            return self._recorded
        return {"batch_size": self.options.batch_size or choose_batch_size(self.model)}

    @property
    def device(self) -> str:
        return choose_device(self.options.device)

    @property
    def batch_size(self) -> int:
        return int(self.derived["batch_size"])

    @property
    def max_new_tokens(self) -> int:
        return self.options.max_new_tokens or self.target.max_new_tokens

    @property
    def factors(self) -> tuple[float, ...]:
        return self.options.factors or self.target.factors

    def values(self, typical: float) -> tuple[float, ...]:
        """Values that features are set to: those given, else shares of what is typical of them, three digits each."""
        given = self.options.values or self.target.values
        return given or tuple(float(f"{share * typical:.3g}") for share in VALUE_SHARES)

    def key(self, stage: str, *inputs: Any) -> str:
        """Cache key of a stage: the model, the versions and batch size that shape its numbers, and its inputs."""
        return fingerprint(stage, self.target.identity, versions(), self.derived, self.device, *inputs)

    def begin(self) -> None:
        """Record the options; called once the first stage has something to write."""
        if self._recorded is None:
            run_options.record(self.store.root, self.options, self.derived)
            self._recorded = self.derived

    def finish(self) -> None:
        """Record the environment, unless everything had been made before."""
        if self.store.made:
            seconds = time.monotonic() - self._started
            about = describe(device=self.device, seed=self.options.seed, seconds=seconds)
            self.store.put("environment.json", "", about)


def load_prompts(options: Options, target: presets.Target) -> prompts.PromptSets:
    """The prompts the options name, else the model's own. Raises ValueError when there are neither."""
    sets = _all_prompts(options, target)
    if options.datasets is not None:
        sets = prompts.only(sets, options.datasets)
    return prompts.for_paper(sets) if options.protocol == "paper" else sets


def _all_prompts(options: Options, target: presets.Target) -> prompts.PromptSets:
    count = options.evaluation_count
    path = options.prompts
    if path is None:
        if target.prompts is None:
            raise ValueError(f"model {target.name} has no prompts of its own: name some with --prompts")
        fewer = options.limit or prompts.TRAIN_COUNT
        return prompts.from_testbed(
            count=count,
            full=options.full,
            train=min(prompts.TRAIN_COUNT, max(32, fewer)),
            validation=min(prompts.VALIDATION_COUNT, max(16, fewer)),
        )
    if path.is_dir():
        return prompts.from_refusal_direction(path, count=count, published_draw=options.protocol == "paper")
    return prompts.from_file(path, columns=options.columns, label=options.label, count=count)


def choose_batch_size(model: ChatModel) -> int:
    """The largest power of two, at most 64, whose gradient step fits in a quarter of the memory that is free."""
    import torch

    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    config = model.model.config.get_text_config()
    # A prompt of 256 tokens keeps about 34 numbers per position, layer and unit of width for the backward pass, and
    # two sets of logits while costs are measured.
    prompt = 256 * (34 * config.hidden_size * config.num_hidden_layers + 3 * config.vocab_size) * 4
    size = LARGEST_BATCH
    while size > 1 and size * prompt > free / 4:
        size //= 2
    return size
