"""Times the factored attribution against the published formulation: same model, prompts and machine; prints JSON.

    python benchmarks/attribution.py             # the ladder, a minute or two per rung on two cores
    python benchmarks/attribution.py --rung 1

Every measurement is a process of its own, so that its peak memory is its own. `ours` attributes all features and
`candidates` ten per layer, both with the published ten-node rule and path, so the work asked for is the same; `sound`
is what a run does by default. Memory is the peak beyond the loaded model and prompts, so it counts the SAEs that a
variant holds: all of them, or one at a time. It is read from /proc, and null where there is none.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from refusalscope.core.types import Direction, Prompt, Prompts
from refusalscope.inputs.chat import ChatModel, Tokens
from refusalscope.inputs.saes import SaeBank
from refusalscope.mechanism import attribution, naive, reading
from refusalscope.mechanism.attribution import Scheme
from refusalscope.testbed import grammar
from refusalscope.testbed.shipped import ASSETS

VARIANTS = ("naive", "ours", "candidates", "sound")
REPEATS = 3
CANDIDATES = 10


class Rung(NamedTuple):
    """A random Llama with the testbed's tokenizer, JumpReLU SAEs that fire about 50 features a token, and a batch."""

    layers: int
    width: int
    features: int
    prompts: int


LADDER = (Rung(4, 128, 1024, 16), Rung(6, 256, 8192, 16), Rung(8, 512, 16384, 8), Rung(12, 768, 32768, 4))


class Bench(NamedTuple):
    """Everything loaded, nothing computed yet."""

    model: ChatModel
    saes: SaeBank
    tokens: Tokens
    direction: Direction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rung", type=int, choices=range(len(LADDER)), help="one rung of the ladder alone")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant is not None:
        json.dump(measure(LADDER[options.rung], options.variant), sys.stdout)
        return
    rungs = range(len(LADDER)) if options.rung is None else [options.rung]
    report = {"machine": machine(), "rungs": [compare(rung) for rung in rungs]}
    json.dump(report, sys.stdout, indent=1)
    print()


def compare(rung: int) -> dict[str, Any]:
    """Every variant of a rung in a process of its own, and the ratios to the naive formulation."""
    found = {}
    for variant in VARIANTS:
        command = [sys.executable, __file__, "--rung", str(rung), "--variant", variant]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[variant] = json.loads(done.stdout)
    base = found["naive"]
    ratios = {
        variant: {part: round(base[part] / made[part], 1) if made[part] else None for part in ("seconds", "megabytes")}
        for variant, made in found.items()
        if variant != "naive"
    }
    sums = [found[variant]["checksum"] for variant in ("naive", "ours")]
    difference = abs(sums[0] - sums[1]) / abs(sums[0])
    return {
        **LADDER[rung]._asdict(),
        "measured": found,
        "naive over": ratios,
        "relative difference of sums": difference,
    }


def measure(rung: Rung, variant: str) -> dict[str, float | None]:
    """Median seconds of three runs after one to warm up, peak memory beyond what was loaded, and a checksum."""
    torch.set_flush_denormal(True)
    with TemporaryDirectory() as folder:
        bench = load(rung, Path(folder))
        gc.collect()
        before = forget_peak()
        run = runner(bench, variant)
        seconds, checksum = [], 0.0
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            checksum = run()
            seconds.append(time.perf_counter() - start)
    used = None if before is None else round(memory("VmHWM") - before, 1)
    return {"seconds": round(median(seconds[1:]), 3), "megabytes": used, "checksum": checksum}


def runner(bench: Bench, variant: str) -> Callable[[], float]:
    """One whole attribution from tokens to scores; returns the sum of their absolute values."""
    layers = bench.saes.layers
    if variant == "naive":
        # The published code keeps every SAE in memory.
        opened = {layer: bench.saes.layer(layer) for layer in layers}
        no_gradient = Scheme("none", lambda _model, _tokens, clean, _ends, _metric: dict(clean), True)
        return lambda: sum(
            float(part.abs().sum())
            for part in naive.attribute(
                bench.model, opened, traced(bench, no_gradient), attribution.left_riemann(10)
            ).values()
        )
    scheme = attribution.sound() if variant == "sound" else attribution.paper()
    features = list(range(CANDIDATES)) if variant in ("candidates", "sound") else None

    def run() -> float:
        traces = [traced(bench, scheme)]
        entries = [reading.layer_entries(bench.saes.layer(layer), traces, features)[0] for layer in layers]
        return sum(float(part.value.abs().sum()) for part in entries)

    return run


def traced(bench: Bench, scheme: Scheme) -> attribution.Trace:
    return attribution.trace(bench.model, bench.tokens, bench.direction, layers=bench.saes.layers, scheme=scheme)


def load(rung: Rung, folder: Path) -> Bench:
    """The rung's model, SAEs on disk as SAELens writes them, and prompts of one length, so that none is padded."""
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ASSETS / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=rung.width,
        intermediate_size=3 * rung.width,
        num_hidden_layers=rung.layers,
        num_attention_heads=rung.width // 32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = ChatModel(LlamaForCausalLM(config), tokenizer, name="benchmark", identity="benchmark")
    prompts = same_length(model, rung.prompts)
    residuals = model.run(model.tokens(prompts), keep=range(rung.layers)).residuals
    folders = {layer: save_sae(folder / f"layer_{layer}", rung, part) for layer, part in residuals.items()}
    direction = Direction(torch.randn(rung.width), rung.layers // 2, torch.zeros(rung.layers), (0,), (), {})
    return Bench(model, SaeBank.from_folders(folders, identity="benchmark"), model.tokens(prompts), direction)


def same_length(model: ChatModel, count: int) -> Prompts:
    """Grammar prompts of the commonest length in tokens."""
    by_length: dict[int, list[Prompt]] = {}
    for example in grammar.examples("harmful", split="train", count=600):
        prompt = Prompt(example.id, example.text, "harmful")
        by_length.setdefault(len(model.template.encode(prompt.text).ids), []).append(prompt)
    return Prompts("benchmark", tuple(max(by_length.values(), key=len)[:count]))


def save_sae(folder: Path, rung: Rung, residual: torch.Tensor) -> Path:
    """A random JumpReLU SAE whose threshold lets about 50 features a token fire."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    made = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=rung.width, d_sae=rung.features, apply_b_dec_to_input=False, device="cpu")
    )
    decoder = torch.nn.functional.normalize(torch.randn(rung.features, rung.width), dim=1)
    made.W_dec.data, made.W_enc.data = decoder, decoder.T.contiguous()
    before = residual.flatten(0, 1)[:64] @ made.W_enc
    made.threshold.data.fill_(float(before.topk(50).values[:, -1].mean()))
    made.save_model(str(folder))
    return folder


def forget_peak() -> float | None:
    """Let the peak of resident memory start anew (Linux); what is resident now, in megabytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return memory("VmRSS")


def memory(field: str) -> float:
    """A line of /proc/self/status in megabytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
