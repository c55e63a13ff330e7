"""Minimal sets against brute force, rows of a batch against one at a time, what counts as waking up, end to end."""

import random
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refusalscope.core.scores import Activity, Scores
from refusalscope.core.store import Store
from refusalscope.core.types import Feature, FeatureSet, Finding
from refusalscope.inputs.chat import ChatModel, scored
from refusalscope.inputs.saes import SaeBank
from refusalscope.mechanism import features, minimal, silencing
from refusalscope.mechanism.features import LayerSurvey
from refusalscope.mechanism.interventions import ScaleFeatures, editor
from refusalscope.mechanism.minimal import Least, Pruned, Question, Subset
from refusalscope.pipeline import woken
from refusalscope.report import minimal as words
from refusalscope.report import plots
from refusalscope.studies import minimal as study
from refusalscope.studies.minimal import Case
from tests import tiny
from tests.processes import Running
from tests.test_run import _bytes, invoke

RANKED = tuple(Feature(0, index) for index in range(7))
Flips = Callable[[Subset], bool]


def subsets(of: Sequence[Feature]) -> list[Subset]:
    return [frozenset(part) for size in range(len(of) + 1) for part in combinations(of, size)]


SUBSETS = subsets(RANKED)
FEW = settings(max_examples=40)


@st.composite
def monotone(draw: st.DrawFn) -> Flips:
    """Flips wherever one of a few sets is silent altogether."""
    cores = draw(st.lists(st.frozensets(st.sampled_from(RANKED), min_size=1), min_size=1, max_size=4))
    return lambda chosen: any(core <= chosen for core in cores)


@st.composite
def arbitrary(draw: st.DrawFn) -> Flips:
    """Anything at all, but the whole set flips and none of it does not."""
    chance, share = random.Random(draw(st.integers(0, 2**32))), draw(st.sampled_from((0.05, 0.3, 0.7)))
    flipping = {part for part in SUBSETS if part and chance.random() < share} | {SUBSETS[-1]}
    return lambda chosen: chosen in flipping


class Asked:
    """Answers questions by a predicate a prompt, and keeps what it was asked, round by round."""

    def __init__(self, **flips: Flips) -> None:
        self.flips = flips
        self.rounds: list[list[Question]] = []

    def __call__(self, questions: Sequence[Question]) -> list[bool]:
        self.rounds.append(list(questions))
        return [self.flips[name](chosen) for name, chosen in questions]

    @property
    def questions(self) -> list[Question]:
        return [question for asked in self.rounds for question in asked]


def pruned(flips: Flips) -> tuple[Pruned, set[Subset]]:
    """What pruning came to, and every set it asked for."""
    ask = Asked(x=flips)
    found = minimal.in_step({"x": minimal.prune(RANKED)}, ask)["x"]
    assert found is not None
    assert found.tried == len(ask.questions) == len(set(ask.questions))
    return found, {chosen for _, chosen in ask.questions}


@FEW
@given(monotone())
def test_a_pruned_set_of_a_monotone_predicate_is_a_minimal_one(flips: Flips) -> None:
    found, asked = pruned(flips)
    kept = frozenset(found.features)
    assert flips(kept)
    assert not any(flips(part) for part in subsets(found.features) if part != kept)
    assert {kept - {feature} for feature in kept} <= asked
    assert found.inner in ((), None)
    assert (found.inner is None) == (len(kept) > minimal.EXHAUSTED)


@FEW
@given(arbitrary())
def test_any_pruned_set_is_1_minimal_and_what_is_hidden_in_it_is_found(flips: Flips) -> None:
    found, asked = pruned(flips)
    kept = frozenset(found.features)
    assert flips(kept)
    assert not any(flips(kept - {feature}) for feature in kept)
    assert list(found.features) == sorted(kept, key=RANKED.index)
    hidden = [len(part) for part in subsets(found.features) if part != kept and flips(part)]
    if len(kept) <= minimal.EXHAUSTED:
        assert found.inner == tuple(hidden)
        assert set(subsets(found.features)) <= asked
    else:
        assert found.inner is None


def test_a_later_pass_removes_what_an_earlier_one_could_not() -> None:
    a, b, c = RANKED[:3]
    flipping = {frozenset({a, b, c}), frozenset({b, c}), frozenset({b})}
    found = minimal.in_step({"x": minimal.prune((a, b, c))}, Asked(x=lambda chosen: chosen in flipping))["x"]
    assert found == Pruned((b,), 3, 6, ())


