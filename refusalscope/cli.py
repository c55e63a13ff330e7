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

from refusalscope import cli_options as option
from refusalscope import cli_words as words

if TYPE_CHECKING:
    from refusalscope.pipeline.judge import Unscored

app = typer.Typer(
    help="Show why a chat model refuses, with sparse autoencoders.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prompt collections.", no_args_is_help=True)
testbed_app = typer.Typer(help="The embedded model.", no_args_is_help=True)
app.add_typer(data_app, name="data")
guard_app = typer.Typer(help="A detector of harmful prompts, as `probe` makes it.", no_args_is_help=True)
app.add_typer(testbed_app, name="testbed")
app.add_typer(guard_app, name="guard")


def add_verb(verb: str, text: str) -> None:
    """A command that drives the chain of its name; all take the same options, and share run folders.

    Those that answer can be judged as well, and a sweep has two options of its own.
    """

    def command(**options: Any) -> None:
        said = {key: value for key, value in options.items() if value is not None}
        given = {key: value for key, value in said.items() if key in words.OPTION_NAMES}
        folder = (said.get("name"), said["runs"])
        with one_clear_line(), progress_bar() as progress:
            # A batch size is meant for the studied model.
            how = {key: said[key] for key in (*words.JUDGE_OPTIONS, "device", "dtype") if key in said}
            chain = "choose" if said.get("choose") else verb
            drive(chain, given, folder=folder, config=said.get("config"), progress=progress, judging=how)

    register(verb, text, command)


def register(verb: str, text: str, command: Callable[..., None]) -> None:
    """Make it a command that takes the options of all verbs but those that are not its own."""
    command.__annotations__ = option.every_option.__annotations__
    vars(command)["__signature__"] = signature(option.every_option)
    hide(command, words.foreign(verb))
    app.command(verb, help=text)(command)


def hide(command: Callable[..., None], names: Iterable[str]) -> None:
    """Take parameters from what the command line shows and accepts of a command."""
    whole = signature(command)
    kept = [part for name, part in whole.parameters.items() if name not in names]
    vars(command)["__signature__"] = whole.replace(parameters=kept)


add_verb("run", "Every study: which features refuse, what edits change and cost, why attacks pass; with a report.")
add_verb("features", "Only find the direction and the feature sets.")
add_verb("verify", "Check on this model that attributions are computed right and predict interventions.")
add_verb("benchmark", "As run, without the report.")
add_verb("categories", "Which features serve all kinds of harm, which one, and which drive which.")
add_verb("minimal", "The fewest features whose silence flips each prompt, and which wake up when they are silent.")
add_verb("jailbreaks", "Which features attacks silence, and whether setting them back brings refusal back.")
add_verb("probe", "Which probes recognise harmful prompts, adversarial ones too; makes a guard of the best.")
add_verb("suffixes", "Which words of adversarial suffixes silence which features.")
add_verb("health", "What the SAEs keep of this model, layer by layer, and what a second SAE set keeps.")
add_verb("sweep", "Try set sizes and strengths on validation prompts: refusal, coherence and cost of each.")


def doctor(**options: Any) -> None:
    """The checks of `doctor` as they are known, a line each and what belongs to it below; exit code 1 if one failed."""
    said = {key: value for key, value in options.items() if value is not None}
    given = {key: value for key, value in said.items() if key in words.OPTION_NAMES}
    failed = False
    with one_clear_line(), progress_bar() as progress:
        from refusalscope.pipeline import doctor as checks
        from refusalscope.pipeline import options as made

        no_loading_bars()
        for verdict in checks.examine(made.make(words.parsed(given), said.get("config")), progress):
            print(*words.lines_of(verdict), sep="\n", flush=True)
            failed |= verdict.word == checks.FAILED
    if failed:
        raise typer.Exit(1)


register(
    "doctor",
    "Prove on a few prompts that model, template and SAEs fit, before a run; and how long it will take.",
    doctor,
)


def drive(
    verb: str,
    values: dict[str, Any],
    *,
    folder: tuple[str | None, Path],
    config: Path | None,
    progress: Callable[[str, int, int], None],
    judging: dict[str, Any],
) -> None:
    """Make the options and the job, run the chain, have the answers judged, print where the result lies."""
    from refusalscope.pipeline import chains, judge, options, whole
    from refusalscope.pipeline.answered import of_benchmark
    from refusalscope.pipeline.job import Job

    sweeps = verb in ("sweep", "choose")
    made = options.make(words.parsed(values), config, defaults=options.SWEEP if sweeps else {})
    chains.check(verb, made)
    names, settings = judge.asked(judging.get("judges", ())), words.judge_settings(judging)
    settings = judge.check(names, settings)
    no_loading_bars()
    name, runs = folder
    called = Path(made.model).resolve().name + ("-sweep" if sweeps else "")
    with closing(Job(made, runs / (name or called), progress)) as job:
        for line in [] if job.plan is None else job.plan.lines():
            print(line, file=sys.stderr)
        path = job.run(chains.CHAINS[verb])
        if names:
            job.release()
            # Studies answer too, under many edits: their answers are for `judge`, which can be told which.
            tell(judge.judge_run(job.store, names, settings, datasets=of_benchmark(job.store), progress=progress))
        job.finish()
        for line in (*job.halved, *(whole.left_out(job.store) if verb == "run" else ())):
            print(line, file=sys.stderr)
    print(job.store.root / path)


