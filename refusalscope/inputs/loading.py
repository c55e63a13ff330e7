"""Weights from a folder or the hub onto devices: which type, how many bits, where each layer.

Also what a checkpoint says of itself: its decoder layers, the tokens it ends with. Knows nothing of chats or hooks.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from refusalscope.core.memory import is_out_of_memory
from refusalscope.inputs import damaged, hub

DType = Literal["auto", "float32", "bfloat16", "float16"]
Bits = Literal["8bit", "4bit"]
DeviceMap = Literal["auto"] | Mapping[str, str | int]
"""`auto` fills the devices there are, then memory, then the disk; or where each named part goes."""


@dataclass(frozen=True)
class Placement:
    """How weights are held, and where."""

    device: str = "auto"
    dtype: DType = "auto"
    """`auto` is float32 on the CPU and the checkpoint's own type elsewhere."""
    quantize: Bits | None = None
    device_map: DeviceMap | None = None
    """None keeps the whole model on `device`."""
    offload_folder: str | Path | None = None
    """Where the layers lie that a device map sends to the disk."""


class Loaded(NamedTuple):
    """A causal language model and its tokenizer, as transformers makes them."""

    model: Any
    tokenizer: Any


def load(
    source: str | Path,
    tokenizer: Any = None,
    *,
    name: str,
    revision: str | None,
    placement: Placement,
    trust_remote_code: bool,
) -> Loaded:
    """Load from a folder or a hub name at a commit; the tokenizer too, unless it is given.

    Raises ValueError with one line when that cannot be done.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, settings = _where(revision, trust_remote_code), _settings(placement)
    with _one_line(name, source, revision):
        tokenizer = AutoTokenizer.from_pretrained(source, **where) if tokenizer is None else tokenizer
        model = AutoModelForCausalLM.from_pretrained(source, **where, **settings)
    if "device_map" not in settings:
        model.to(device=choose_device(placement.device))  # type: ignore[reportCallIssue]
    return Loaded(model, tokenizer)


class Described(NamedTuple):
    """What a checkpoint says of itself before its weights are read."""

    config: Any
    """Of the text stack."""
    tokenizer: Any


def describe(source: str | Path, *, name: str, revision: str | None, trust_remote_code: bool) -> Described:
    """Configuration and tokenizer alone. Raises ValueError with one line when that cannot be done."""
    from transformers import AutoConfig, AutoTokenizer

    where = _where(revision, trust_remote_code)
    with _one_line(name, source, revision):
        config = AutoConfig.from_pretrained(source, **where).get_text_config()
        return Described(config, AutoTokenizer.from_pretrained(source, **where))


class Skeleton(NamedTuple):
    """A model without weights."""

    model: Any
    """On the meta device, of the type it would be loaded as."""
    stored: torch.dtype
    """The type of the weights in the checkpoint."""


def skeleton(
    source: str | Path, *, name: str, revision: str | None, placement: Placement, trust_remote_code: bool
) -> Skeleton:
    """What is known of a model before its weights are read.

    Raises ValueError with one line when its configuration cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = _where(revision, trust_remote_code)
    dtype = choose_dtype(placement.dtype, choose_device(placement.device))
    with _one_line(name, source, revision), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, **where)
        own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32
        kind = own if dtype == "auto" else dtype
        model = AutoModelForCausalLM.from_config(config, dtype=kind, trust_remote_code=trust_remote_code)
        return Skeleton(model, own)


