"""Bad input ends with one line on standard error, exit code 2 and nothing on disk; help answers without the libraries.

What the command line says wins over a file of options, and the command a run records is the run's own.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from refusalscope import cli
from refusalscope.pipeline import job, measure, sources
from refusalscope.pipeline import options as run_options
from refusalscope.pipeline.options import Options
from tests import tiny
from tests.processes import without_plan

HEAVY = {"torch", "transformers", "sae_lens", "datasets", "numpy", "scipy", "matplotlib", "huggingface_hub"}
LABELLED = "text,label\n" + "".join(
    f"{label} question {i},{label}\n" for label in ("harmful", "harmless") for i in range(48)
)


class Places(NamedTuple):
    """Real tiny checkpoints and SAEs."""

    model: Path
    untemplated: Path
    saes: str
    foreign: str
    """SAEs of another width."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("places")
    for name, template in (("chatty", tiny.TEMPLATE), ("untemplated", None)):
        tiny.language_model("llama").save_pretrained(root / name)
        tiny.tokenizer(template).save_pretrained(root / name)
    for name, width in (("saes", 32), ("foreign", 16)):
        tiny.save_saes(root / name, layers=2, width=width, size=24)
    pattern = "layer_{layer}"
    return Places(root / "chatty", root / "untemplated", f"{root}/saes/{pattern}", f"{root}/foreign/{pattern}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse(*words: object) -> str:
    """The one line that these words on the command line end with; the folder `runs` is left as it was."""
    before = {file: file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()}
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = without_plan(result.stderr)
    assert re.fullmatch(r"error: [^\n]+\n", line), result.stderr
    assert {file: file.read_bytes() for file in Path("runs").rglob("*") if file.is_file()} == before
    return line


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["data", "fetch", "--help"], ["models"]])
def test_help_loads_no_library(words: list[str]) -> None:
    root = Path(cli.__file__).parents[1]
    command = [sys.executable, "-X", "importtime", "-m", "refusalscope", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert done.stdout
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_help_names_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 300)
    shown = CliRunner().invoke(cli.app, ["run", "--help"], terminal_width=300).stdout
    # In square brackets they would be taken for markup and left out.
    assert "(default: 3, under --full 10)" in shown
    assert "(default: testbed)" in shown


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tesbed", "unknown model 'tesbed': did you mean testbed?"), ("zzz", "unknown model 'zzz': Known are testbed")],
)
def test_an_unknown_model_names_near_ones(name: str, hint: str, here: Path) -> None:
    assert hint in refuse("run", name)


@pytest.mark.parametrize("verb", ["categories", "minimal", "jailbreaks", "suffixes"])
def test_the_published_protocol_has_no_studies(verb: str, here: Path) -> None:
    message = refuse(verb, "testbed", "--protocol", "paper")
    assert f"leave it out of `{verb}`" in message
    assert not Path("runs").exists()


PROMPT_FAULTS: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "mine.csv cannot be read: No such file"),
    "empty": (b"", "mine.csv holds no rows"),
    "not UTF-8": (b"text\ncaf\xe9\n", "mine.csv, line 2: not UTF-8 (byte 0xe9)"),
    "malformed": (b'text\n"open\n', "mine.csv, line 2: malformed CSV"),
    "ragged": (b"text\na,b\n", "mine.csv, line 2: 2 cells, but the header has 1"),
    "other column": (b"question\na\n", "no column 'instruction'; there are ['question']; name yours with --columns"),
    "too few": (b"instruction\na\n", "holds no train split"),
}


@pytest.mark.parametrize("fault", PROMPT_FAULTS)
def test_a_faulty_prompt_file(fault: str, places: Places, here: Path) -> None:
    content, message = PROMPT_FAULTS[fault]
    if content is not None:
        Path("mine.csv").write_bytes(content)
    for verb in ("run", "features") if fault == "missing" else ("benchmark",):
        assert message in refuse(verb, places.model, "--saes", places.saes, "--prompts", "mine.csv")


