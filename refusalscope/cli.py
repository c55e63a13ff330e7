"""The command line: options in, the chain run, one clear line out. No mathematics; the only place that prints.

Stages are imported inside the commands, so that `--help` answers at once.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from refusalscope.pipeline.job import Job

app = typer.Typer(
    help="Show why a chat model refuses, with sparse autoencoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prompt collections.", no_args_is_help=True)
testbed_app = typer.Typer(help="The embedded model.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(testbed_app, name="testbed")

Model = Annotated[
    str | None,
    typer.Argument(
        help="A preset (see `refusalscope models`), a Hugging Face repository or a folder. (default: testbed)"
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the run folder below --runs; the model's name by default.")]
Runs = Annotated[Path, typer.Option(help="Where run folders lie.")]
Config = Annotated[Path | None, typer.Option(help="Options from a TOML file; the command line wins.")]
Saes = Annotated[
    str | None,
    typer.Option(help="SAELens folders, {layer} for the layer's number; or owner/name:path in a Hub repository."),
]
SaeRelease = Annotated[str | None, typer.Option(help="A release of SAELens's registry.")]
SaeId = Annotated[str | None, typer.Option(help="Which ids of the release, {layer} for the layer's number.")]
Layers = Annotated[
    list[str] | None, typer.Option("--layers", help="Use these layers' SAEs alone: 9, or 3,7, or 3-7; repeatable.")
]
System = Annotated[str | None, typer.Option(help="A system prompt for every chat.")]
Thinking = Annotated[
    str | None, typer.Option(help="Let a reasoning model think before it answers: on or off. (default: off)")
]
ChatTemplate = Annotated[Path | None, typer.Option(help="A chat template (Jinja) instead of the model's own.")]
DeviceMap = Annotated[str | None, typer.Option(help="auto: split the model over all GPUs.")]
Dtype = Annotated[
    str | None, typer.Option(help="auto, float32, bfloat16 or float16. (default: auto, float32 on the CPU)")
]
Quantize = Annotated[str | None, typer.Option(help="8bit or 4bit, where bitsandbytes is installed.")]
RemoteCode = Annotated[
    bool | None, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        help="A CSV, JSONL or JSON file of prompts, or a folder like refusal_direction's. "
        "(default: data/refusal_direction, fetched if it is not there; the testbed's own)"
    ),
]
Columns = Annotated[str | None, typer.Option(help="Your file's columns: text=NAME,label=NAME,category=NAME.")]
Label = Annotated[str | None, typer.Option(help="Label of a file without a label column: harmful or harmless.")]
Limit = Annotated[
    int | None,
    typer.Option(help="Prompts per set (testbed: 150, others: 100); fitting sets of the testbed keep 32 and 16."),
]
Dataset = Annotated[
    list[str] | None, typer.Option("--dataset", help="Answer only this evaluation set, and a harmless one; repeatable.")
]
Protocol = Annotated[
    str | None,
    typer.Option(help="sound, or paper: as the published code does it, for one --dataset. (default: sound)"),
]
Full = Annotated[bool | None, typer.Option("--full", help="The testbed's whole grid; more sets, sizes and draws.")]
SetSize = Annotated[int | None, typer.Option("--k", help="Features per set, K*. (default: 20)")]
Method = Annotated[
    list[str] | None,
    typer.Option("--method", help="A feature set to make: see the docs for the six; repeatable. (default: three)"),
]
Value = Annotated[
    list[float] | None, typer.Option("--value", help="What to set features to when inducing refusal; repeatable.")
]
Draws = Annotated[int | None, typer.Option(help="Random control sets. (default: 3, under --full 10)")]
Factor = Annotated[
    list[float] | None, typer.Option("--factor", help="Scaling factor to try on validation prompts; repeatable.")
]
Token = Annotated[list[str] | None, typer.Option(help="Refusal token, instead of finding it; repeatable.")]
BestLayer = Annotated[int | None, typer.Option(help="Layer of the direction, instead of choosing it.")]
KeepUnrefused = Annotated[bool | None, typer.Option("--keep-unrefused", help="Fit on prompts answered against label.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Where answers are cut off. (default: 256; the testbed 64)")]
BatchSize = Annotated[int | None, typer.Option(help="Prompts per batch, instead of choosing it from memory.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps. (default: auto)")]
Seed = Annotated[int | None, typer.Option(help="Seed of random sets and resamples. (default: 0)")]


def run_chain(job: "Job") -> str:
    """The whole job: each line one arrow. Returns the page's path in the run folder."""
    from refusalscope.pipeline import explain, fit, measure, select, verify

    fitted = fit.fit(job)
    chosen = select.choose_features(job, fitted)
    measure.run_benchmark(job, fitted, chosen)
    measure.run_health(job, fitted)
    measure.run_attribution(job, fitted, chosen)
    explain.explain_features(job, fitted, chosen)
    explain.explain_prompts(job, fitted, chosen)
    if job.options.full:
        verify.run_verification(job, fitted)
    measure.describe_run(job, fitted)
    return measure.write_report(job.store)