def _where(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    return {"trust_remote_code": trust_remote_code, **({} if revision is None else {"revision": revision})}


@contextmanager
def _one_line(name: str, source: str | Path, revision: str | None) -> Iterator[None]:
    """What transformers raises for a checkpoint that it cannot read, as a ValueError of one line."""
    try:
        yield
    except Exception as error:
        # Libraries fail in their own ways, tokenizers by a bare Exception. Too little memory is no fault of the files.
        if is_out_of_memory(error):
            raise
        reason = why(error, source, revision) or hub.first_line(error)
        raise ValueError(f"cannot load {name} as a causal language model: {reason}") from error


def why(
    error: Exception, source: str | Path, revision: str | None, *, code: str = "add --trust-remote-code"
) -> str | None:
    """What kept transformers from loading a folder, or a repository at a commit, in one line; None: it says so itself.

    Code that the repository brings (and what to do about it), what the hub has against it, a part that is missing or a
    file that is not whole.
    """
    if "trust_remote_code=True" in str(error):
        page = f"https://huggingface.co/{source}/tree/{revision}" if revision else str(source)
        return f"it brings code of its own, which would run with all your rights: read {page}, then {code}"
    asked = None if revision is None else hub.Asked(str(source), revision)
    folder = Path(source) if asked is None else hub.cached(asked)
    missing = damaged.lacking(folder) if folder else ""
    if missing and asked:
        return hub.absent(asked, error, missing)
    if missing:
        return f"{missing} is missing from {folder}, whose index of weights names it: copy or download it"
    if asked and (line := hub.explained(error, asked)):
        return line
    if asked and "does not appear to have a file" in str(error) and (line := hub.unreached(asked)):
        # That is what transformers says too where the hub could not be asked.
        return line
    return None if folder is None else damaged.described(folder)


def choose_device(device: str) -> str:
    """`auto` is CUDA where there is one, else the CPU. Raises ValueError for a device that is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available.get(device, False):
        usable = [name for name, there in available.items() if there]
        raise ValueError(f"device {device!r} is not available here: choose one of {', '.join(['auto', *usable])}")
    return device


def choose_dtype(dtype: str, device: str) -> torch.dtype | Literal["auto"]:
    """What transformers is asked for. Raises ValueError for a type that models do not run in."""
    if dtype == "auto":
        return torch.float32 if device == "cpu" else "auto"
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise ValueError(f"dtype {dtype!r} is not known: choose one of {', '.join(['auto', *types])}")
    return types[dtype]


def find_layers(model: Any, name: str) -> nn.ModuleList:
    """The decoder layers of the text stack, found by structure: the one list of `num_hidden_layers` modules."""
    count = model.config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.get_decoder().named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found[path] = module
    if len(found) != 1:
        raise ValueError(
            f"{name}: looked for one list of {count} decoder layers in {type(model).__name__}, found {sorted(found)}"
        )
    return next(iter(found.values()))


def keep_softcapping(model: Any) -> None:
    """Let a model that caps its attention logits do so: `sdpa` refuses to, or leaves the cap out without a word."""
    if caps_attention(model) and model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def caps_attention(model: Any) -> bool:
    """Whether attention logits are bounded by a soft cap, as Gemma 2's are."""
    return getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None


def end_tokens(model: Any, tokenizer: Any, own: int | None) -> tuple[int, list[int]]:
    """What closes a turn, and all that generation stops at; `own` is the template's own end-of-turn token."""
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    ends = [int(token) for token in (*ends, tokenizer.eos_token_id, own) if token is not None]
    if not ends:
        raise ValueError("the model names no end-of-turn token in its generation_config.json, tokenizer or template")
    closes = next(token for token in (own, tokenizer.eos_token_id, ends[0]) if token is not None)
    return int(closes), list(dict.fromkeys(ends))


def _settings(placement: Placement) -> dict[str, Any]:
    device = choose_device(placement.device)
    made: dict[str, Any] = {"dtype": choose_dtype(placement.dtype, device)}
    if placement.quantize is not None:
        made["quantization_config"] = _quantization(placement.quantize)
    if placement.device_map is not None:
        made["device_map"] = placement.device_map
    elif placement.quantize is not None:
        # Quantised weights are made where they stay: they must not be moved afterwards.
        made["device_map"] = {"": device}
    if placement.offload_folder is not None:
        made["offload_folder"] = str(placement.offload_folder)
    return made


def _quantization(bits: str) -> Any:
    from transformers import BitsAndBytesConfig

    if bits not in ("8bit", "4bit"):
        raise ValueError(f"quantize {bits!r} is not known: choose 8bit or 4bit")
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{bits} weights need bitsandbytes, which is not installed: pip install 'refusalscope[quantized]'"
        )
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
