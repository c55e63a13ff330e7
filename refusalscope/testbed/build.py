"""Builds the embedded assets from nothing: tokenizer, chat model, one SAE per layer, figures, checksums.

Every stage leaves its result in a working folder beside the target and is skipped when that result exists, so a build
that was killed goes on where it stopped; only the finished assets are moved into place, in one rename. The same seed
gives the same bytes on the same machine: one thread, no times or paths in any file. A second set of SAEs, trained on
prompts without the chat template, can be added to finished assets.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refusalscope.core.disk import Claim, write_atomically
from refusalscope.testbed import grammar
from refusalscope.testbed.autoencoders import SaeSet, collect, measure, save_sae, train_sae
from refusalscope.testbed.shipped import CHECKSUMS, checksums, verify
from refusalscope.testbed.tokenizer import BOS, END, PAD, prompt_text, token_id, train_tokenizer
from refusalscope.testbed.train import Progress, Recipe, recipe_dict, train_model


def build(
    out: Path, *, seed: int = 0, progress: Callable[[str, int, int], None] | None = None, recipe: Recipe | None = None
) -> dict[str, Any]:
    """Train everything and put it at `out`, replacing what is there; returns the content of `build.json`.

    `progress(stage, done, of)` is called after every step. The working folder is `out` with `.part` appended; it
    belongs to one seed and recipe, and one of another is discarded.
    """
    out, recipe, progress = Path(out), recipe or Recipe(), progress or _quiet
    work = _working_folder(out, {"seed": seed, "recipe": recipe_dict(recipe)})
    # The claim clears the folder of what a killed build was writing: nothing of that may be moved into place.
    with Claim(work), _deterministic():
        tokenizer, model = _model(work, recipe, seed=seed, progress=progress)
        saes = _saes(work, work / "assets" / "saes", model, tokenizer, recipe, seed=seed, progress=progress)
        refused = refused_first_tokens(model, tokenizer)
        report = {"seed": seed, "recipe": recipe_dict(recipe), "refused": refused, "saes": saes}
        _write_json(work / "assets" / "build.json", report)
        _write_json(work / "assets" / CHECKSUMS, checksums(work / "assets"))
        _move(work, out)
    return report


def build_base_saes(out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """A second set of SAEs for the testbed at `out`, by its recipe and seed, on prompts without the chat template.

    They go to `out`/saes-base, what stands there is replaced; returns the content of its `figures.json`. Raises
    ValueError when no whole testbed is at `out`. The working folder is `out` with `.saes-base.part` appended.
    """
    out = Path(out)
    verify(out)
    about = json.loads((out / "build.json").read_text(encoding="utf-8"))
    seed, recipe = int(about["seed"]), Recipe(**about["recipe"])
    digests = {name: digest for name, digest in checksums(out).items() if name.startswith("model/")}
    work = _working_folder(out.with_name(f"{out.name}.saes-base"), {"about": about, "model": digests})
    with Claim(work), _deterministic():
        tokenizer, model = _load(out / "model")
        saes = _saes(
            work, work / "assets", model, tokenizer, recipe, seed=seed, progress=progress or _quiet, sae_set="base"
        )
        report = {"seed": seed, "sae_set": "base", "saes": saes}
        _write_json(work / "assets" / "figures.json", report)
        _add(work, out, "saes-base")
    return report


def _add(work: Path, out: Path, name: str) -> None:
    """A copy of the finished folder in place, under checksums that fit what stands there at every moment."""
    new = out / f"{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(work / "assets", new)
    others = {file: digest for file, digest in checksums(out).items() if Path(file).parts[0] not in (name, new.name)}
    _write_json(out / CHECKSUMS, others)
    shutil.rmtree(out / name, ignore_errors=True)
    new.replace(out / name)
    _write_json(out / CHECKSUMS, checksums(out))
    shutil.rmtree(work)


def refused_first_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, count: int = 150
) -> dict[str, float]:
    """Share of held-out prompts, per data set, whose likeliest first token is "I"."""
    refusal = token_id(tokenizer, "I")
    shares = {}
    for dataset in grammar.DATASETS:
        prompts = [prompt_text(example.text) for example in grammar.examples(dataset, split="test", count=count)]
        firsts = [first_token(model, tokenizer, prompt) for prompt in prompts]
        shares[dataset] = round(firsts.count(refusal) / len(firsts), 4)
    return shares


@torch.no_grad()
def first_token(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> int:
    """The likeliest token after a rendered prompt."""
    tokens = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    return int(model(tokens, logits_to_keep=1).logits[0, -1].argmax())


def _model(
    work: Path, recipe: Recipe, *, seed: int, progress: Progress
) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Tokenizer and model, trained and saved unless they were; weights as rounded by saving, in float32."""
    path = work / "assets" / "model"
    if not path.exists():
        tokenizer = train_tokenizer(vocabulary=recipe.vocabulary, seed=seed)
        model = train_model(recipe, tokenizer, seed=seed, checkpoint=work / "model.safetensors", progress=progress)
        _save_model(model, tokenizer, path)
    return _load(path)


def _load(path: Path) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    saved = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    return PreTrainedTokenizerFast.from_pretrained(path), saved.eval()


def _save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """A Hugging Face checkpoint in bfloat16 that stops at the end of its turn."""
    part = path.with_name("model.part")
    shutil.rmtree(part, ignore_errors=True)
    special = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD}
    ids = {name: token_id(tokenizer, token) for name, token in special.items()}
    model.generation_config = GenerationConfig(**ids, do_sample=False)
    model.bfloat16().save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.replace(path)


def _saes(
    work: Path,
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    *,
    seed: int,
    progress: Progress,
    sae_set: SaeSet = "chat",
) -> dict[str, dict[str, float]]:
    """Train every layer's SAE that has no figures in `work` yet and save it below `out`; the figures of all of them."""
    figures = work / "figures"
    figures.mkdir(exist_ok=True)
    paths = {layer: figures / f"layer_{layer}.json" for layer in range(recipe.layers)}
    inputs: list[torch.Tensor] = []
    for layer, path in paths.items():
        if path.exists():
            continue
        inputs = inputs or collect(model, tokenizer, tokens=recipe.sae_tokens, seed=seed, sae_set=sae_set)
        tensors = train_sae(inputs[layer], recipe, seed=seed * 64 + layer, progress=progress, label=f"sae {layer}")
        save_sae(out / f"layer_{layer}", tensors, layer=layer)
        _write_json(path, {key: round(value, 4) for key, value in measure(tensors, inputs[layer])._asdict().items()})
    return {f"layer_{layer}": json.loads(path.read_text(encoding="utf-8")) for layer, path in paths.items()}


def _working_folder(out: Path, identity: dict[str, Any]) -> Path:
    """The folder of an unfinished build of the same seed and recipe, or a new one."""
    work = out.with_name(out.name + ".part")
    marker = work / "identity.json"
    if not marker.exists() or json.loads(marker.read_text(encoding="utf-8")) != identity:
        shutil.rmtree(work, ignore_errors=True)
        (work / "assets").mkdir(parents=True)
        _write_json(marker, identity)
    return work


def _move(work: Path, out: Path) -> None:
    """Put the finished assets in place; what was there goes only when the new ones stand ready beside it."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    (work / "assets").replace(out)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(work)


@contextmanager
def _deterministic() -> Iterator[None]:
    """One thread and no denormals (they slow a step fourfold), restored afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode())


def _quiet(_stage: str, _done: int, _of: int) -> None:
    """Progress that nobody watches."""
