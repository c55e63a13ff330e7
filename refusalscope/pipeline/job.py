"""One run: its options, prompts and folder, and the machines that are loaded when a stage first needs them.

A run that is complete, or a report that is rebuilt, loads neither model nor SAEs. Knows nothing of the stages but the
names under which their batch sizes are kept.
"""

import gc
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.memory import give_back, is_out_of_memory
from refusalscope.core.store import Store
from refusalscope.core.types import Prompts
from refusalscope.inputs import loading, presets, prompts
from refusalscope.inputs.chat import ChatModel, choose_device
from refusalscope.inputs.footprint import Footprint, footprint, free
from refusalscope.inputs.loading import Described, Placement
from refusalscope.inputs.saes import LayerSae, SaeBank
from refusalscope.inputs.template import ChatStyle, ChatTemplate
from refusalscope.pipeline import options as run_options
from refusalscope.pipeline import plan as planning
from refusalscope.pipeline import sources
from refusalscope.pipeline.environment import describe, origin, versions
from refusalscope.pipeline.options import Options
from refusalscope.pipeline.plan import Held, Plan

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
VALUE_SHARES = (0.1, 0.2, 0.35, 0.5, 1.0, 2.0)
"""Of a set's mean largest activation on harmful prompts: small ones too, since the whole mean breaks the text."""
TOGETHER = 256
"""Answers in a part, where a batch is not larger: rows that end make room for the next prompts only within a part."""
TOO_LONG = "too_long.json"
ELSEWHERE = "choose another --device, or --dtype, --quantize or --device-map"