def test_a_folder_that_holds_no_prompts(places: Places, here: Path) -> None:
    assert "has no folder 'processed'" in refuse("run", places.model, "--saes", places.saes, "--prompts", ".")


def test_prompts_that_cannot_be_fetched(places: Places, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    line = refuse("run", places.model, "--saes", places.saes)
    assert re.search(r"cannot download https://\S+: .*; or name prompts of your own with --prompts", line)
    assert not (here / "data").exists()


def test_prompts_are_fetched_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(name: str, folder: Path, **_: object) -> None:
        (folder / name).mkdir(parents=True)

    monkeypatch.setattr("refusalscope.inputs.fetch.fetch", fetched)
    for _ in range(2):
        assert sources.common_prompts(lambda *_: None) == Path("data/refusal_direction")
    assert [path.name for path in Path("data").iterdir()] == ["refusal_direction"]


CONTRADICTIONS = {
    "columns without prompts": (["--columns", "text=q"], "--columns maps the columns of a prompt file"),
    "full with prompts": (["--full", "--prompts", "mine.csv"], "leave out --prompts or --full"),
    "full with another model": (["other", "--full"], "needs the model testbed"),
    "columns of no shape": (["--prompts", "mine.csv", "--columns", "text"], "--columns 'text': write text=NAME"),
    "columns half given": (["--prompts", "mine.csv", "--columns", "text=q,label="], "write text=NAME"),
    "k below 1": (["--k", 0], "--k: Input should be greater than or equal to 1"),
    "too few draws": (["--draws", 2], "--draws: Input should be greater than or equal to 3"),
    "SAEs named twice": (["--saes", "a", "--sae-release", "b"], "--saes and --sae-release both name SAEs"),
    "an id without a release": (["--saes", "a", "--sae-id", "b"], "--sae-id chooses among a release's SAEs"),
    "layers of no shape": (["--layers", "3-x"], "--layers '3-x': write layers as 9, or 3,7, or 3-7"),
    "layers without an SAE": (["--layers", "6-9"], "has SAEs for layers [0, 1, 2, 3, 4, 5, 6, 7]"),
    "a map on one device": (["--device-map", "auto", "--device", "cpu"], "--device-map auto splits a model over CUDA"),
    "no such thinking": (["--thinking", "hard"], "--thinking: Input should be 'off' or 'on'"),
    "no such template": (["--chat-template", "none.jinja"], "--chat-template none.jinja cannot be read"),
    "no such device": (["--device", "tpu"], "--device: Input should be 'auto', 'cpu', 'cuda' or 'mps'"),
    "no such label": (["--label", "bad"], "--label: Input should be 'harmful', 'harmless' or 'look-alike'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_and_values_out_of_range(case: str, here: Path) -> None:
    words, message = CONTRADICTIONS[case]
    assert message in refuse("run", *words)


def test_an_unknown_column(places: Places, here: Path) -> None:
    Path("mine.csv").write_text("q\na\n")
    words = ["run", places.model, "--saes", places.saes, "--prompts", "mine.csv", "--columns", "txet=q"]
    assert "--columns txet: the columns to map are text, label and category" in refuse(*words)


CONFIG_FAULTS = {
    "unknown option": ("kk = 3\n", "--kk (in mine.toml): Extra inputs are not permitted"),
    "out of range": ("k = 0\n", "--k (in mine.toml): Input should be greater than or equal to 1"),
    "wrong kind": ('limit = "many"\n', "--limit (in mine.toml): "),
    "no value": ("factors = []\n", "--factor needs at least one value"),
    "malformed": ("k = \n", "mine.toml is not TOML"),
    "not UTF-8": ('model = "caf\udce9"\n', "mine.toml is not TOML"),
    "missing": (None, "mine.toml cannot be read: No such file"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_faulty_file_of_options(fault: str, here: Path) -> None:
    content, message = CONFIG_FAULTS[fault]
    if content is not None:
        Path("mine.toml").write_bytes(content.encode(errors="surrogateescape"))
    assert message in refuse("run", "--config", "mine.toml")


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        (None, "name its SAEs with --saes"),
        ("saes/layer_0", "write {layer} where the layer's number stands"),
        ("saes/layer_{layer}", "no SAE folder (with a cfg.json) fits saes/layer_{layer}"),
    ],
)
def test_saes_that_are_not_there(saes: str | None, message: str, places: Places, here: Path) -> None:
    assert message in refuse("run", places.model, *(["--saes", saes] if saes else []))


@pytest.fixture
def labelled(here: Path) -> list[str]:
    Path("mine.csv").write_text(LABELLED)
    return ["--prompts", "mine.csv", "--columns", "text=text,label=label"]


def test_a_checkpoint_without_a_chat_template(places: Places, labelled: list[str]) -> None:
    line = refuse("run", places.untemplated, "--saes", places.saes, *labelled)
    assert "untemplated has no chat template: choose an instruction-tuned model" in line


def test_saes_of_another_width(places: Places, labelled: list[str]) -> None:
    line = refuse("run", places.model, "--saes", places.foreign, *labelled)
    assert "the SAE of layer 0 reads residuals of width 16, but chatty has width 32" in line


def test_a_checkpoint_that_is_none(places: Places, labelled: list[str]) -> None:
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{}")
    assert "cannot load broken as a causal language model" in refuse("run", "broken", "--saes", places.saes, *labelled)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--refusal-token", "two words"], "--refusal-token 'two words' is "),
        (["--best-layer", "99"], "--best-layer 99: chatty has layers 0 to 3"),
    ],
)
def test_overrides_the_model_does_not_have(words: list[str], message: str, places: Places, labelled: list[str]) -> None:
    assert message in refuse("run", places.model, "--saes", places.saes, *labelled, *words)


def test_a_run_folder_made_with_other_options(places: Places, labelled: list[str]) -> None:
    columns = {"text": "text", "label": "label"}
    given_then = {"model": str(places.model), "saes": places.saes, "prompts": "mine.csv", "columns": columns, "k": 5}
    made = run_options.make(given_then, None)
    run_options.record(Path("runs/mine"), made, {"batch_size": 8})
    assert run_options.recorded(Path("runs/mine"), made) == {"batch_size": 8}
    line = refuse("run", places.model, "--name", "mine", "--saes", places.saes, *labelled, "--seed", 3)
    assert "runs/mine was made with other options (k was 5, now 20, seed was 0, now 3): choose another --name" in line


@pytest.mark.parametrize("name", ["nowhere", "mine.csv", "empty"])
def test_a_report_of_no_run(name: str, here: Path) -> None:
    Path("mine.csv").write_text("text\n")
    Path("empty").mkdir()
    assert name in refuse("report", name)
    assert sorted(path.name for path in here.rglob("*")) == ["empty", "mine.csv"]


def test_an_unknown_collection(here: Path) -> None:
    assert "unknown collection 'mine': there are ['refusal_direction']" in refuse(
        "data", "fetch", "--collection", "mine"
    )


def chosen(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Options, Path]:
    """The options and the run folder that these words lead to."""
    seen: list[tuple[Options, Path]] = []

    def stop(made: Options, folder: Path, _progress: Callable[..., None]) -> None:
        seen.append((made, folder))
        raise ValueError("seen")

    monkeypatch.setattr(job, "Job", stop)
    assert CliRunner().invoke(cli.app, words).stderr == "error: seen\n"
    return seen[0]


def test_the_command_line_wins_over_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.toml").write_text('k = 7\nlimit = 9\nfactors = [0.5]\nprompts = "a.csv"\n[columns]\ntext = "q"\n')
    words = ["run", "--config", "mine.toml", "--k", "3", "--factor", "-1", "--factor", "-2", "--columns", "text = t"]
    made, _ = chosen(words, monkeypatch)
    expected: dict[str, Any] = {
        "k": 3,
        "limit": 9,
        "factors": (-1.0, -2.0),
        "prompts": Path("a.csv"),
        "columns": {"text": "t"},
    }
    assert made == Options(**expected)


def test_the_file_may_name_the_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mine.toml").write_text('model = "models/mine"\n')
    assert chosen(["run", "--config", "mine.toml"], monkeypatch)[0].model == "models/mine"
    assert chosen(["run", "testbed", "--config", "mine.toml"], monkeypatch)[0].model == "testbed"


@pytest.mark.parametrize(("model", "folder"), [("testbed", "runs/testbed"), ("some/where/", "runs/where")])
def test_a_run_folder_is_named_after_the_model(model: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(["run", model], monkeypatch)[1] == Path(folder)
    assert chosen(["run", model, "--runs", "there", "--name", "mine"], monkeypatch)[1] == Path("there/mine")


@pytest.mark.parametrize("model", [".", "..", "sub/.."])
def test_a_model_in_a_relative_folder_gets_a_folder_below_runs(
    model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = chosen(["run", model], monkeypatch)[1]
    assert folder.resolve().parent == (here / "runs").resolve()


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
column = st.text(st.sampled_from("qt_ é"), min_size=1).map(lambda name: f"c{name}c")
sae_options = st.one_of(
    st.fixed_dictionaries({"saes": words}),
    st.fixed_dictionaries({}, optional={"sae_release": words, "sae_id": words}),
)
other_options = st.fixed_dictionaries(
    {},
    optional={
        "layers": st.lists(st.integers(0, 99), min_size=1, unique=True).map(sorted).map(tuple),
        "system": words,
        "thinking": st.sampled_from(["off", "on"]),
        "chat_template": words.map(lambda word: Path(f"{word}.jinja")),
        "dtype": st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
        "quantize": st.sampled_from(["8bit", "4bit"]),
        "trust_remote_code": st.booleans(),
        "no_read_ahead": st.booleans(),
        "no_feature_labels": st.booleans(),
        "revision": words,
        "prompts": words.map(lambda word: Path(f"data/{word}.csv")),
        "label": st.sampled_from(["harmful", "harmless", "look-alike"]),
        "limit": st.integers(1, 999),
        "k": st.integers(1, 99),
        "draws": st.integers(3, 99),
        "datasets": st.lists(words, min_size=1, max_size=3).map(tuple),
        "protocol": st.sampled_from(["sound", "paper"]),
        "methods": st.lists(st.sampled_from(run_options.METHODS[:-1]), min_size=1, max_size=3).map(tuple),
        "values": st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3).map(tuple),
        "factors": st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3).map(tuple),
        "refusal_token": st.lists(words, max_size=3).map(tuple),
        "best_layer": st.integers(0, 99),
        "keep_unrefused": st.booleans(),
        "max_new_tokens": st.integers(1, 999),
        "batch_size": st.integers(1, 999),
        "device": st.sampled_from(["auto", "cpu", "cuda", "mps"]),
        "seed": st.integers(-5, 999),
    },
)
own_options = st.builds(lambda saes, others: {**saes, **others}, sae_options, other_options)
columns = st.dictionaries(st.sampled_from(["text", "label", "category"]), column)


@settings(max_examples=30)
@given(own_options, columns, st.sampled_from(["testbed", "models/my own"]), st.booleans())
def test_a_recorded_command_makes_the_same_options(
    values: dict[str, Any], columns: dict[str, str], model: str, full: bool
) -> None:
    extra: dict[str, Any] = {"columns": columns} if "prompts" in values else {"full": full and model == "testbed"}
    made = Options(model=model, **values, **extra)
    with pytest.MonkeyPatch.context() as patch:
        again, folder = chosen(shlex.split(measure.command(made, "my run", verb="run"))[1:], patch)
    assert again == made
    assert folder == Path("runs/my run")


def test_a_recorded_command_names_a_second_sae_set_where_it_is_taken() -> None:
    made = Options(against="base", documents="own.txt")
    told = "refusalscope health testbed --name mine --against base --documents own.txt"
    assert measure.command(made, "mine", verb="health") == told
    assert measure.command(made, "mine", verb="run") == "refusalscope run testbed --name mine"


@given(own_options)
def test_recorded_options_are_recognised(values: dict[str, Any]) -> None:
    made = Options(**values)
    assert Options(**json.loads(json.dumps(run_options.as_plain(made)))) == made