def tell(left: "Sequence[Unscored]") -> None:
    """What was left without a score, on standard error: the rest is usable."""
    for one in left:
        why = one.reason or "no reason given"
        print(f"{one.judge}: {one.unscored} of {one.answers} answers unscored, mostly: {why}", file=sys.stderr)


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
def judge(
    run: Annotated[Path, typer.Argument(help="A run folder that `run` or `benchmark` has finished.")],
    judges: option.Judges = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A person's labels, CSV or JSONL: dataset, method, setting, prompt_id; refused, harmful, ..."
        ),
    ] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", help="Judge only the answers to this set; repeatable.")
    ] = None,
    judge_url: option.JudgeUrl = None,
    judge_model: option.JudgeModel = None,
    judge_revision: option.JudgeRevision = None,
    judge_template: option.JudgeTemplate = None,
    judge_engine: option.JudgeEngine = None,
    judge_question: option.JudgeQuestion = None,
    device: option.Device = None,
    dtype: option.Dtype = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Answers per batch of the judge.")] = None,
) -> None:
    """Score the answers of a run, adding to what is there; nothing is generated again."""
    said = {key: value for key, value in locals().items() if value is not None}
    with one_clear_line(), progress_bar() as progress:
        from refusalscope.core.store import Store
        from refusalscope.pipeline import judge as judging

        if not set(judges or ()) - {judging.NO_JUDGE} and labels is None:
            raise ValueError("nothing to judge by: name a judge with --judge, or a person's labels with --labels")
        no_loading_bars()
        store, settings = Store(run), words.judge_settings(said)
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
def capability(
    run: Annotated[Path, typer.Argument(help="A run folder, at least up to `refusalscope benchmark`.")],
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness: arc_challenge,gsm8k,...")] = "",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Edits: base,direction,cosine,... or one as 'cosine set v=1 k=5'. (default: all but random and set)"
        ),
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
        from refusalscope.pipeline import capability as measuring

        no_loading_bars()
        names = None if methods is None else words.split(methods)
        wanted = measuring.Wanted(words.split(tasks), names, limit, num_fewshot, include_path, documents, batch_size)
        with closing(measuring.reopened(run, progress)) as job:
            print(run / measuring.run_capability(job, wanted))


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


@guard_app.command("save")
def save_guard(
    run: Annotated[Path, typer.Argument(help="A run folder that `probe` has finished.")],
    folder: Annotated[Path, typer.Argument(help="Where to put the guard.")],
) -> None:
    """Copy the guard of a run to where it is used: two files, a few kilobytes a feature; needs no model."""
    with one_clear_line():
        from refusalscope.guard import Guard

        Guard.from_run(run).save(folder)
        print(folder)


@guard_app.command("score")
def score_prompts(
    folder: Annotated[Path, typer.Argument(metavar="GUARD", help="A saved guard, or a run folder that holds one.")],
    prompts: Annotated[Path, typer.Argument(help="JSONL with text, prompt or instruction; - is standard input.")],
    model: Annotated[
        str | None, typer.Option(help="The guard's own model, where it lies. (default: where it came from)")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 16,
) -> None:
    """Score prompts before anything is generated: JSONL in, the same rows with probability, flagged and reasons out."""
    with one_clear_line():
        from refusalscope.guard import score_lines

        no_loading_bars()
        for line in score_lines(folder, prompts, model=model, batch_size=batch_size):
            print(line, flush=True)


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
    seed: Annotated[int | None, typer.Option(help="Seed of weights, text and SAEs. (default: 0)")] = None,
    sae_set: Annotated[
        str,
        typer.Option(help="chat: everything from nothing; base: SAEs on text without the chat template, beside it."),
    ] = "chat",
) -> None:
    """Train the embedded model and its SAEs from nothing; a build that was stopped goes on where it was."""
    with one_clear_line(), progress_bar() as progress:
        from refusalscope.testbed import build as building

        if sae_set not in ("chat", "base"):
            raise ValueError(f"--sae-set {sae_set!r}: choose chat or base")
        if sae_set == "base" and seed is not None:
            raise ValueError(f"--seed: the base set takes the seed of {folder}'s own build, leave it out")
        if sae_set == "base":
            building.build_base_saes(folder, progress=progress)
        else:
            building.build(folder, seed=seed or 0, progress=progress)
        print(folder)


def no_loading_bars() -> None:
    """Bars of transformers would run into ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


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