class Job:
    """One run: options, prompts and folder; machines on demand. Making one writes nothing.

    It has its folder for itself until `close`. Raises ValueError when another process has it.
    """

    def __init__(self, options: Options, folder: Path, progress: Progress = lambda *_: None) -> None:
        self.options = options
        self.progress = progress
        self.target = presets.resolve(
            options.model,
            revision=options.revision,
            saes=options.saes,
            sae_release=options.sae_release,
            sae_id=options.sae_id,
            layers=options.layers,
        )
        self.style = ChatStyle(options.system, options.thinking, sources.read_template(options.chat_template))
        self.store = Store(folder)
        self.prompts = options.prompts or (None if self.target.prompts else sources.common_prompts(progress))
        self._given = sources.load_prompts(options, self.prompts)
        self._recorded = run_options.recorded(folder, options)
        self.halved: list[str] = []
        """What was done when memory ran out, a sentence each."""
        self._stage = ""
        self._started = time.monotonic()
        self.store.claim.take()

    @property
    def given(self) -> prompts.PromptSets:
        """The prompts of this run as they were given, those too long for the model among them."""
        return self._given

    @cached_property
    def model(self) -> ChatModel:
        """The model, once it is known that the SAEs fit it. Raises ValueError, one line, where they do not."""
        target, loaded = self.target, self.load_model()
        if beyond := [layer for layer in target.saes.names if layer >= len(loaded.layers)]:
            raise ValueError(
                f"{target.saes.where} has SAEs for layers {beyond}, but {target.name} has layers 0 to "
                f"{len(loaded.layers) - 1}: choose SAEs trained on this model"
            )
        self.saes.check(loaded.width, target.name)
        return loaded

    def load_model(self) -> ChatModel:
        """The model alone, whatever SAEs there are."""
        target, options = self.target, self.options
        return ChatModel.load(
            target.model,
            name=target.name,
            identity=target.identity,
            revision=target.revision,
            device=options.device,
            dtype=options.dtype,
            quantize=options.quantize,
            device_map=options.device_map,
            style=self.style,
            trust_remote_code=options.trust_remote_code,
            tokenizer=self.described.tokenizer,
        )

    @cached_property
    def described(self) -> Described:
        """Configuration and tokenizer: all that is known before weights are read."""
        target = self.target
        return loading.describe(
            target.model,
            name=target.name,
            revision=target.revision,
            trust_remote_code=self.options.trust_remote_code,
        )

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.described.tokenizer, self.target.name, self.style)

    @property
    def context(self) -> int | None:
        """Positions the model was made for; None where its configuration names no limit."""
        return getattr(self.described.config, "max_position_embeddings", None)

    @cached_property
    def saes(self) -> SaeBank:
        ahead = not self.options.no_read_ahead and (self._recorded or {}).get("read_ahead", True)
        return SaeBank.from_source(self.target.saes, device=self.device, read_ahead=ahead)

    @cached_property
    def plan(self) -> Plan | None:
        """What a new run will hold in memory, made before weights are read; None for a folder that has begun.

        Raises ValueError, one line, for SAEs of another model.
        """
        if self._recorded is not None:
            return None
        self.progress("planning", 0, 1)
        first = self._first_sae()
        self.saes.check(self.described.config.hidden_size, self.target.name)
        made = planning.make(
            self._footprint(),
            planning.work_of(
                *(self.sets, self.template),
                answer=self.max_new_tokens,
                documents=self.options.documents is not None,
            ),
            name=self.target.name,
            device=self.device,
            free=Held(self._free(), free("cpu")),
            sae=first,
            read_ahead=self.saes.read_ahead,
            given=self.options.batch_size,
        )
        self.saes.read_ahead = made.read_ahead
        return made

    def _free(self) -> int:
        """Of the device, or of all that a device map spreads the model over."""
        if self.device != "cuda" or self.options.device_map is None:
            return free(self.device)
        return sum(free(f"cuda:{number}") for number in range(torch.cuda.device_count()))

    def _first_sae(self) -> LayerSae:
        try:
            return self.saes.layer(self.saes.layers[0])
        except Exception as error:
            if is_out_of_memory(error):
                raise ValueError(f"one SAE of {self.target.saes.where} does not fit in memory: {ELSEWHERE}") from error
            raise

    def _footprint(self) -> Footprint:
        target, options = self.target, self.options
        return footprint(
            target.model,
            name=target.name,
            revision=target.revision,
            placement=Placement(options.device, options.dtype, options.quantize, options.device_map),
            trust_remote_code=options.trust_remote_code,
        )

    @cached_property
    def sets(self) -> prompts.PromptSets:
        """The prompts of this run: those given, without those too long for the model's context."""
        found = self._too_long
        return prompts.without(self._given, found["prompts"], why=f"longer than {found['limit']} tokens")

    @cached_property
    def derived(self) -> dict[str, Any]:
        """What was chosen once for this folder and is reused whenever it is resumed."""
        if self._recorded is not None or self.plan is None:
            return self._recorded or {}
        return self.plan.chosen | {"chat": self.template.about}

    @property
    def device(self) -> str:
        return choose_device(self.options.device)

    @property
    def max_new_tokens(self) -> int:
        return self.options.max_new_tokens or self.target.max_new_tokens

    @property
    def factors(self) -> tuple[float, ...]:
        published = self.target.published_factor
        if self.options.protocol == "paper" and published is not None:
            return self.options.factors or (published,)
        return self.options.factors or self.target.factors

    @property
    def refusal_tokens(self) -> tuple[str, ...]:
        """Given or published; empty: they are to be found."""
        return self.options.refusal_token or self.target.refusal_tokens

    @property
    def best_layer(self) -> int | None:
        """Given or published; None: it is to be chosen."""
        return self.target.best_layer if self.options.best_layer is None else self.options.best_layer

    def values(self, typical: float) -> tuple[float, ...]:
        """Values that features are set to: those given, else shares of what is typical of them, three digits each."""
        given = self.options.values or self.target.values
        return given or tuple(float(f"{share * typical:.3g}") for share in VALUE_SHARES)

    def key(self, stage: str, *inputs: Any) -> str:
        """Cache key of a stage: the model, the versions and batch size that shape its numbers, and its inputs."""
        how = (self.device, self.options.dtype, self.options.quantize, self.options.device_map, self.style)
        return fingerprint(stage, self.target.identity, versions(), self._size(stage), how, *inputs)

    def size(self, stage: str) -> int:
        """Prompts per batch of a stage that is about to run: the one whose size is halved if memory runs out."""
        if stage != self._stage:
            give_back()
        self._stage = stage
        return self._size(stage)

    def _size(self, stage: str) -> int:
        return int(self.derived.get("batch_sizes", {}).get(stage, self.derived["batch_size"]))

    def resize(self, stage: str, size: int) -> None:
        """From now on take batches of `size` prompts in a stage of this run."""
        self.derived = {**self.derived, "batch_sizes": {**self.derived.get("batch_sizes", {}), stage: size}}
        if self._recorded is not None:
            self._record()

    def run(self, chain: "Callable[[Job], T]") -> T:
        """`chain(job)`, and again with a smaller batch in the stage that ran out of memory.

        The second time all that was made before that stage is read. Raises ValueError when one prompt is too much.
        """
        while True:
            try:
                return chain(self)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Out here the error, whose traceback holds the tensors of the stage that failed, is gone.
            self._clear()
            self._halve()

    def _halve(self) -> None:
        """Record half the batch size for the stage that was running."""
        if not self._stage:
            raise ValueError(f"{self.target.name} with its SAEs does not fit in memory: {ELSEWHERE}")
        half = self._size(self._stage) // 2
        if half == 0:
            raise ValueError(
                f"out of memory in the stage {self._stage!r} with one prompt per batch: "
                "leave out long prompts, lower --max-new-tokens or choose another --device"
            )
        self.halved.append(f"out of memory in the stage {self._stage!r}: {half} prompts at once from then on")
        self.resize(self._stage, half)

    def in_batches(
        self,
        stage: str,
        path: str,
        *,
        key: str,
        rows: Prompts,
        kind: type[T],
        make: Callable[[Prompts], T],
        join: Callable[[Sequence[T]], T],
        together: int = 1,
    ) -> T:
        """The artifact at `path`, made part by part and joined: a run that is killed makes one part again.

        `make` is given one part, the full batches that `together` prompts hold but at least one, and `join` all that it
        returned, in the prompts' order.
        """

        def joined() -> T:
            parts = self.parts(stage, path, key=key, rows=rows, kind=kind, make=make, together=together)
            return join([self.store.read(part, kind) for part in parts])

        made = self.store.get(path, key, kind, joined)
        self.drop_parts(path)
        return made

    def parts(
        self,
        stage: str,
        path: str,
        *,
        key: str,
        rows: Prompts,
        kind: type[T],
        make: Callable[[Prompts], T],
        together: int = 1,
    ) -> list[str]:
        """For what is too large to be joined in memory: the artifacts of each part, made where they do not stand.

        Whoever has used them calls `drop_parts`, also when it finds its own result made: the run may have been killed
        in between.
        """
        self.begin()
        size = self.size(stage)
        size *= max(1, together // size)
        paths = []
        # An empty set is one empty part, so that there is something to join.
        for number, start in enumerate(range(0, max(1, len(rows)), size)):
            paths.append(f"{path}.parts/{number:04d}")
            self.store.ensure(paths[-1], key, partial(make, rows[start : start + size]))
        return paths

    def drop_parts(self, path: str) -> None:
        """Remove the parts of the artifact at `path`, if there are any."""
        self.store.drop(f"{path}.parts")

    def begin(self) -> None:
        """Record the options; called once the first stage has something to write.

        Raises ValueError when another process has begun the same run meanwhile.
        """
        if self._recorded is not None:
            return
        self.store.root.mkdir(parents=True, exist_ok=True)
        self.store.claim.take()
        if run_options.recorded(self.store.root, self.options) is not None:
            raise ValueError(f"{self.store.root} was made by another process meanwhile: the same command goes on there")
        too_long = self._too_long
        self._record()
        self.store.put(TOO_LONG, self._too_long_key, too_long)

    def _record(self) -> None:
        run_options.record(self.store.root, self.options, self.derived)
        self._recorded = self.derived

    @property
    def _too_long_key(self) -> str:
        return fingerprint(self.target.identity, self._given, self.max_new_tokens, self.style)

    @cached_property
    def _too_long(self) -> dict[str, Any]:
        """How long a prompt may be (null: as long as it likes), and the ids of longer ones by data set."""
        if self._recorded is not None:
            return self.store.get(TOO_LONG, self._too_long_key, dict, self._measure)
        return self._measure()

    def _measure(self) -> dict[str, Any]:
        context = self.context
        if context is None:
            return {"limit": None, "prompts": {}}
        limit = context - self.max_new_tokens
        if limit < 1:
            raise ValueError(
                f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt: {self.target.name} has a context "
                f"of {context} tokens"
            )
        sets = {**self._given.fitting, **self._given.validation, **self._given.evaluation}
        return {"limit": limit, "prompts": {name: self._longer(rows, limit) for name, rows in sets.items()}}

    def _longer(self, rows: Prompts, limit: int) -> list[str]:
        return [prompt.id for prompt in rows if self.template.length(prompt.text) > limit]

    def within_context(self, rows: Prompts) -> tuple[Prompts, list[str]]:
        """The prompts of a study that leave room for an answer, and a note if any do not; measured once, then read."""

        def measure() -> dict[str, Any]:
            return {"ids": [] if self.context is None else self._longer(rows, self.context - self.max_new_tokens)}

        key = fingerprint(self.target.identity, rows, self.max_new_tokens, self.style)
        long = set(self.store.get(f"too_long/{rows.name}.json", key, dict, measure)["ids"])
        notes = [f"{len(long)} of {len(rows)} {rows.name} prompts are too long for the model's context: left out."]
        return rows.keep(set(rows.ids) - long), notes if long else []

    def finish(self) -> None:
        """Record the environment, unless everything had been made before."""
        if self.store.made or not self.store.has("environment.json", ""):
            seconds = time.monotonic() - self._started
            about = describe(device=self.device, seed=self.options.seed, seconds=seconds)
            about |= origin(self.target, self.options.trust_remote_code)
            if (planned := self.__dict__.get("plan")) is not None:
                about["plan"] = planned.plain()
            self.store.put("environment.json", "", about)

    def release(self) -> None:
        """Let go of the model and the SAEs, for whatever needs their memory next; they are loaded again on demand."""
        for machine in ("model", "saes"):
            self.__dict__.pop(machine, None)
        self._clear()

    @staticmethod
    def _clear() -> None:
        gc.collect()
        give_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Let other processes have the folder."""
        self.store.claim.release()
