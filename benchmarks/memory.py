"""Holds the memory plan against what a whole run really takes; prints JSON.

    python benchmarks/memory.py testbed       # `run testbed` without the studies, a minute or two on two cores
    python benchmarks/memory.py gemma         # a random Gemma 2 of 290 million parameters with 16k-wide SAEs on every
                                              # layer, through the same chain; ten minutes, 2 GB of disk

The run is a process of its own. Measured is anonymous memory (mapped files can be let go), sampled from /proc while the
chain runs, above its level once every library is imported; `over` is what was measured over what the plan said, by
stage for whoever looks for the stage that is counted wrong.
"""

import argparse
import json
import pkgutil
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import refusalscope
from refusalscope.testbed.shipped import ASSETS

CASES: dict[str, dict[str, Any]] = {
    "testbed": {"model": "testbed", "studies": ("none",)},
    # Random weights refuse nothing and no layer of theirs induces refusal: all of that is given.
    "gemma": {
        "studies": ("none",),
        "refusal_token": ("I",),
        "keep_unrefused": True,
        "best_layer": 5,
        "limit": 8,
        "max_new_tokens": 8,
        "factors": (0.0,),
    },
}
LIBRARIES = ("accelerate", "matplotlib.backends.backend_svg", "sae_lens", "scipy.stats", "sklearn.linear_model")
GEMMA = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "num_attention_heads": 8}
GEMMA |= {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 131072, "max_position_embeddings": 512}
FEATURES = 16384
TRAIN = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        json.dump(measure(options.case, options.child), sys.stdout)
        return
    json.dump({"machine": machine(), **compare(options.case)}, sys.stdout, indent=1)
    print()


def compare(case: str) -> dict[str, Any]:
    """One case in a process of its own: the plan, what was measured, and the one over the other."""
    with TemporaryDirectory() as folder:
        if case == "gemma":
            make_gemma(Path(folder))
        command = [sys.executable, __file__, case, "--child", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    planned = found["plan"]["peak"]["device"] + found["plan"]["peak"]["host"]
    return {"case": case, "planned": planned, "over": round(found["measured"] / planned, 3), **found}


def measure(case: str, folder: Path) -> dict[str, Any]:
    """Run the chain, watched. Returns the plan and the peak, over all and by what was being done."""
    for module in pkgutil.walk_packages(refusalscope.__path__, "refusalscope."):
        # Kernels are for a card, and a torch without one brings no Triton.
        if module.name != "refusalscope.inputs.kernels":
            import_module(module.name)
    for name in (*LIBRARIES, f"transformers.models.{'gemma2' if case == 'gemma' else 'llama'}"):
        import_module(name)
    from refusalscope.pipeline import chains, options
    from refusalscope.pipeline.job import Job

    torch.set_flush_denormal(True)
    given = CASES[case]
    if case == "gemma":
        own = {"model": str(folder / "model"), "saes": f"{folder}/saes/layer_{{layer}}", "prompts": folder / "prompts"}
        given = {**given, **own}
    start = time.perf_counter()
    with watched() as peaks:
        job = Job(options.make(given, None), folder / "run", peaks.during)
        plan = job.plan
        assert plan is not None
        job.run(chains.CHAINS["run"])
        job.finish()
    return {
        "measured": max(peaks.found.values()),
        "seconds": round(time.perf_counter() - start, 1),
        "stages": peaks.found,
        "plan": plan.plain(),
        "halved": job.halved,
    }


class Peaks:
    """The largest anonymous memory above a level, by what was being done."""

    def __init__(self) -> None:
        self.level = anonymous()
        self.found: dict[str, int] = {}
        self._what = "starting"

    def during(self, what: str, _done: int, _total: int) -> None:
        self._what = what.partition(":")[0]

    def look(self) -> None:
        self.found[self._what] = max(self.found.get(self._what, 0), anonymous() - self.level)


@contextmanager
def watched() -> Iterator[Peaks]:
    """Peaks of what is done inside, sampled every two milliseconds."""
    peaks, stop = Peaks(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peaks.look()

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield peaks
    finally:
        stop.set()
        watching.join()


def anonymous() -> int:
    """Resident memory that is no mapped file, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise SystemExit("this system does not tell anonymous memory apart: run it on Linux")


def make_gemma(folder: Path) -> None:
    """A checkpoint in bfloat16 with the testbed's tokenizer, a JumpReLU SAE a layer, and prompts of the testbed's."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    from refusalscope.inputs import prompts

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "model")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    Gemma2ForCausalLM(Gemma2Config(**GEMMA, **ids)).bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    width = GEMMA["hidden_size"]
    for layer in range(GEMMA["num_hidden_layers"]):
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=width, d_sae=FEATURES, device="cpu"))
        decoder = torch.nn.functional.normalize(torch.randn(FEATURES, width), dim=1)
        sae.W_dec.data, sae.W_enc.data = decoder, decoder.T.contiguous()
        sae.threshold.data.fill_(1.0)
        sae.save_model(folder / "saes" / f"layer_{layer}")
    sets = prompts.from_testbed(count=TRAIN, full=False)
    for label in ("harmful", "harmless"):
        parts = {"train": "train", "val": "validation", "test": ""}
        for part, own in parts.items():
            rows = sets.evaluation[label] if part == "test" else sets.fitting[f"{label}-{own}"]
            write_prompts(folder / "prompts" / "splits" / f"{label}_{part}.json", [row.text for row in rows[:TRAIN]])
    for name in ("harmbench_test", "jailbreakbench", "advbench"):
        rows = sets.evaluation["harmful"]
        write_prompts(folder / "prompts" / "processed" / f"{name}.json", [f"{row.text} ({name})" for row in rows])


def write_prompts(file: Path, texts: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([{"instruction": text, "category": None} for text in texts]))


def machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