@FEW
@given(arbitrary())
def test_enumeration_finds_what_brute_force_finds(flips: Flips) -> None:
    ask = Asked(x=flips)
    found = minimal.in_step({"x": minimal.enumerate_least(RANKED)}, ask)["x"]
    first = next((part for part in SUBSETS if 0 < len(part) <= minimal.LARGEST and flips(part)), None)
    assert (None if found.features is None else frozenset(found.features)) == first
    assert found.tried == len(ask.questions)
    assert max(len(chosen) for _, chosen in ask.questions) == (minimal.LARGEST if first is None else len(first))


@FEW
@given(st.lists(arbitrary(), min_size=2, max_size=4))
def test_prompts_in_step_find_what_each_finds_alone(predicates: list[Flips]) -> None:
    flips = {f"p{number}": predicate for number, predicate in enumerate(predicates)}
    ask = Asked(**flips)
    together = minimal.in_step({name: minimal.prune(RANKED) for name in flips}, ask)
    assert together == {name: pruned(predicate)[0] for name, predicate in flips.items()}
    assert len(ask.rounds[0]) == len(flips)
    assert len(set(ask.questions)) == len(ask.questions)


def test_a_prompt_whose_whole_set_does_not_flip_has_none() -> None:
    ask = Asked(x=lambda chosen: False, y=lambda chosen: False)
    assert minimal.in_step({"x": minimal.prune(RANKED), "y": minimal.prune(())}, ask) == {"x": None, "y": None}
    assert len(ask.questions) == 2


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    """Sets of all sizes on prompts of different length, one prompt several times, one set twice."""
    few = [Feature(layer, index) for layer in (0, 1, 2) for index in (3, 7, 11, 20)]
    names = tiny.prompts().ids
    sets = [frozenset(few[:n]) for n in (0, 1, 12)]
    return [(name, chosen) for name in (names[2], names[3]) for chosen in sets] + [(names[2], sets[1])]


@pytest.mark.parametrize("family", ["jumprelu", "topk"])
def test_rows_with_sets_of_their_own_are_as_one_at_a_time(tmp_path: Path, asked: list[Question], family: str) -> None:
    model, bank = tiny.chat_model(), tiny.bank(tmp_path, family=family)
    slices = bank.slices({layer: [3, 7, 11, 20] for layer in (0, 1, 2)})
    watched = bank.slices({layer: [5, 30, 31] for layer in range(4)})
    prompts = tiny.prompts()
    tokens = model.tokens(prompts)
    heard = silencing.activations(model, tokens, asked, slices, watched, size=3)
    said = silencing.answers(model, tokens, asked, slices, size=3)
    opening = [answer.first_token for answer in said]
    refusal = [token for token in dict.fromkeys(opening) if token is not None][:1]
    flips = partial(silencing.flips, model, tokens, slices=slices, refusal_tokens=refusal, size=3)
    flipped = flips(asked, coherent=lambda answer: True)
    assert any(flipped) or family == "topk"
    for row, (name, chosen) in enumerate(asked):
        one = model.tokens(prompts.keep([name]))
        made = FeatureSet("one", tuple(sorted(chosen)), (0.0,) * len(chosen))
        edits = editor(ScaleFeatures(made, 0.0), layers=4, slices=slices).edits
        run = model.run(one, edits=edits, keep=range(4), logits=1)
        assert flipped[row] == (int(run.logits[0, -1].argmax()) not in refusal)
        assert said[row].text == model.generate(one, edits=edits, max_new_tokens=silencing.ANSWERED)[0].text
        # Layer 3 is edited by nothing: what is seen before and after its edit is the same.
        inside = scored(one.roles[0])
        expected = watched[3].encode(run.residuals[3][0][inside]).mean(0)
        torch.testing.assert_close(heard[row, -3:], expected, atol=1e-4, rtol=1e-4)
    assert not any(flips(asked, coherent=lambda answer: False))


def test_a_layer_is_read_before_its_own_edit(tmp_path: Path) -> None:
    model, bank = tiny.chat_model(), tiny.bank(tmp_path)
    tokens, watched = model.tokens(tiny.prompts()), bank.slices({layer: list(range(96)) for layer in range(4)})
    questions = [(name, frozenset(Feature(1, index) for index in range(96))) for name in tokens.prompt_ids]
    clean = silencing.activations(model, tokens, [(name, frozenset()) for name, _ in questions], {}, watched, size=4)
    after = silencing.activations(model, tokens, questions, watched, watched, size=4)
    assert torch.equal(clean[:, : 2 * 96], after[:, : 2 * 96])
    assert not torch.allclose(clean[:, 2 * 96 :], after[:, 2 * 96 :])


