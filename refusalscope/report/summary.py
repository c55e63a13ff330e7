"""The first page: what a reader who is no specialist must know, in four headed paragraphs of the findings' own rows.

Says what the rows say, also where an effect is absent or a study is missing; computes no statistic.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from refusalscope.core.types import Direction, Finding, Row
from refusalscope.report import probes, verdict
from refusalscope.report.sentences import beside, edit_row, effect, listed, spelled
from refusalscope.report.settings import DATASET_OF_STRENGTHS, factor
from refusalscope.report.suffixes import REFUSAL, name_of
from refusalscope.studies.capability import change_of
from refusalscope.studies.health import FIRST, WORDS, verdicts
from refusalscope.studies.jailbreaks import BOTH, COMMON, FAILED, RESTORE, SUCCEEDED

MISSING = "Not measured in this run."
SHOWN = 4
"""Data sets and tasks that a sentence names before it points to the tables."""
WORDS_SHOWN = 3


class Paragraph(NamedTuple):
    """A heading and what stands below it."""

    anchor: str
    heading: str
    sentences: Sequence[str]
    summary: str = ""
    """What the fold says that hides `folded`: words of attacks."""
    folded: str = ""


def paragraphs(
    findings: Mapping[str, Finding],
    labels: Mapping[str, str],
    direction: Direction,
    table: Sequence[Mapping[str, Any]],
) -> list[Paragraph]:
    """What refuses, what editing it costs, which attacks pass and why, and how well a guard sees them.

    `labels` are the prompts' by data set; `table` holds the chosen features, a row each.
    """
    benchmark = findings.get("benchmark")
    first, second = [], []
    if benchmark is not None:
        first = [*_refused(benchmark, labels), _where(benchmark, labels, direction, table)]
        first.append(_edited(benchmark, labels))
        second = _price(benchmark, labels)
    second += [*_capability(benchmark, labels, findings.get("capability")), *_trusted(findings)]
    third = [*_attacks(findings.get("jailbreaks")), *_suffixes(findings.get("suffixes"))]
    words = _words(findings.get("suffixes"))
    fold = "Show the words that do the most: they are parts of attacks, as evidence only." if words else ""
    return [
        Paragraph("refuses", "What refuses here", first or [MISSING]),
        Paragraph("costs", "What it costs to edit", second),
        Paragraph("passes", "Which attacks pass, and why", third, fold, words),
        Paragraph("guarded", "How well the guard sees them", _guard(findings.get("probes"))),
    ]


def _refused(finding: Finding, labels: Mapping[str, str]) -> list[str]:
    """What the unedited model refuses, data set by data set: harmful ones, then the rest."""
    rows = [
        row
        for row in finding.rows
        if (row.method, row.metric) == ("base", "refused") and row.n and row.dataset != DATASET_OF_STRENGTHS
    ]
    ordered = sorted(rows, key=lambda row: labels.get(row.dataset) != "harmful")
    if not ordered:
        return []
    parts = [f"{spelled(row, '%')} of {row.dataset} prompts (n = {row.n})" for row in ordered[:SHOWN]]
    more = f", and of {len(ordered) - SHOWN} more sets what stands under Results" if len(ordered) > SHOWN else ""
    return [f"Without any edit the model refuses {listed(parts)}{more}."]


def _where(
    finding: Finding, labels: Mapping[str, str], direction: Direction, table: Sequence[Mapping[str, Any]]
) -> str:
    """The layer of the direction, and in which layers the features of the edit lie."""
    said = f"What decides it can be read as one direction in the model’s inner state, at layer {direction.layer}"
    edit = edit_row(finding, labels)
    layers = [row["layer"] for row in table if edit is not None and row["method"] == edit.method]
    if edit is None or not layers:
        return f"{said}."
    parts = [f"{layers.count(layer)} in layer {layer}" for layer in sorted(set(layers))]
    return (
        f"{said}, and as {len(layers)} features, single patterns of that state that sparse autoencoders (SAEs) tell "
        f"apart: {listed(parts)}."
    )


def _edited(finding: Finding, labels: Mapping[str, str]) -> str:
    """What becomes of refusal once the features are weakened, beside random ones and without the direction."""
    edit = edit_row(finding, labels)
    base = None if edit is None else finding.find(edit.dataset, "base", "refused")
    if edit is None or base is None or not (edit.n and base.n):
        return "What becomes of refusal when these features are edited was not measured on harmful prompts."
    scale = factor(edit.setting)
    how = f"With their strength multiplied by {scale[0]:g}" if scale else f"With the edit {edit.method}"
    change = finding.find(edit.dataset, edit.method, "refused_change", edit.setting)
    return (
        f"{how.replace('-', '−')} the model refuses {spelled(edit, '%')} of {edit.dataset} prompts (n = {edit.n}) "
        f"instead of {spelled(base, '%')}: editing them {effect(change)}{beside(finding, edit, base)}."
    )


def _price(finding: Finding, labels: Mapping[str, str]) -> list[str]:
    """What comes in the place of refusals, and what the edit does to harmless prompts."""
    edit = edit_row(finding, labels)
    if edit is None:
        return []

    def of(dataset: str, metric: str) -> Row | None:
        return finding.find(dataset, edit.method, metric, edit.setting)

    said = [
        f"With the edit {spelled(of(edit.dataset, 'answered'), '%')} of {edit.dataset} prompts are answered coherently "
        f"and {spelled(of(edit.dataset, 'incoherent'), '%')} with garbled text (n = {edit.n})."
    ]
    cost = next((row for row in finding.rows if row.metric == "cross_entropy_change" and row.n), None)
    if cost is None:
        return [*said, "What it costs on harmless prompts was not measured."]
    price = of(cost.dataset, "cross_entropy_change")
    said.append(
        f"On {cost.dataset} prompts its usual answers become less likely by {spelled(price)} nats per token "
        f"(cross-entropy, n = {_n(price)}; 0 is no change)."
    )
    before, after = finding.find(cost.dataset, "base", "complied"), of(cost.dataset, "complied")
    if before is not None and after is not None and before.n and after.n:
        said.append(
            f"Of these prompts {spelled(after, '%')} still get what they ask for (n = {after.n}), unedited "
            f"{spelled(before, '%')}."
        )
    return said


def _capability(benchmark: Finding | None, labels: Mapping[str, str], finding: Finding | None) -> list[str]:
    """What the edit changes on tasks, if any were asked."""
    edit = None if benchmark is None else edit_row(benchmark, labels)
    if finding is None or edit is None:
        return ["What edits cost on tasks such as sums or general knowledge was not measured in this run."]
    changes = [
        (row, finding.find(row.dataset, row.method, change_of(row.metric), row.setting))
        for row in finding.rows
        if (row.method, row.setting) == (edit.method, edit.setting)
    ]
    parts = [
        f"{row.dataset}, {row.metric.partition(':')[0].replace('_', ' ')}: {spelled(row)} (n = {row.n}; "
        f"change {spelled(change)})"
        for row, change in changes
        if change is not None and change.n and row.n
    ]
    more = f"; {len(parts) - SHOWN} more stand under Cost elsewhere" if len(parts) > SHOWN else ""
    return [f"Elsewhere the same edit comes to: {'; '.join(parts[:SHOWN])}{more}."] if parts else []


def _trusted(findings: Mapping[str, Finding]) -> list[str]:
    """Whether the SAEs, and the scores that features are chosen by, may be believed."""
    said = []
    trusts = [one for one in verdicts(findings["health"]) if one.sae_set == FIRST] if "health" in findings else []
    if trusts:
        counts = [(word, sum(one.word == word for one in trusts)) for word in WORDS]
        parts = [f"{count} {'is' if count == 1 else 'are'} {word}" for word, count in counts if count]
        said.append(
            f"All of this is seen through the SAEs: of the {len(trusts)} layers where they were checked on the model’s "
            f"own chats, {listed(parts)}."
        )
    else:
        said.append("Whether the SAEs, through which all of this is seen, are sound here was not measured in this run.")
    if "verification" in findings:
        said += [f"Are the scores right that features are chosen by? {verdict.verdict(findings['verification'])[0]}"]
    return said


def _attacks(finding: Finding | None) -> list[str]:
    """How many attacks pass, what sets them apart, and whether undoing that stops them."""
    whole = None if finding is None else finding.find("pairs", "base", "succeeded", "all pairs")
    if finding is None or whole is None:
        return ["Attacks that disguise a request were not measured in this run."]
    families = [row for row in finding.rows if row.metric == "succeeded" and row.setting.startswith("family=")]
    by_family = [
        f"{row.setting.removeprefix('family=')} {spelled(row, '%')} (n = {row.n})" for row in families if row.n
    ]
    lowered = {what: finding.find("pairs", COMMON, "drop", what) for what in (SUCCEEDED, FAILED)}
    apart = finding.find("pairs", COMMON, "drop_difference", "within families")
    said = [
        f"Of the attacks on requests that are refused when put plainly, {spelled(whole, '%')} pass (n = {whole.n})."
        + (f" By kind of attack: {', '.join(by_family)}." if len(by_family) > 1 else ""),
        f"Attacks that pass lower the features that serve all kinds of harm by {spelled(lowered[SUCCEEDED])} of their "
        f"strength on the plain request (n = {_n(lowered[SUCCEEDED])}; 1 is all of it), attacks that fail by "
        f"{spelled(lowered[FAILED])} (n = {_n(lowered[FAILED])}){_apart(apart)}.",
    ]
    return [*said, *_restored(finding)]


def _apart(row: Row | None) -> str:
    """Whether attacks of one kind that pass lower the features further than those that fail."""
    if row is None or row.low is None or row.high is None:
        return "; whether the two differ among attacks of one kind could not be measured"
    told = "more" if row.low > 0 else "less" if row.high < 0 else "not measurably more or less"
    return f"; among attacks of one kind those that pass lower them {told} ({spelled(row)}, n = {row.n})"


def _restored(finding: Finding) -> list[str]:
    """What setting the features back does, beside random ones."""
    back = finding.find("restored", COMMON, BOTH, RESTORE)
    if back is None or not back.n:
        return ["Whether undoing that stops attacks was not measured: none passed that could be answered again."]
    random = finding.find("restored", "random features", BOTH, f"{RESTORE} mean")
    beside = "" if random is None or not random.n else f"; as many random features do so in {spelled(random, '%')}"
    return [
        "Set back to their strength on the plain request, these features alone make the model refuse again in "
        f"{spelled(back, '%')} of the attacks that had passed (n = {back.n}){beside}."
    ]


def _suffixes(finding: Finding | None) -> list[str]:
    """How many requests a suffix turns, and what it lowers beside neutral words."""
    if finding is None:
        return ["Strings put behind a request (adversarial suffixes) were not measured in this run."]
    turned = finding.find("suffixes", "base", "turned", "any suffix of a goal")
    if turned is None or not turned.n:
        return ["No request tried with strings behind it was refused without them, so there was nothing to turn."]
    drop, sham = (finding.find("suffixes", REFUSAL, "drop", kind) for kind in ("suffix", "sham"))
    neutral = finding.find("suffix-shams", "base", "turned", "")
    beside = f"; neutral words do so in {spelled(neutral, '%')} (n = {neutral.n})" if neutral and neutral.n else ""
    return [
        f"A string put behind the request (a suffix) makes the model answer {spelled(turned, '%')} of the requests "
        f"that it refuses without (n = {turned.n}){beside}. Those that do lower the features that serve all kinds of "
        f"harm by {spelled(drop)} of their strength (n = {_n(drop)}), as many neutral words by {spelled(sham)}."
    ]


def _words(finding: Finding | None) -> str:
    """The words that lower the features most, and by how much."""
    every = () if finding is None else finding.rows
    rows = [row for row in every if (row.method, row.metric) == (REFUSAL, "word_step") and row.n]
    most = sorted(rows, key=lambda row: -(row.estimate or 0.0))[:WORDS_SHOWN]
    if not most:
        return ""
    said = listed([f"“{name_of(row.setting)}” by {spelled(row)} (n = {row.n})" for row in most])
    return f"Of words in several suffixes these lower the features most, in shares of their strength: {said}."


def _guard(finding: Finding | None) -> Sequence[str]:
    return [MISSING] if finding is None else probes.headline(finding)


def _n(row: Row | None) -> int:
    return 0 if row is None else row.n
