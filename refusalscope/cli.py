"""The command line: options in, the chain run, one clear line out. No mathematics; the only place that prints.

Stages are imported inside the commands, so that `--help` answers at once.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from refusalscope.evals.judges import Settings
    from refusalscope.pipeline.job import Job
    from refusalscope.pipeline.judge import Unscored

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
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge", help="Who scores the answers: see `refusalscope judges`; module:function; none. Repeatable."
    ),
]
JudgeUrl = Annotated[str | None, typer.Option(help="An OpenAI-compatible server that runs the judges' models.")]
JudgeModel = Annotated[
    str | None, typer.Option(help="The model's name on the server; or a checkpoint instead of the judge's own.")
]
JudgeRevision = Annotated[str | None, typer.Option(help="Revision of the judge's repository, instead of the pinned.")]
JudgeTemplate = Annotated[Path | None, typer.Option(help="The judge's instruction, instead of its model card's.")]
JudgeEngine = Annotated[str | None, typer.Option(help="transformers or vllm. (default: transformers)")]
JudgeQuestion = Annotated[
    str | None,
    typer.Option(help="What a rubric or module:function is asked: refused, harmful, coherent. (default: harmful)"),
]


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
        judges: Judges = None,
        judge_url: JudgeUrl = None,
        judge_model: JudgeModel = None,
        judge_revision: JudgeRevision = None,
        judge_template: JudgeTemplate = None,
        judge_engine: JudgeEngine = None,
        judge_question: JudgeQuestion = None,
    ) -> None:
        said = {key: value for key, value in locals().items() if value is not None}
        given = {key: value for key, value in said.items() if key in OPTION_NAMES}
        with one_clear_line(), progress_bar() as progress:
            # A batch size and a type of numbers are meant for the studied model.
            how = {key: said[key] for key in (*JUDGE_OPTIONS, "device") if key in said}
            drive(chain, given, folder=(name, runs), config=config, progress=progress, judging=how)

    if verb not in JUDGED:
        hide(command, JUDGE_OPTIONS)
    app.command(verb, help=text)(command)


def hide(command: Callable[..., None], names: Iterable[str]) -> None:
    """Take parameters from what the command line shows and accepts of a command."""
    whole = signature(command)
    kept = [part for name, part in whole.parameters.items() if name not in names]
    vars(command)["__signature__"] = whole.replace(parameters=kept)


JUDGED = ("run", "benchmark")
"""Verbs that answer, so that there is something to judge."""
JUDGE_OPTIONS = frozenset(
    ("judges", "judge_url", "judge_model", "judge_revision", "judge_template", "judge_engine", "judge_question")
)
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
    judging: dict[str, Any],
) -> None:
    """Make the options and the job, run the chain, have the answers judged, print where the result lies."""
    from transformers.utils import logging as transformers_logging

    from refusalscope.pipeline import judge, options
    from refusalscope.pipeline.job import Job

    if "columns" in values:
        values["columns"] = parse_columns(values["columns"])
    if "layers" in values:
        values["layers"] = parse_layers(values["layers"])
    made = options.make(values, config)
    names, settings = judge.asked(judging.get("judges", ())), judge_settings(judging)
    judge.check(names, settings)
    # Its bars for loading weights would run into ours.
    transformers_logging.disable_progress_bar()
    name, runs = folder
    with closing(Job(made, runs / (name or Path(made.model).resolve().name), progress)) as job:
        path = job.run(chain)
        if names:
            job.release()
            tell(judge.judge_run(job.store, names, settings, progress=progress))
        job.finish()
    print(job.store.root / path)


def judge_settings(said: dict[str, Any]) -> "Settings":
    """How judges are run, from the options of judging. Raises ValueError for a word that is no choice."""
    from refusalscope.evals.judges import Settings

    for key, choices in JUDGE_CHOICES.items():
        if said.get(key, choices[0]) not in choices:
            raise ValueError(f"--{key.replace('_', '-')} {said[key]!r}: choose one of {', '.join(choices)}")
    names = {key: key.removeprefix("judge_") for key in (*JUDGE_OPTIONS, "device", "dtype", "batch_size")}
    return Settings(**{own: said[key] for key, own in names.items() if key in said and key != "judges"})


JUDGE_CHOICES = {
    "judge_engine": ("transformers", "vllm"),
    "judge_question": ("harmful", "refused", "coherent"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}


def tell(left: "Sequence[Unscored]") -> None:
    """What was left without a score, on standard error: the rest is usable."""
    for one in left:
        why = one.reason or "no reason given"
        print(f"{one.judge}: {one.unscored} of {one.answers} answers unscored, mostly: {why}", file=sys.stderr)


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
def capability(
    run: Annotated[Path, typer.Argument(help="A run folder, at least up to `refusalscope benchmark`.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness: arc_challenge,gsm8k,...")] = "",
    methods: Annotated[
        str | None, typer.Option(help="Edits of the run: base,direction,cosine,... (default: all but random)")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task. (default: all)")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. (default: what the task says)")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with task files of your own.")] = None,
    documents: Annotated[
        str | None,
        typer.Option(
            help="Texts for cross-entropy: a .txt, .jsonl, .json or .csv file, or owner/name@revision:column."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Documents per batch. (default: the run's own)")] = None,
) -> None:
    """Measure what a run's edits cost on tasks and documents, without choosing or answering anything anew."""
    with one_clear_line(), progress_bar() as progress:
        from transformers.utils import logging as transformers_logging

        from refusalscope.pipeline import capability as measuring

        transformers_logging.disable_progress_bar()
        names = None if methods is None else split(methods)
        wanted = measuring.Wanted(split(tasks), names, limit, num_fewshot, include_path, documents)
        with closing(measuring.reopened(run, progress)) as job:
            if batch_size is not None:
                job.resize(measuring.STAGE, batch_size)
            print(run / job.run(lambda job: measuring.run_capability(job, wanted)))


