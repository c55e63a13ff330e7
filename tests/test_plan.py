"""What is counted before weights are read is what is held once they are; batch sizes are what fits, and no less."""

import json
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from refusalscope.inputs import footprint
from refusalscope.inputs.footprint import Footprint
from refusalscope.inputs.loading import Placement, Skeleton
from refusalscope.inputs.saes import SaeBank
from refusalscope.pipeline import plan as planning
from refusalscope.pipeline.job import Job
from refusalscope.pipeline.options import Options
from refusalscope.pipeline.plan import Held, Plan, Work
from refusalscope.testbed.shipped import ASSETS
from tests import tiny
from tests.families import FAMILIES, language_model
from tests.processes import ROOT

WORK = Work(fitting=20, longest=24, answer=8, train=40, validation=16, most=100, documents=False)
GIGABYTE = 10**9


def known(family: str = "gemma2", dtype: torch.dtype = torch.float32) -> Footprint:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(language_model(family).config, dtype=dtype)
    return Footprint(Skeleton(model, torch.bfloat16), Placement("cpu"))


# ---- footprint


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3.5-multimodal"])
def test_weights_are_counted_to_the_byte_but_for_buffers(family: str) -> None:
    model = language_model(family)
    held = sum(part.nbytes for part in model.parameters())
    assert held <= known(family).weights <= held + sum(part.nbytes for part in model.buffers()) + 256


@pytest.mark.parametrize("family", ["gemma2", "llama", "qwen3", "neox", "olmo2"])
def test_what_is_counted_without_weights_is_what_the_model_itself_makes(family: str) -> None:
    model, counted = language_model(family).requires_grad_(False), known(family)
    prompts, positions = 3, 40
    inputs = {
        "inputs_embeds": torch.randn(prompts, positions, 32, requires_grad=True),
        "attention_mask": torch.zeros(prompts, 1, positions, positions),
    }
    counter = footprint._Counter([*model.parameters(), *model.buffers(), *inputs.values()])
    with torch.no_grad(), counter:
        cache = model.get_decoder()(**inputs, use_cache=True).past_key_values
    expected = counted.forward(positions)
    # Attention in one kernel keeps less than what is counted: its parts.
    assert counter.peak <= prompts * expected.peak <= 1.3 * counter.peak
    assert prompts * expected.left == pytest.approx(counter.held, rel=0.01)
    assert counter.held >= sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    counter = footprint._Counter([*model.parameters(), *model.buffers(), *inputs.values()])
    with counter:
        found = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        torch.autograd.grad(found.logits.sum(), found.hidden_states[:-1])
    assert 0.95 * counter.peak <= prompts * counted.gradient(positions).peak <= 1.3 * counter.peak


def test_an_architecture_that_looks_at_values_is_estimated() -> None:
    experts = known("qwen3-moe")
    assert experts.gradient(16).peak == 40 * 4 * 16 * 32 * 4
    assert experts.forward(16).left == 2 * 4 * 16 * 1 * 16 * 4


def test_half_precision_takes_half() -> None:
    full, half = known("llama"), known("llama", torch.bfloat16)
    assert half.weights == pytest.approx(full.weights / 2, rel=0.01)
    assert half.forward(64).left == full.forward(64).left / 2


def test_what_lies_in_a_mapped_file_is_told_from_what_is_held(tmp_path: Path) -> None:
    mapped = tiny.bank(tmp_path).layer(0).decoder
    assert footprint.is_mapped(mapped)
    assert not footprint.is_mapped(mapped.clone())


def test_a_container_leaves_its_limit_without_what_it_holds(tmp_path: Path) -> None:
    assert footprint._group_limit(tmp_path) == []
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert footprint._group_limit(tmp_path) == [1000 - 700 + 250]
    (tmp_path / "memory.max").write_text("max\n")
    assert footprint._group_limit(tmp_path) == []


# ---- plan


