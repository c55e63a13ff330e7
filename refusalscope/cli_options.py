"""The options of the command line that several verbs share: what each is called and what its help says."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        help="A preset (see `refusalscope models`), a Hugging Face repository or a folder. (default: testbed)"
    ),
]
Name = Annotated[str | None, typer.Option(help="Name of the run folder below --runs; the model's name by default.")]
Runs = Annotated[Path, typer.Option(help="Where run folders lie.")]
Config = Annotated[Path | None, typer.Option(help="Options from a TOML file; the command line wins.")]
Revision = Annotated[
    str | None,
    typer.Option(help="Commit, tag or branch of the model's repository. (default: the preset's commit, else main)"),
]
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
NoReadAhead = Annotated[
    bool | None, typer.Option("--no-read-ahead", help="Keep one SAE in memory, not also the next one.")
]
NoFeatureLabels = Annotated[
    bool | None, typer.Option("--no-feature-labels", help="Ask Neuronpedia for no explanations of features.")
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
Sizes = Annotated[
    list[str] | None,
    typer.Option("--sizes", help="Set sizes K*: 10,20 or 10-15; repeatable. (default: 10,20,30,40,50)"),
]
Choose = Annotated[bool, typer.Option("--choose", help="Write the best strength to chosen.toml, for run --config.")]
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
Studies = Annotated[
    list[str] | None,
    typer.Option(
        "--study",
        help="A study to do beside the benchmark: categories, minimal, jailbreaks, suffixes, probes; none; repeatable. "
        "(default: all)",
    ),
]
CategoryPrompts = Annotated[
    str | None,
    typer.Option(help="A file with Category and Question, or owner/name. (default: CATQA; the testbed's own)"),
]
Categories = Annotated[
    list[str] | None, typer.Option("--category", help="A category to study; repeatable. (default: the published seven)")
]
Language = Annotated[
    str | None, typer.Option(help="Keep prompts in this language alone, as en, zh, vi; any keeps all. (default: en)")
]
Nodes = Annotated[int | None, typer.Option(help="Features in the graph. (default: 20)")]
PairFile = Annotated[
    Path | None,
    typer.Option(
        "--pairs", help="Attacks and their plain forms, CSV or TSV. (default: WildJailbreak; the testbed's wrappers)"
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        help="A second SAE set: one that the preset names, another preset of this model, a folder with {layer}, or a "
        "release of SAELens or release:ID. (default: none)"
    ),
]
Documents = Annotated[
    str | None,
    typer.Option(
        help="Plain text: a .txt, .jsonl, .json or .csv file, or owner/name@revision:column. (default: none; the "
        "testbed's own)"
    ),
]
SuffixFile = Annotated[
    Path | None,
    typer.Option(
        "--suffixes", help="CSV with goal and response, a list of suffixes. (default: none; the testbed's own)"
    ),
]
Detection = Annotated[
    str | None,
    typer.Option(
        help="What probes learn from and are tested on: a table with prompt, adversarial, label, split, group; a "
        "folder like refusal_direction's; or owner/name. (default: WildJailbreak; the testbed's own)"
    ),
]
LookAlikes = Annotated[
    str | None,
    typer.Option(help="Benign prompts that look harmful, such as XSTest's: a table or owner/name. (default: none)"),
]
Pooling = Annotated[
    str | None,
    typer.Option(help="What probes read: last (token of the prompt), or max or mean over the instruction."),
]
PaperLabels = Annotated[
    bool | None, typer.Option("--paper-labels", help="Also by the paper's labels, where a successful attack is 0.")
]


def every_option(
    model: Model = None,
    name: Name = None,
    runs: Runs = Path("runs"),
    config: Config = None,
    revision: Revision = None,
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
    no_read_ahead: NoReadAhead = None,
    no_feature_labels: NoFeatureLabels = None,
    seed: Seed = None,
    judges: Judges = None,
    judge_url: JudgeUrl = None,
    judge_model: JudgeModel = None,
    judge_revision: JudgeRevision = None,
    judge_template: JudgeTemplate = None,
    judge_engine: JudgeEngine = None,
    judge_question: JudgeQuestion = None,
    sizes: Sizes = None,
    choose: Choose = False,
    studies: Studies = None,
    category_prompts: CategoryPrompts = None,
    categories: Categories = None,
    language: Language = None,
    nodes: Nodes = None,
    pairs: PairFile = None,
    suffixes: SuffixFile = None,
    detection: Detection = None,
    look_alikes: LookAlikes = None,
    pooling: Pooling = None,
    paper_labels: PaperLabels = None,
    against: Against = None,
    documents: Documents = None,
) -> None:
    """The options of all verbs that take a model: a signature, never called."""
