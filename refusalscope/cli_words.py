"""What the words on the command line mean: which verb takes which options, and how their values are spelled.

Knows no verb's doing; prints nothing. What it cannot read is a ValueError of one line.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refusalscope.evals.judges import Settings
    from refusalscope.pipeline.patient import Verdict

FOLDER_OPTIONS = frozenset(("name", "runs"))
"""Where a run lies: of no use to a verb that writes nothing."""
SWEEP_OPTIONS = frozenset(("sizes", "choose"))
BY_CATEGORY = frozenset(("category_prompts", "categories", "language"))
PROBED = frozenset(("detection", "look_alikes", "pooling", "paper_labels"))
STUDIES = {
    "run": BY_CATEGORY | {"studies", "nodes", "pairs", "suffixes"} | PROBED,
    "categories": BY_CATEGORY | {"nodes"},
    "jailbreaks": BY_CATEGORY | {"pairs"},
    "suffixes": BY_CATEGORY | {"suffixes"},
    "probe": BY_CATEGORY | PROBED,
    "health": frozenset(("against", "documents")),
    "doctor": frozenset(("studies",)),
}
"""Verbs that are given more than the run's own prompts, and by which options."""
STUDY_OPTIONS = frozenset().union(*STUDIES.values())
JUDGED = ("run", "benchmark")
"""Verbs that answer, so that there is something to judge."""
JUDGE_OPTIONS = frozenset(
    ("judges", "judge_url", "judge_model", "judge_revision", "judge_template", "judge_engine", "judge_question")
)
OPTION_NAMES = frozenset(
    (
        *("model", "revision", "saes", "sae_release", "sae_id", "layers", "prompts", "columns", "label"),
        *("limit", "datasets"),
        *("protocol", "full", "k", "methods", "draws", "factors", "values", "refusal_token", "best_layer"),
        *("keep_unrefused", "system", "thinking", "chat_template", "max_new_tokens", "batch_size", "device"),
        *("device_map", "dtype", "quantize", "trust_remote_code", "seed", "sizes"),
        *("no_read_ahead", "no_feature_labels"),
        *STUDY_OPTIONS,
    )
)


def foreign(verb: str) -> frozenset[str]:
    """The options of other verbs, which this one does not take."""
    others = STUDY_OPTIONS - STUDIES.get(verb, frozenset())
    others |= frozenset() if verb in JUDGED else JUDGE_OPTIONS
    others |= FOLDER_OPTIONS if verb == "doctor" else frozenset()
    return others | (frozenset() if verb == "sweep" else SWEEP_OPTIONS)


def lines_of(verdict: "Verdict") -> list[str]:
    """A line of doctor's, and below it, indented, what belongs to it."""
    return [f"{verdict.word:12}{verdict.line}: {verdict.detail}", *(f"{'':14}{more}" for more in verdict.more)]


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


def parsed(values: dict[str, Any]) -> dict[str, Any]:
    """The options given, their lists and mappings read. Raises ValueError for what is spelled wrong."""
    read = dict(values)
    if "columns" in read:
        read["columns"] = parse_columns(read["columns"])
    for key in ("layers", "sizes"):
        if key in read:
            read[key] = parse_numbers(f"--{key}", read[key])
    return read


def parse_columns(text: str) -> dict[str, str]:
    """`text=question,label=class` as a mapping. Raises ValueError for anything else."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key and own for key, _, own in pairs):
        raise ValueError(f"--columns {text!r}: write text=NAME,label=NAME,category=NAME")
    return {key.strip(): own.strip() for key, _, own in pairs}


LONGEST_RANGE = 10_000


def parse_numbers(flag: str, parts: list[str]) -> list[int]:
    """`["3,7", "9-11"]` as 3, 7, 9, 10, 11. Raises ValueError for anything else."""
    numbers: set[int] = set()
    for part in ",".join(parts).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and 0 <= int(last) - int(first) < LONGEST_RANGE)):
            raise ValueError(f"{flag} {part!r}: write {flag.removeprefix('--')} as 9, or 3,7, or 3-7")
        numbers.update(range(int(first), int(last or first) + 1))
    return sorted(numbers)


def split(text: str) -> tuple[str, ...]:
    """`a, b` as ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