def test_what_wakes_slept_before_and_is_twice_its_usual() -> None:
    before = torch.tensor([0.0, 0.09, 0.10, 0.0, 0.0, 0.0, 5.0])
    after = torch.tensor([1.0, 1.00, 1.00, 1.0, 0.1, 0.0, 1.0])
    usual = torch.tensor([0.5, 0.50, 0.50, 0.6, 0.0, 0.0, 0.1])
    assert silencing.woken(before, after, usual).tolist() == [True, True, False, False, True, False, False]


def test_draws_from_what_is_near_are_draws_from_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    activity = torch.rand(300, generator=generator) * (torch.rand(300, generator=generator) > 0.2)
    own = FeatureSet("own", tuple(Feature(0, index) for index in range(20)), (0.0,) * 20)
    excluded = {Feature(0, index) for index in range(60)}
    thinned = woken._near(Activity((0,), (300,), activity, 1), set(own.features), excluded, 30)
    whole = [LayerSurvey(0, FeatureSet("none", (), ()), activity)]
    assert 20 < int((thinned[0].activation > 0).sum()) < int((activity > 0).sum())
    for seed in range(10):
        drawn = [features.random_like(own, surveys, excluded, seed=seed).features for surveys in (thinned, whole)]
        assert drawn[0] == drawn[1]


def case(number: int, size: int, *, least: int | None = 1, inner: tuple[int, ...] | None = ()) -> Case:
    listed = None if least is None else Least(None if least > minimal.LARGEST else RANKED[:least], 7)
    return Case(f"p{number}", f"c{number}", RANKED, Pruned(RANKED[:size], 2, 9, inner), listed, 0.0)


CASES = [case(0, 1), case(1, 2), case(2, 4, least=4, inner=(2, 3)), case(3, 5, least=4), case(4, 7, inner=None)]
CASES += [case(5, 1, least=None), Case("p6", "c6", RANKED, None, None, float("nan"))]
WATCHED = (*RANKED, Feature(1, 0), Feature(1, 1))


DRAWS = 20


def heard() -> Scores:
    """Feature 1/0 wakes wherever a minimal set is silent, 1/1 in the first five of 20 draws for the whole set."""
    rows: dict[str, list[float]] = {study.condition(study.CLEAN, one.prompt_id): [0.0] * 9 for one in CASES}
    for one in CASES:
        for what in study.silenced_sets(one):
            # The silenced ones seem to wake as well; they do not count.
            rows[study.condition(what, one.prompt_id)] = [1.0] + [0.0] * 6 + [3.0 * (what == study.MINIMAL), 0.0]
            for draw in range(DRAWS):
                wakes = 2.0 * (what == study.OWN and draw < 5)
                rows[study.condition(f"{what} draw={draw}", one.prompt_id)] = [0.0] * 8 + [wakes]
    return Scores("activation", tuple(rows), WATCHED, torch.tensor(list(rows.values())))


@pytest.fixture(scope="module")
def finding() -> Finding:
    return study.summarise(CASES, heard(), dataset="harmful", k=7, draws=DRAWS, caveats=(), provenance={})


def value(finding: Finding, method: str, metric: str, setting: str | None = None) -> tuple[int, float]:
    row = finding.find("harmful", method, metric, setting)
    assert row is not None
    assert row.estimate is not None
    return row.n, round(row.estimate, 6)


def test_sizes_minima_and_non_monotone_cases_are_counted(finding: Finding) -> None:
    assert value(finding, study.OWN, "flipped") == (7, round(6 / 7, 6))
    assert value(finding, study.MINIMAL, "size") == (6, round(20 / 6, 6))
    assert value(finding, study.MINIMAL, "size_share", "size=1") == (6, round(2 / 6, 6))
    assert value(finding, study.MINIMAL, "size_share", "size=3") == (6, 0.0)
    assert value(finding, study.LEAST, "size_share", "size=1") == (5, 0.6)
    assert value(finding, study.LEAST, "size_share", "size>3") == (5, 0.4)
    # Of the one with five features nobody knows whether four would have done.
    assert value(finding, study.MINIMAL, "least") == (4, 0.5)
    assert value(finding, study.MINIMAL, "excess") == (3, round((0 + 1 + 6) / 3, 6))
    assert value(finding, study.MINIMAL, "non_monotone", "") == (5, 0.2)
    assert value(finding, study.MINIMAL, "non_monotone", "size=2") == (5, 0.2)
    assert value(finding, str(RANKED[0]), "in_minimal") == (6, 1.0)
    said = " ".join(finding.caveats)
    for part in ("1 of 7 prompts do not flip", "looked for on 5 of 6 prompts", "1 minimal sets hold more than 6"):
        assert part in said