def features_chain(job: "Job") -> str:
    """The first half: a direction and feature sets."""
    from refusalscope.pipeline import fit, select

    select.choose_features(job, fit.fit(job))
    return "features/table.json"


def benchmark_chain(job: "Job") -> str:
    """As `run`, without the health of the SAEs and the page."""
    from refusalscope.pipeline import fit, measure, select

    fitted = fit.fit(job)
    measure.run_benchmark(job, fitted, select.choose_features(job, fitted))
    measure.describe_run(job, fitted)
    return "findings/benchmark.json"


def verify_chain(job: "Job") -> str:
    """Hold the attributions of this model to their oracles."""
    from refusalscope.pipeline import fit, measure, verify

    fitted = fit.fit(job)
    verify.run_verification(job, fitted)
    measure.describe_run(job, fitted)
    return measure.write_report(job.store)


def add_verb(verb: str, chain: "Callable[[Job], str]", text: str) -> None:
    """A command that drives one chain; all chains take the same options and share run folders."""

    def command(
        model: Model = None,
        name: Name = None,
        runs: Runs = Path("runs"),
        config: Config = None,
        saes: Saes = None,
        sae_release: SaeRelease = None,
        sae_id: SaeId = None,
        layers: Layers = None,
        prompts: PromptFile = None,
        columns: Columns = None,
        label: Label = None,
        limit: Limit = None,
        datasets: Dataset = None,
        protocol: Protocol = None,
        full: Full = None,
        k: SetSize = None,
        methods: Method = None,
        draws: Draws = None,
        factors: Factor = None,
        values: Value = None,
        refusal_token: Token = None,
        best_layer: BestLayer = None,
        keep_unrefused: KeepUnrefused = None,
        system: System = None,
        thinking: Thinking = None,
        chat_template: ChatTemplate = None,
        max_new_tokens: MaxNewTokens = None,
        batch_size: BatchSize = None,
        device: Device = None,
        device_map: DeviceMap = None,
        dtype: Dtype = None,
        quantize: Quantize = None,
        trust_remote_code: RemoteCode = None,
        seed: Seed = None,
    ) -> None:
        given = {key: value for key, value in locals().items() if key in OPTION_NAMES and value is not None}
        with one_clear_line(), progress_bar() as progress:
            drive(chain, given, folder=(name, runs), config=config, progress=progress)

    app.command(verb, help=text)(command)


OPTION_NAMES = frozenset(
    (
        *("model", "saes", "sae_release", "sae_id", "layers", "prompts", "columns", "label", "limit", "datasets"),
        *("protocol", "full", "k", "methods", "draws", "factors", "values", "refusal_token", "best_layer"),
        *("keep_unrefused", "system", "thinking", "chat_template", "max_new_tokens", "batch_size", "device"),
        *("device_map", "dtype", "quantize", "trust_remote_code", "seed"),
    )
)
add_verb("run", run_chain, "Find the features behind refusal, edit them, measure what changes, write the report.")
add_verb("features", features_chain, "Only find the direction and the feature sets.")
add_verb("verify", verify_chain, "Check on this model that attributions are computed right and predict interventions.")
add_verb("benchmark", benchmark_chain, "As run, without the report.")