Make = Callable[..., Plan]
LARGEST = {"batch_size": 64, "batch_sizes": dict.fromkeys(("answer", "minimal", "restore"), 256)}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A plan for so much free memory, everything else the same unless it is named."""
    sae, counted = tiny.bank(tmp_path_factory.mktemp("saes")).layer(0), known()

    def made(free: int, **changes: Any) -> Plan:
        options: dict[str, Any] = {"name": "tiny", "device": "cpu", "free": Held(free, free), "read_ahead": True}
        return planning.make(counted, WORK, **{**options, "sae": sae, **changes})

    return made


@given(free=st.integers(planning.OWN, 2 * planning.OWN), device=st.sampled_from(["cpu", "cuda"]))
def test_every_stage_takes_the_largest_batch_that_fits(free: int, device: str, make: Make) -> None:
    plan = make(free, device=device)
    room = Held(int(planning.SHARE * free), int(planning.SHARE * free) - plan.mapped)

    def fits(size: int) -> bool:
        return plan.fixed.plus(stage.at(size)).within(room, shared=plan.shared)

    largest = {"answer": 256} | ({"features": 128} if device == "cuda" else {})
    for name, stage in plan.stages.items():
        assert stage.size == 1 or fits(stage.size)
        assert stage.size == largest.get(name, 64) or not fits(2 * stage.size)


def test_with_room_for_all_everything_is_as_large_as_it_may_be(make: Make) -> None:
    plan = make(GIGABYTE)
    assert plan.chosen == LARGEST
    assert (plan.fits, plan.read_ahead) == (True, True)
    assert plan.lines()[0].startswith("memory for tiny on cpu: weights 0.2 MB")
    assert re.fullmatch(r"  gradients: 40 prompts at once, \d+ MB, of it \d\.\d MB a prompt", plan.lines()[2])
    assert plan.lines()[-1].endswith("free 1.0 GB")


def test_what_does_not_fit_says_so_and_is_not_read_ahead(make: Make) -> None:
    plan = make(planning.OWN // 2)
    assert plan.chosen["batch_size"] == 1
    assert plan.chosen["read_ahead"] is False
    assert plan.lines()[-1].startswith("  this may not fit: try --dtype bfloat16")


def test_stages_of_studies_take_the_size_of_the_stage_they_resemble(make: Make) -> None:
    plans = (make(free) for free in range(planning.OWN, 3 * planning.OWN, 10**6))
    plan = next(plan for plan in plans if "batch_sizes" in plan.chosen)
    sizes = {name: plan.stages[name].size for name in ("features", "answer", "cost", "direction", "explain")}
    assert len(set(sizes.values())) > 1
    for name, like in planning.LIKE.items():
        assert plan.chosen["batch_sizes"].get(name, plan.chosen["batch_size"]) == sizes[like]


def test_a_size_that_was_asked_for_is_taken_whatever_fits(make: Make) -> None:
    plan = make(1, given=24)
    assert plan.chosen == {"batch_size": 24, "read_ahead": False}
    assert not plan.fits


def test_the_plan_comes_before_the_weights_and_its_choice_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    new = Job(Options(limit=8, max_new_tokens=4), folder)
    assert new.plan is not None
    assert new.plan.chosen == LARGEST
    assert "model" not in vars(new)
    new.begin()
    new.close()
    again = Job(Options(limit=8, max_new_tokens=4), folder)
    assert again.plan is None
    assert again.derived == {**LARGEST, "chat": {}}


def test_saes_of_another_width_are_told_before_the_weights(tmp_path: Path) -> None:
    tiny.save_saes(tmp_path, layers=2)
    options = Options(model=str(ASSETS / "model"), saes=f"{tmp_path}/layer_{{layer}}", prompts=_prompts(tmp_path))
    job = Job(options, tmp_path / "run")
    with pytest.raises(ValueError, match="reads residuals of width 32, but model has width 128"):
        assert job.plan
    assert "model" not in vars(job)


def _prompts(folder: Path) -> Path:
    file = folder / "prompts.jsonl"
    rows = ({"instruction": f"What is number {n}?", "label": "harmful"} for n in range(9))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# ---- SAEs in turn


class Shelf:
    """Loaders that note what was read, and how many SAEs are alive at once at most."""

    def __init__(self, folder: Path) -> None:
        self.read: list[int] = []
        self.done = 0
        self.most = 0
        self.broken: set[int] = set()
        self._alive: list[weakref.ref[Any]] = []
        self._folders = tiny.save_saes(folder, layers=4)

    def load(self, layer: int, device: str) -> Any:
        from sae_lens import SAE

        self.read.append(layer)
        if layer in self.broken:
            self.broken.remove(layer)
            raise ValueError(f"layer {layer} is broken")
        sae = SAE.load_from_disk(self._folders[layer], device=device)
        self._alive.append(weakref.ref(sae))
        self.most = max(self.most, sum(one() is not None for one in self._alive))
        self.done += 1
        return sae

    def bank(self, **options: Any) -> SaeBank:
        return SaeBank({layer: partial(self.load, layer) for layer in range(4)}, identity="shelf", **options)


@pytest.mark.parametrize(("ahead", "most"), [(True, 2), (False, 1)])
def test_one_sae_is_in_use_and_at_most_the_next_is_read(ahead: bool, most: int, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    seen = []
    for sae in shelf.bank(read_ahead=ahead).each():
        seen.append((sae.layer, float(sae.decoder.sum())))
        while ahead and shelf.done < min(4, sae.layer + 2):
            time.sleep(0.001)  # the next one is being read while this one is in use
    assert shelf.read == [0, 1, 2, 3]
    assert shelf.most == most
    alone = [shelf.bank().layer(layer) for layer in range(4)]
    assert seen == [(sae.layer, float(sae.decoder.sum())) for sae in alone]


def test_an_sae_cannot_be_used_after_its_turn(tmp_path: Path) -> None:
    turns = Shelf(tmp_path).bank().each([2, 3])
    first = next(turns)
    next(turns)
    with pytest.raises(AttributeError):
        first.encode(torch.zeros(1, 32))


def test_the_next_sae_is_read_while_one_is_in_use_unless_told_otherwise(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    turns = shelf.bank(read_ahead=False).each([1, 3])
    next(turns)
    turns.close()
    assert shelf.read == [1]
    turns = shelf.bank().each([1, 3])
    next(turns)
    turns.close()  # waits for the one that is being read
    assert shelf.read == [1, 1, 3]


def test_what_could_not_be_read_ahead_is_tried_again_in_its_turn(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.broken = {2}
    assert [sae.layer for sae in shelf.bank().each()] == [0, 1, 2, 3]
    assert shelf.read.count(2) == 2
    with pytest.raises(ValueError, match="layer 9 has no SAE"):
        list(shelf.bank().each([0, 9]))


# ---- the plan against a real run


@pytest.mark.slow
@pytest.mark.parametrize("case", ["testbed", "gemma"])
def test_the_plan_is_what_a_run_takes_and_no_less(case: str) -> None:
    command = [sys.executable, "benchmarks/memory.py", case]
    found = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
    assert found["measured"] <= found["planned"], found
    assert found["planned"] - found["measured"] <= max(0.25 * found["measured"], 100e6), found
    assert found["halved"] == []
