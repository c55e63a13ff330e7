"""What is written comes back equal, byte for byte the same each time, whole or not at all, and is made only once.

The keys that decide this are fingerprints: of content, never of an order or an address.
"""

import json
import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refusalscope.core import store
from refusalscope.core.fingerprint import fingerprint
from refusalscope.core.scores import Attribution, Scores, Trace
from refusalscope.core.store import MANIFEST, Store
from refusalscope.core.types import (
    Direction,
    Feature,
    FeatureSet,
    Finding,
    LayerScores,
    Prompt,
    Prompts,
    Response,
    Responses,
    Row,
    SaeSlice,
)

NaN = float("nan")
HARD = 'tea\u2028or\u2029coffee\x85\r\n\t\x00 "quoted" שלום 🌍 \\ \ufeff'


def attribution(entries: int) -> Attribution:
    def whole(high: int, count: int) -> torch.Tensor:
        return torch.arange(count) % high

    return Attribution(
        prompt_ids=("a", "b"),
        prompt=whole(2, entries),
        layer=whole(4, entries),
        position=-1 - whole(3, entries),
        feature=whole(9, entries),
        value=torch.randn(entries),
        scored=torch.tensor([3, 4]),
        length=torch.tensor([9, 7]),
        answer=torch.tensor([3, 4]),
        refusal=torch.tensor([5, 5]),
        metric_clean=torch.randn(2),
        metric_patched=torch.randn(2),
        dropped=("b",),
    )


def trace(end: torch.Tensor | None) -> Trace:
    residuals = torch.randn(2, 3, 4, 8)
    tokens, chosen = torch.arange(12).view(3, 4), torch.tensor([1, 2, 3])
    metric = torch.randn(3)
    return Trace(
        *(("a", "b", "c"), tokens, tokens % 4, (0, 5), residuals, residuals + 1, end, residuals * 2),
        *(chosen, chosen + 1, metric, -metric, metric > 0),
    )


DIRECTION = Direction(torch.randn(8), 1, torch.randn(4), (40, 7), (), {})
SCORES = LayerScores(layer=1, kl=0.1, removed=-2.0, added=3.0, kl_affine=NaN, removed_affine=0.0)
ROW = Row("harmful", "base", "refused", "", 3, 0.5, 0.1, 0.9, 1.0)
FINDING = Finding("benchmark", "Why?", (ROW, replace(ROW, n=0, estimate=None, low=None, high=None)), (HARD,), {"n": 1})
NOUNS: dict[str, Any] = {
    "prompts": Prompts(
        "set", (Prompt("1", HARD, "harmful", "x", "s@1", "c", {"part": None}), Prompt("2", "b", "harmless"))
    ),
    "no prompts": Prompts("none", ()),
    "responses": Responses(
        "set",
        "base",
        "c=-1",
        (
            Response("1", HARD, 5, 2, "end", {"refused": 1.0, "complied": NaN}, {"complied": HARD}),
            Response("2", "", None, 0, "length"),
        ),
        changed=7,
    ),
    "direction": replace(DIRECTION, scores=(SCORES,), counts={"kept": 3}, caveats=(HARD,)),
    "bare direction": DIRECTION,
    "attribution": attribution(12),
    "empty attribution": attribution(0),
    "trace": trace(None),
    "trace that ends elsewhere": trace(torch.randn(2, 3, 4, 8).bfloat16()),
    "scores": Scores("attribution", ("a", "b"), (Feature(3, 1), Feature(0, 2)), torch.randn(2, 2)),
    "slice": SaeSlice(2, torch.tensor([5, 1]), torch.randn(4, 2), torch.randn(2), torch.zeros(2), torch.randn(2, 4)),
    "slice of features that compete": SaeSlice(
        *(2, torch.tensor([5, 1]), torch.randn(4, 7), torch.randn(7), torch.zeros(2), torch.randn(2, 4)),
        active=3,
        normalisation="layer_norm",
    ),
    "features": FeatureSet("cosine", (Feature(1, 2), Feature(0, 9)), (0.5, NaN), "abc"),
    "no features": FeatureSet("none", (), ()),
    "finding": FINDING,
    "table": {"rows": [1, 2.5, None, HARD], "nested": {"a": True}},
    "text": HARD,
    "bytes": bytes(range(256)),
}