def test_what_wakes_is_held_against_every_random_draw(finding: Finding) -> None:
    assert value(finding, study.MINIMAL, "woken") == (6, 1.0)
    assert value(finding, study.MINIMAL, "woken_rise") == (6, 3.0)
    assert value(finding, f"random for {study.MINIMAL}", "woken_any", "silenced mean") == (6, 0.0)
    assert value(finding, study.OWN, "woken_any") == (6, 0.0)
    assert value(finding, f"random for {study.OWN}", "woken_any", "silenced mean") == (6, 0.25)
    assert value(finding, f"random for {study.OWN}", "woken_rise", "silenced draw=4") == (6, 2.0)
    assert value(finding, f"{study.OWN} vs random", "woken_difference") == (6, -0.25)
    assert value(finding, "1/0", "wakes", study.MINIMAL) == (6, 1.0)
    tested = [row for row in finding.rows if row.family]
    assert len(tested) == 6
    assert all(row.p is not None and row.p_holm is not None and row.p_holm >= row.p for row in tested)


def test_the_report_has_words_and_figures_also_where_nothing_flips(finding: Finding) -> None:
    assert list(plots.plots(finding)) == ["minimal-sizes", "minimal-features", "minimal-woken"]
    said = words.sentences(finding)
    assert said[0].startswith("85.7% ")
    assert len(said) == 4
    nothing = study.summarise(CASES[-1:], heard(), dataset="harmful", k=7, draws=DRAWS, caveats=(), provenance={})
    assert [row.metric for row in nothing.rows] == ["flipped"]
    assert plots.plots(nothing) == {}
    assert words.sentences(nothing)[0].startswith("No harmful prompt")


SMALL = ["--limit", "8", "--max-new-tokens", "12", "--best-layer", "6", "--k", "5", "--method", "cosine+attribution"]


def command(runs: Path) -> list[str]:
    return ["minimal", "testbed", "--name", "demo", "--runs", str(runs), *SMALL]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("minimal")
    code, out, err = invoke(*command(runs))
    assert code == 0, err
    assert out.splitlines()[-1] == str(runs / "demo" / "report.html")
    return runs / "demo"


def test_every_prompt_is_searched_and_the_page_shows_it(whole: Path) -> None:
    store = Store(whole)
    found = store.read("findings/minimal.json", Finding)
    flipped = next(row for row in found.rows if row.metric == "flipped")
    cases = [row for path in store.paths("minimal/found", ".json") for row in store.read(path, dict)["cases"]]
    assert flipped.n == len(cases) > 0
    for row in cases:
        if row["pruned"] is not None:
            assert {tuple(one.values()) for one in row["pruned"]["features"]} <= {tuple(o.values()) for o in row["own"]}
            assert row["least"]["tried"] <= 25
    page = (whole / "report.html").read_text()
    assert "How few features flip a prompt?" in page
    assert page.count("<svg") == 3


def test_a_finished_study_loads_no_model(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("a finished study loads no model")

    monkeypatch.setattr(ChatModel, "load", refuse)
    monkeypatch.setattr(SaeBank, "from_source", refuse)
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()}
    code, _, err = invoke(*command(whole.parent))
    assert code == 0, err
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*") if file.is_file()} == before


def test_a_killed_study_goes_on_where_it_was(whole: Path, tmp_path: Path) -> None:
    demo = shutil.copytree(whole, tmp_path / "demo")
    for folder in ("minimal", "findings"):
        Store(demo).drop(folder)
    first, last = demo / "minimal/found/0000.json", demo / "findings/minimal.json"

    def standing() -> bool:
        """Whether the first few prompts are in the manifest: until then they are not finished."""
        return bool(Store(demo).paths("minimal/found", ".json"))

    killed = Running(command(tmp_path), tmp_path / "said").until(standing).send(signal.SIGKILL).end()
    assert (killed.code, last.exists()) == (-signal.SIGKILL, False)
    stood = first.stat().st_mtime_ns
    code, _, err = invoke(*command(tmp_path))
    assert code == 0, err
    assert first.stat().st_mtime_ns == stood
    assert _bytes(demo) == _bytes(whole)
