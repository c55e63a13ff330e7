"""One record of options: the command line, the saved configuration and part of every cache key.

Contradictions are rejected when it is made. The defaults live here and nowhere else.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from refusalscope.core.disk import write_atomically

RUN_FILE = "options.toml"


Method = Literal["cosine+attribution", "cosine", "cosine+gradient", "attribution", "activation-difference", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
STUDIES = ("categories", "minimal", "jailbreaks", "suffixes", "probes")
"""What `run` does beside the benchmark, in this order, unless `--study` names some of them or none."""
STUDIED = (
    *("studies", "category_prompts", "categories", "language", "pairs", "suffixes", "nodes"),
    *("detection", "look_alikes", "pooling", "paper_labels"),
    *("against", "documents"),
    *("no_read_ahead", "no_feature_labels"),
)
"""What shapes no number of a run's own stages: commands that differ in these may share a folder."""
SWEEP: dict[str, Any] = {"sizes": (10, 20, 30, 40, 50), "factors": (0.0, -1.0, -2.0, -3.0)}
"""The published grid, which a sweep takes where neither command line nor file says otherwise."""


class Options(BaseModel):
    """Everything a user may choose. None means: derive it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "testbed"
    revision: str | None = None
    """Of the model's repository. None: the preset's own, for others the newest."""
    saes: str | None = None
    sae_release: str | None = None
    sae_id: str | None = None
    layers: tuple[int, ...] | None = None
    prompts: Path | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    label: Literal["harmful", "harmless", "look-alike"] = "harmful"
    limit: int | None = Field(default=None, ge=1)
    full: bool = False
    datasets: tuple[str, ...] | None = None
    protocol: Literal["sound", "paper"] = "sound"
    k: int = Field(default=20, ge=1)
    sizes: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Of a sweep alone: the set sizes K* it goes through."""
    methods: tuple[Method, ...] | None = None
    draws: int | None = Field(default=None, ge=3)
    factors: tuple[FiniteFloat, ...] | None = None
    values: tuple[FiniteFloat, ...] | None = None
    studies: tuple[str, ...] | None = None
    """Of `run`: which of STUDIES it does; None: all, `none`: no one."""
    category_prompts: str | None = None
    """Of the studies: where prompts by category come from. None: the testbed's own, for others CATQA."""
    categories: tuple[str, ...] | None = None
    language: str | None = None
    """Of the studies: keep these prompts' language alone; None: CATQA's English, for attacks the model's own."""
    pairs: Path | None = None
    suffixes: Path | None = None
    against: str | None = None
    """Of the SAEs' health: a second SAE set to compare with."""
    documents: str | None = None
    """Of the SAEs' health: plain text outside any chat. None: the testbed's own; other models have none."""
    detection: str | None = None
    """Of probes: what they learn from and are tested on. None: the testbed's own, for others WildJailbreak."""
    look_alikes: str | None = None
    pooling: Literal["last", "max", "mean"] = "last"
    """Of probes: the last position of a prompt, or the largest or mean activation over its instruction."""
    paper_labels: bool = False
    nodes: int = Field(default=20, ge=2)
    """Features drawn in the graph of features."""
    refusal_token: tuple[str, ...] = ()
    best_layer: int | None = Field(default=None, ge=0)
    keep_unrefused: bool = False
    system: str | None = None
    thinking: Literal["off", "on"] = "off"
    chat_template: Path | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    device_map: Literal["auto"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantize: Literal["8bit", "4bit"] | None = None
    trust_remote_code: bool = False
    no_read_ahead: bool = False
    """Keep a single SAE in memory: the next one is read only when its turn has come."""
    no_feature_labels: bool = False
    """Ask Neuronpedia for no explanations of features."""
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> "Options":
        if self.columns and self.prompts is None:
            raise ValueError("--columns maps the columns of a prompt file: name one with --prompts")
        if self.full and self.prompts is not None:
            raise ValueError("--full is the testbed's own grid of data sets: leave out --prompts or --full")
        if self.full and self.model != "testbed":
            raise ValueError("--full is the testbed's own grid of data sets: it needs the model testbed")
        if self.saes is not None and self.sae_release is not None:
            raise ValueError("--saes and --sae-release both name SAEs: leave one out")
        if self.saes is not None and self.sae_id is not None:
            raise ValueError("--sae-id chooses among a release's SAEs: leave out --saes, whose pattern does so itself")
        if self.layers is not None and not self.layers:
            raise ValueError("--layers needs at least one layer")
        if self.device_map is not None and self.device in ("cpu", "mps"):
            raise ValueError("--device-map auto splits a model over CUDA devices: leave out --device")
        if self.factors is not None and not self.factors:
            raise ValueError("--factor needs at least one value")
        if self.values is not None and not self.values:
            raise ValueError("--value needs at least one value")
        if self.methods is not None and not set(self.methods) - {"random"}:
            raise ValueError("--method random is a control of other sets: name one of them too")
        if self.sizes is not None:
            self._sweeps(self.sizes)
        if self.studies is not None:
            self._names_studies(self.studies)
        return self

    def _names_studies(self, names: tuple[str, ...]) -> None:
        if unknown := [name for name in names if name not in (*STUDIES, "none")]:
            raise ValueError(f"--study {unknown[0]!r}: choose among {', '.join(STUDIES)}, or none")
        if not names or ("none" in names and len(set(names)) > 1):
            raise ValueError("--study needs names of studies, or none and nothing else")
        if self.protocol == "paper" and "none" not in names:
            raise ValueError("--protocol paper reproduces the published benchmark alone: leave out --study")

    def _sweeps(self, sizes: tuple[int, ...]) -> None:
        if not sizes:
            raise ValueError("--sizes needs at least one set size")
        if self.full:
            raise ValueError("--full is the grid of `run`: a sweep has its own, leave it out")
        if self.protocol == "paper":
            raise ValueError("--protocol paper fits on the prompts that are judged: a sweep leaves these untouched")

    @property
    def set_sizes(self) -> tuple[int, ...]:
        """The set sizes K* that sets are made at, the main one first; a sweep takes the beginnings of its largest."""
        more = (5,) if self.full else (max(self.sizes),) if self.sizes else ()
        return tuple(dict.fromkeys((self.k, *more)))

    @property
    def wanted_studies(self) -> tuple[str, ...]:
        """What `run` does beside the benchmark, in the order of STUDIES."""
        if self.protocol == "paper":
            return ()
        return tuple(name for name in STUDIES if self.studies is None or name in self.studies)

    @property
    def wanted_methods(self) -> tuple[Method, ...]:
        """The feature sets that are made, in the order of METHODS; in a sweep the first one asked for alone."""
        few: tuple[Method, ...] = ("cosine+attribution", "cosine", "random")
        wanted = self.methods or (METHODS if self.full else few)
        if self.sizes is not None:
            return (next(method for method in wanted if method != "random"),)
        return tuple(method for method in METHODS if method in wanted)

    def set_name(self, method: str, k: int) -> str:
        """The name of a set's artifact; the main size K* goes without saying."""
        return method if k == self.k else f"{method}-k{k}"

    @property
    def random_draws(self) -> int:
        return self.draws or (10 if self.full else 3)


def make(values: dict[str, Any], config: Path | None, *, defaults: Mapping[str, Any] = MappingProxyType({})) -> Options:
    """Options from a TOML file and the command line, which wins. Raises ValueError, one line, on any fault.

    `defaults` are those of a verb that has its own: of a sweep, whose `sizes` no other verb takes.
    """
    saved = {} if config is None else read_toml(config)
    if chosen := sorted(key for key in saved if key.startswith("judge") or key == "labels"):
        raise ValueError(f"{config}: {chosen[0]} is for the command line alone: name judges with --judge")
    # A run folder's own options.toml is a valid configuration: what that run derived is derived anew.
    merged = {**defaults, **{key: value for key, value in saved.items() if key != "derived"}, **values}
    if merged.get("sizes") is not None and not defaults:
        raise ValueError(f"--sizes (in {config}) is an option of `sweep` alone: take it out")
    try:
        return Options(**merged)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else "options"
        message = first["msg"].removeprefix("Value error, ")
        where = f" (in {config})" if config is not None and first["loc"] and first["loc"][0] not in values else ""
        raise ValueError(f"{name}{where}: {message}" if first["loc"] else message) from error


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file's table. Raises ValueError, one line, when it cannot be read or parsed."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def recorded(folder: Path, options: Options) -> dict[str, Any] | None:
    """What an earlier run in `folder` derived, or None for a new folder.

    Raises ValueError when the folder was made with other options, naming each that differs.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        return None
    saved = read_toml(file)
    derived = saved.pop("derived", {})
    plain = as_plain(options)
    differing = sorted(key for key in {*saved, *plain} - set(STUDIED) if saved.get(key) != plain.get(key))
    if differing:
        pairs = ", ".join(f"{key} was {saved.get(key)!r}, now {plain.get(key)!r}" for key in differing)
        raise ValueError(f"{folder} was made with other options ({pairs}): choose another --name, or delete it")
    return derived


def record(folder: Path, options: Options, derived: dict[str, Any]) -> None:
    """Write the options, and what was derived from them, to the run folder."""
    write_atomically(folder / RUN_FILE, tomli_w.dumps({**as_plain(options), "derived": derived}).encode())


def as_plain(options: Options) -> dict[str, Any]:
    """Plain data for TOML and JSON; options left to be derived are absent."""
    return options.model_dump(mode="json", exclude_none=True)