def same(left: Any, right: Any) -> bool:
    """Equality in which NaN equals NaN and tensors agree in every bit and in type."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left.nan_to_num(nan=1e9), right.nan_to_num(nan=1e9))
    if is_dataclass(left):
        return type(left) is type(right) and all(
            same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left)
        )
    if isinstance(left, dict):
        return set(left) == set(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


@pytest.mark.parametrize("name", NOUNS)
def test_every_noun_comes_back_equal(name: str, tmp_path: Path) -> None:
    value = NOUNS[name]
    Store(tmp_path).put("deep/er/thing", "key", value)
    assert same(Store(tmp_path).read("deep/er/thing", type(value)), value)


@pytest.mark.parametrize("name", NOUNS)
def test_bytes_are_stable(name: str, tmp_path: Path) -> None:
    value = NOUNS[name]
    content = store.to_bytes(value)
    (tmp_path / "thing").write_bytes(content)
    assert content == store.to_bytes(value) == store.to_bytes(Store(tmp_path).read("thing", type(value)))


@given(
    st.text(st.characters(codec="utf-8")),
    st.dictionaries(st.text(st.characters(codec="utf-8")), st.floats(allow_infinity=False)),
)
def test_any_text_and_any_score_round_trip(text: str, scores: dict[str, float]) -> None:
    for value in (
        Prompts(text, (Prompt(text, text, "harmful", text),)),
        Responses(text, text, text, (Response(text, text, 1, 1, "end", scores, {text: text}),)),
    ):
        write, read = store.CODECS[type(value)]
        assert same(read(write(value)), value)


@pytest.mark.parametrize("name", ["direction", "attribution", "slice"])
def test_tensors_carry_one_metadata_key(name: str) -> None:
    content = store.write_tensors(NOUNS[name])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == ["refusalscope"]


def test_views_of_one_tensor_are_written_apart(tmp_path: Path) -> None:
    table = torch.arange(20).reshape(4, 5)
    stacked = replace(attribution(5), prompt=table[0] % 2, layer=table[1], position=table[2], feature=table.T[:, 3])
    Store(tmp_path).put("thing", "key", stacked)
    assert same(Store(tmp_path).read("thing", Attribution), stacked)


def test_tensors_are_mapped_and_outlive_their_file(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    kept.put("thing", "key", NOUNS["slice"])
    found = kept.read("thing", SaeSlice)
    (tmp_path / "thing").unlink()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert mapped
    assert same(found, NOUNS["slice"])


def test_infinity_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inf"):
        Store(tmp_path).put("table.json", "key", {"estimate": float("inf")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_killed_write_leaves_the_old_bytes(
    step: str, failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Store(tmp_path)
    kept.put("a.txt", "old key", "old")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(failure)):
        kept.put("a.txt", "new key", "new")
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert kept.get("a.txt", "new key", str, lambda: "newer") == "newer"


def test_killed_between_artifact_and_manifest_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Store(tmp_path)
    kept.put("a.txt", "old key", "old")
    write = store.write_atomically

    def killed_at_manifest(file: Path, content: bytes) -> None:
        if file.name == MANIFEST:
            raise KeyboardInterrupt
        write(file, content)

    monkeypatch.setattr(store, "write_atomically", killed_at_manifest)
    with pytest.raises(KeyboardInterrupt):
        kept.put("a.txt", "new key", "new")
    monkeypatch.undo()
    assert not kept.has("a.txt", "old key")
    assert not kept.has("a.txt", "new key")


def test_resume_makes_only_what_is_missing_changed_or_damaged(tmp_path: Path) -> None:
    calls = []

    def make() -> str:
        calls.append(len(calls))
        return "x" * 100

    def get(key: str) -> list[str]:
        opened = Store(tmp_path)
        assert opened.get("a.txt", key, str, make) == "x" * 100
        return opened.made

    assert get("key") == ["a.txt"]
    assert get("key") == []
    assert get("other key") == ["a.txt"]
    (tmp_path / "a.txt").write_bytes(b"x" * 99)
    assert get("other key") == ["a.txt"]
    (tmp_path / "a.txt").unlink()
    assert get("other key") == ["a.txt"]
    assert len(calls) == 4


def test_paths_lists_one_folder_in_order(tmp_path: Path) -> None:
    kept = Store(tmp_path)
    for path in ("findings/b.json", "findings/a.json", "findings/a.txt", "findings-old/c.json"):
        kept.put(path, "", "{}")
    assert kept.paths("findings", ".json") == ["findings/a.json", "findings/b.json"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a.txt": 1}', b'{"a.txt": {}}', b"\xff"])
def test_a_damaged_manifest_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=MANIFEST):
        Store(tmp_path).has("a.txt", "key")


@pytest.mark.parametrize("name", [name for name, value in NOUNS.items() if not isinstance(value, (str, bytes))])
def test_unreadable_artifacts_are_named(name: str, tmp_path: Path) -> None:
    kind = type(NOUNS[name])
    content = store.to_bytes(NOUNS[name])
    damaged = [b"", b"[]", b"null", b"\xff\xfe", b"x" + content, b"7\n7\n", content[: len(content) // 2], content[:-3]]
    for part in damaged:
        (tmp_path / "thing").write_bytes(part)
        with pytest.raises(ValueError, match=r"thing cannot be read as \w+: "):
            Store(tmp_path).read("thing", kind)
    (tmp_path / "thing").unlink()
    with pytest.raises(ValueError, match=r"thing is missing: is .* a finished run"):
        Store(tmp_path).read("thing", kind)


def finding_with(**changes: Any) -> dict[str, Any]:
    data = json.loads(store.to_bytes(FINDING))
    for key, value in changes.items():
        (data["rows"][0] if key in {f.name for f in fields(Row)} else data)[key] = value
    return data


FAULTS = {
    "an unknown key": (finding_with(extra=1), "a finding has the keys"),
    "a key too few": ({k: v for k, v in finding_with().items() if k != "caveats"}, "a finding has the keys"),
    "a list": ([finding_with()], "expected an object"),
    "rows are no list": (finding_with(rows=None), "benchmark.json cannot be read"),
    "a row of other keys": (finding_with(rows=[{"dataset": "x"}]), "row 0 must have the keys"),
    "a row too wide": (finding_with(rows=[{**finding_with()["rows"][0], "extra": 1}]), "row 0 must have the keys"),
    "n = 0 with numbers": (finding_with(n=0), "n = 0 does not fit"),
    "numbers missing": (finding_with(low=None), "n = 3 does not fit"),
    "a negative n": (finding_with(n=-3), "n = -3 is no count"),
    "half a prompt": (finding_with(n=2.5), "n = 2.5 is no count"),
    "an infinite number": (finding_with(high=float("inf")), "must be finite"),
    "no number": (finding_with(estimate=NaN), "must be finite"),
    "coverage above 1": (finding_with(coverage=1.5), "coverage 1.5 is outside"),
    "coverage below 0": (finding_with(coverage=-0.5), "coverage -0.5 is outside"),
    "coverage unknown": (finding_with(coverage=None), "benchmark.json cannot be read"),
    "caveats in one string": (finding_with(caveats="careful"), "caveats must be a list"),
    "provenance in one string": (finding_with(provenance="here"), "provenance an object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_findings_are_validated_on_reading(fault: str, tmp_path: Path) -> None:
    data, message = FAULTS[fault]
    (tmp_path / "benchmark.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        Store(tmp_path).read("benchmark.json", Finding)
    assert str(tmp_path / "benchmark.json") in str(caught.value)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(values, values)
def test_fingerprints_differ_exactly_where_content_does(left: Any, right: Any) -> None:
    def plain(value: Any) -> str:
        return json.dumps(value, sort_keys=True)

    assert (fingerprint(left) == fingerprint(right)) == (plain(left) == plain(right))


@given(st.dictionaries(st.text(max_size=3), values, max_size=5))
def test_fingerprints_ignore_the_order_of_a_mapping(mapping: dict[str, Any]) -> None:
    assert fingerprint(mapping) == fingerprint(dict(reversed(mapping.items())))


def test_fingerprints_see_into_tensors_and_dataclasses() -> None:
    one = torch.tensor([1.0, 2.0])
    different = [
        one,
        one.double(),
        one.bfloat16(),
        one[:, None],
        one + 1,
        one[:0],
        [1.0, 2.0],
        (Prompt("a", "b", "harmful"),),
    ]
    assert len({fingerprint(value) for value in different}) == len(different)
    assert fingerprint(torch.arange(6).reshape(2, 3).T) == fingerprint(torch.arange(6).reshape(2, 3).T.contiguous())
    assert fingerprint(Feature(1, 2)) != fingerprint(Feature(2, 1)) != fingerprint([2, 1])
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"]) != fingerprint([["a"], "bc"])
    assert fingerprint("a", "b") != fingerprint("ab")
    assert len(fingerprint()) == 16


@pytest.mark.parametrize("value", [{1, 2}, b"x", Path("x"), object(), Feature, print, 1j])
def test_what_has_no_content_to_hash_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot fingerprint"):
        fingerprint([value])