def drive(
    chain: "Callable[[Job], str]",
    values: dict[str, Any],
    *,
    folder: tuple[str | None, Path],
    config: Path | None,
    progress: Callable[[str, int, int], None],
) -> None:
    """Make the options and the job, run the chain, print where its result lies."""
    from transformers.utils import logging as transformers_logging

    from refusalscope.pipeline import options
    from refusalscope.pipeline.job import Job

    if "columns" in values:
        values["columns"] = parse_columns(values["columns"])
    if "layers" in values:
        values["layers"] = parse_layers(values["layers"])
    made = options.make(values, config)
    # Its bars for loading weights would run into ours.
    transformers_logging.disable_progress_bar()
    name, runs = folder
    with closing(Job(made, runs / (name or Path(made.model).resolve().name), progress)) as job:
        path = job.run(chain)
        job.finish()
    print(job.store.root / path)


def parse_columns(text: str) -> dict[str, str]:
    """`text=question,label=class` as a mapping. Raises ValueError for anything else."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key and own for key, _, own in pairs):
        raise ValueError(f"--columns {text!r}: write text=NAME,label=NAME,category=NAME")
    return {key.strip(): own.strip() for key, _, own in pairs}


def parse_layers(parts: list[str]) -> list[int]:
    """`["3,7", "9-11"]` as layers 3, 7, 9, 10, 11. Raises ValueError for anything else."""
    layers: set[int] = set()
    for part in ",".join(parts).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"--layers {part!r}: write layers as 9, or 3,7, or 3-7")
        layers.update(range(int(first), int(last or first) + 1))
    return sorted(layers)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the report of a run folder anew; needs no model."""
    with one_clear_line():
        from refusalscope.core.store import Store
        from refusalscope.pipeline import measure

        store = Store(run)
        with store.claim:
            print(run / measure.write_report(store))


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="svg, png or pdf; repeatable. (default: all three)")
    ] = None,
) -> None:
    """Write every figure of a run folder as files for papers and slides; needs no model."""
    with one_clear_line():
        from refusalscope.core.store import Store
        from refusalscope.pipeline import figures

        store = Store(run)
        with store.claim:
            paths = figures.write_figures(store, formats) if formats else figures.write_figures(store)
        if not paths:
            raise ValueError(f"{run} holds no finding that is drawn: is it a finished run?")
        print(*(run / path for path in paths), sep="\n")


@app.command()
def models() -> None:
    """List the models that have a preset: name, repository, SAEs, what was published of them."""
    with one_clear_line():
        from refusalscope.inputs import presets

        for name, preset in presets.presets().items():
            first, *more = presets.described(preset)
            print(f"{name:22}{first}", *(f"{'':22}{line}" for line in more), sep="\n")


@data_app.command()
def fetch(
    folder: Annotated[Path, typer.Argument(help="Where to put it.")] = Path("data/refusal_direction"),
    collection: Annotated[str, typer.Option(help="Which collection.")] = "refusal_direction",
    url: Annotated[str | None, typer.Option(help="A mirror of its files.")] = None,
) -> None:
    """Download a prompt collection at its pinned commit, every file checked."""
    with one_clear_line(), progress_bar() as progress:
        from refusalscope.inputs import fetch as fetching

        fetching.fetch(collection, folder, url=url, progress=progress)
        print(folder)


@testbed_app.command()
def build(
    folder: Annotated[Path, typer.Argument(help="Where to put model, SAEs and checksums.")],
    seed: Annotated[int, typer.Option(help="Seed of weights, text and SAEs.")] = 0,
) -> None:
    """Train the embedded model and its SAEs from nothing; a build that was stopped goes on where it was."""
    with one_clear_line(), progress_bar() as progress:
        from refusalscope.testbed import build as building

        building.build(folder, seed=seed, progress=progress)
        print(folder)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error: what is being done, how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # Where nobody watches (a pipe, a log) rich would still write an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


@contextmanager
def one_clear_line() -> Iterator[None]:
    """Bad input ends with one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise typer.Exit(2) from error
    except OSError as error:
        print(f"error: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
        raise typer.Exit(2) from error
