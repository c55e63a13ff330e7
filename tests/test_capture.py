"""Captured activations equal a plain reading one prompt at a time, resume after a kill, and need no more memory."""

import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from refusalscope.core.activations import Activations, half
from refusalscope.core.store import Store
from refusalscope.core.types import Prompt, Prompts
from refusalscope.evals.probes import Probe
from refusalscope.inputs import presets
from refusalscope.inputs.chat import ChatModel
from refusalscope.inputs.saes import SaeBank
from refusalscope.inputs.template import Role
from refusalscope.mechanism import activations
from refusalscope.mechanism.activations import POOLINGS, Plan, Pooling
from refusalscope.pipeline import capture
from refusalscope.pipeline.capture import Captured
from tests import tiny
from tests.processes import _server


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=8), st.sampled_from([1.0, 1e-30, 1e6]))
@settings(deadline=None)
def test_half_precision_keeps_three_digits_of_any_size(values: list[float], scale: float) -> None:
    rows = torch.tensor([values]) * min(scale, 1.0)
    made = half(rows)
    assert bool(made.values.isfinite().all())
    largest = float(rows.abs().max())
    assert torch.allclose(made.restored(), rows, rtol=2**-11, atol=max(largest * 2**-24, 2.0**-126 * 2**-24))


def test_bfloat16_is_kept_whole_and_what_is_not_finite_is_refused() -> None:
    rows = (torch.randn(20, 30) * 1e5).bfloat16().float()
    assert torch.equal(half(rows).restored(), rows)
    with pytest.raises(ValueError, match="not finite"):
        half(torch.tensor([[float("inf")]]))


def plan_of(bank: SaeBank, how: Pooling) -> Plan:
    return Plan((0, 2, 3), bank.slices({1: [5, 3], 3: [7]}), 2, how)


def plainly(model: ChatModel, bank: SaeBank, prompt: Prompt, plan: Plan) -> tuple[torch.Tensor, ...]:
    """One prompt by itself, without padding, every SAE whole."""
    tokens = model.tokens(Prompts("one", (prompt,)))
    residuals = {layer: part[0] for layer, part in model.run(tokens, keep=range(4)).residuals.items()}
    inside = tokens.roles[0] == Role.INSTRUCTION

    def pool(values: torch.Tensor) -> torch.Tensor:
        if plan.pooling == "last":
            return values[-1]
        return values[inside].amax(0) if plan.pooling == "max" else values[inside].mean(0)

    encoded = {layer: bank.layer(layer).encode(residuals[layer]) for layer in (1, 2, 3)}
    chosen = torch.stack([pool(encoded[feature.layer])[feature.index] for feature in plan.features])
    return torch.stack([pool(residuals[layer]) for layer in plan.layers]), chosen, pool(encoded[2])


@pytest.mark.parametrize("how", POOLINGS)
def test_a_batch_equals_one_prompt_at_a_time(how: Pooling, tmp_path: Path) -> None:
    model, bank = tiny.chat_model(), tiny.bank(tmp_path / "saes")
    plan, rows = plan_of(bank, how), tiny.prompts()
    store = Store(tmp_path / "run")
    make = partial(activations.read, model, bank.layer(2), plan=plan, batch_size=4)
    paths = capture.capture(store, "captured", [rows], key="k", make=make)
    captured = Captured(store, {"rows": paths})
    expected = [plainly(model, bank, row, plan) for row in rows]
    for at, layer in enumerate(plan.layers):
        found = capture.matrix(captured.source(capture.dense(layer, plan.layers)), "rows")
        assert np.allclose(found, torch.stack([one[0][at] for one in expected]).numpy(), atol=3e-3)
    found = capture.matrix(captured.source(capture.chosen(plan.features[::-1], plan.features)), "rows")
    assert np.allclose(found, torch.stack([one[1] for one in expected]).numpy()[:, ::-1], atol=3e-3)
    whole = torch.stack([one[2] for one in expected]).numpy()
    every = capture.matrix(captured.source(capture.whole(96)), "rows")
    assert isinstance(every, csr_matrix)
    assert np.allclose(every.toarray(), whole, atol=3e-3)
    some = capture.matrix(captured.source(capture.columns([9, 4], 96)), "rows")
    assert np.allclose(some, whole[:, [9, 4]], atol=3e-3)
    probe = Probe(np.arange(96.0), -1.0)
    scores = capture.scores(captured.source(capture.whole(96)), "rows", probe)
    assert np.allclose(scores, every @ probe.weights - 1, atol=1e-9)