def split(text: str) -> tuple[str, ...]:
    """`a, b` as ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


@app.command()
def judge(
    run: Annotated[Path, typer.Argument(help="A run folder that `run` or `benchmark` has finished.")],
    judges: Judges = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A person's labels, CSV or JSONL: dataset, method, setting, prompt_id; refused, harmful, ..."
        ),
    ] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", help="Judge only the answers to this set; repeatable.")
    ] = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_revision: JudgeRevision = None,
    judge_template: JudgeTemplate = None,
    judge_engine: JudgeEngine = None,
    judge_question: JudgeQuestion = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Answers per batch of the judge.")] = None,
) -> None:
    """Score the answers of a run, adding to what is there; nothing is generated again."""
    said = {key: value for key, value in locals().items() if value is not None}
    with one_clear_line(), progress_bar() as progress:
        from refusalscope.core.store import Store
        from refusalscope.pipeline import judge as judging

        if not judges and labels is None:
            raise ValueError("nothing to judge by: name a judge with --judge, or a person's labels with --labels")
        store, settings = Store(run), judge_settings(said)
        with store.claim:
            left = judging.judge_run(store, judges or [], settings, labels=labels, datasets=datasets, progress=progress)
        tell(left)
        print(run / judging.SAFETY)


@app.command("judges")
def list_judges() -> None:
    """List who can score answers: name, question, what it is."""
    with one_clear_line():
        from refusalscope.evals import judges, rules

        for known in judges.known():
            weights = f", {known.memory:g} GB" if known.memory else ""
            about = ", ".join(part for part in (known.repository, known.licence) if part)
            more = [f"{'':28}{about}{weights}"] if about else []
            print(f"{known.name:18}{known.question:10}{known.what}", *more, sep="\n")
        for name, (question, _) in rules.RULES.items():
            print(f"{name:18}{question:10}{rules.WHAT[name]}")


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