def test_a_prompt_without_a_token_of_its_own_cannot_be_pooled() -> None:
    roles = torch.tensor([[int(Role.HEADER), int(Role.CLOSING)]])
    with pytest.raises(ValueError, match="cannot be pooled"):
        activations.pooled(torch.zeros(1, 2, 3), roles, "max")


def test_only_what_is_missing_or_damaged_is_read_again(tmp_path: Path) -> None:
    made: list[str] = []
    model, bank = tiny.chat_model(), tiny.bank(tmp_path / "saes")
    plan = plan_of(bank, "last")

    def make(rows: Prompts) -> Activations:
        made.extend(rows.ids)
        return activations.read(model, bank.layer(2), rows, plan, batch_size=4)

    store, rows = Store(tmp_path / "run"), tiny.prompts()
    parts = [rows[:2], rows[2:4], rows[4:]]
    paths = capture.capture(store, "captured", parts, key="k", make=make)
    before = {path: (store.root / path).read_bytes() for path in paths}
    made.clear()
    assert capture.capture(store, "captured", parts, key="k", make=make) == paths
    assert not made
    (store.root / paths[1]).write_bytes(b"torn")
    capture.capture(store, "captured", parts, key="k", make=make)
    assert made == list(rows.ids[2:4])
    assert {path: (store.root / path).read_bytes() for path in paths} == before
    made.clear()
    capture.capture(store, "captured", parts, key="another", make=make)
    assert len(made) == len(rows)


def synthetic(count: int) -> Iterator[Prompts]:
    """Shards of prompts that are made when they are asked for: no more of them is ever in memory."""
    words = ("bake", "paint", "repair", "grow", "wash", "count", "carry", "draw", "fold", "lift")
    things = ("bread", "a door", "two bicycles", "tomatoes", "the car", "small stones", "water", "a map", "paper", "it")
    numbers = iter(range(count))
    while part := list(islice(numbers, capture.ROWS)):
        texts = [f"How do I {words[n % 10]} {things[n // 10 % 10]} for the {n // 100}th time?" for n in part]
        rows = (Prompt(str(n), text, "harmless") for n, text in zip(part, texts, strict=True))
        yield Prompts("synthetic", tuple(rows))


def anonymous() -> int:
    """Resident memory that is no mapped file, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise AssertionError("this system does not tell anonymous memory apart")


def capture_synthetic(folder: Path, count: int, early: int) -> None:
    """Capture `count` prompts in a process of its own; writes its peak up to `early` prompts, and over all."""
    torch.set_num_threads(2)
    target = presets.resolve("testbed")
    model = ChatModel.load(target.model, name="testbed", identity=target.identity, device="cpu")
    bank = SaeBank.from_source(target.saes)
    plan = Plan(tuple(range(8)), bank.slices({5: [1, 2, 3], 6: [4]}), 6)
    peaks, done, stop = [0, 0], [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            now = anonymous()
            peaks[1] = max(peaks[1], now)
            if done[0] <= early:
                peaks[0] = max(peaks[0], now)

    def make(rows: Prompts) -> Activations:
        found = activations.read(model, bank.layer(6), rows, plan, batch_size=64)
        done[0] += len(rows)
        return found

    watching = threading.Thread(target=watch)
    watching.start()
    store = Store(folder)
    paths = capture.capture(store, "captured", synthetic(count), key="k", make=make)
    stop.set()
    watching.join()
    assert len(paths) == -(-count // capture.ROWS)
    (folder / "peaks").write_text(f"{peaks[0]} {peaks[1]} {done[0]}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is told apart on Linux alone")
def test_memory_does_not_grow_with_the_prompts_and_a_kill_costs_one_shard(tmp_path: Path) -> None:
    count = 100_000
    first = _server().Process(target=capture_synthetic, args=(tmp_path, count, 10_000))
    first.start()
    marker = tmp_path / "captured" / "00030.safetensors"
    while first.is_alive() and not marker.exists():
        first.join(0.05)
    assert first.pid is not None
    os.kill(first.pid, 9)
    first.join()
    standing = len(list((tmp_path / "captured").glob("0*.safetensors")))
    assert standing < count // capture.ROWS
    second = _server().Process(target=capture_synthetic, args=(tmp_path, count, 10_000))
    second.start()
    second.join()
    assert second.exitcode == 0
    early, peak, made = map(int, (tmp_path / "peaks").read_text().split())
    # The last file may have been whole, and its line in the manifest not yet written.
    assert count - standing * capture.ROWS <= made <= count - (standing - 1) * capture.ROWS
    assert peak <= 1.1 * early, f"{early / 2**20:.0f} MiB up to 10,000 prompts, {peak / 2**20:.0f} MiB over all"
