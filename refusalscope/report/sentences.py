"""A Finding in words: its numbers as a reader sees them, and the answer in two sentences.

Says what the rows say, also where the effect is absent; computes no statistic.
"""

from collections.abc import Mapping, Sequence

from refusalscope.core.types import Finding, Row
from refusalscope.report.settings import DATASET_OF_STRENGTHS, factor, part

PERCENT = (
    *("refused", "answered", "incoherent", "coherent", "complied", "refused_first_token", "refused_change"),
    *("reasoning_refused", "refused_coherently"),
    *("refused_difference", "answered_difference", "complied_difference"),
    *("smallest_change", "smallest_difference"),
    *("harmful", "harmful_change", "harmful_difference", "coherent_change", "coherent_difference"),
    *("suffices", "above_draws", "refused_coherently_difference"),
    *("usable", "share"),
    *("agreement", "both", "first_only", "second_only", "neither"),
    *("flipped", "refused_by_phrase", "size_share", "least", "non_monotone", "in_minimal", "in_own"),
    *("woken_any", "woken_any_difference", "wakes", "wakes_random"),
    *("accuracy", "accuracy_difference", "flagged_at_5%", "flagged_at_1%"),
    *("turned", "unclear", "present", "word_largest"),
    "succeeded",
)
"""Without the judge: `harmful:minos` is in per cent as `harmful` is."""

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(row: Row) -> str:
    """A row's estimate: in per cent if it is a rate or a change of one, else as it is."""
    return "not scored" if row.estimate is None else _figure(row, row.estimate)


def interval(row: Row) -> str:
    """A row's 95% interval, in the units of `number`."""
    return "" if row.low is None or row.high is None else f"[{_figure(row, row.low)}, {_figure(row, row.high)}]"


def after_holm(row: Row) -> str:
    """A comparison's p after Holm's correction; empty where the row is in no family."""
    if row.p_holm is None:
        return ""
    return (
        "p < 0.001" if row.p_holm < 0.001 else f"p = {row.p_holm:.3f}" if row.p_holm < 0.1 else f"p = {row.p_holm:.2f}"
    )


def can_show(row: Row) -> str:
    """A row of `smallest_change` or `smallest_difference` in a sentence."""
    comparisons, discordant = part(row.setting, "comparisons"), part(row.setting, "discordant")
    family = "a single comparison" if comparisons == 1 else f"Holm over {comparisons} comparisons"
    if not row.n:
        return f"{row.dataset}: too few prompts to show any difference with {family}."
    return (
        f"{row.dataset}: with n = {row.n} and {family} it takes {discordant} discordant prompts, all one way "
        f"({number(row)} points)."
    )


def _figure(row: Row, value: float) -> str:
    if row.metric.endswith("_error") and 0 < abs(value) < 0.001:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits} × 10{str(int(power)).translate(RAISED)}".replace("-", "−")
    percent = row.metric.partition(":")[0] in PERCENT
    scaled = 100 * value if percent else value
    text = f"{scaled:.1f}" if percent or abs(scaled) >= 10 else f"{scaled:.3f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def answer(finding: Finding, labels: Mapping[str, str]) -> tuple[str, ...]:
    """The finding in two sentences, from its own rows: what an edit did to refusal, and what came in its place."""
    edit = edit_row(finding, labels)
    base = finding.find(edit.dataset, "base", "refused") if edit is not None else None
    if edit is None or base is None or not (edit.n and base.n):
        return ("No harmful data set was answered and scored both with and without an edit of SAE features.",)
    scale = factor(edit.setting)
    what = f"scaling the {scale[1]} features of {edit.method} by {scale[0]:g}" if scale else f"the edit {edit.method}"
    change = finding.find(edit.dataset, edit.method, "refused_change", edit.setting)
    first = (
        f"On {edit.dataset} prompts, {what.replace('by -', 'by −')} {effect(change)}: {_said(base, '%')} are refused "
        f"before and {_said(edit, '%')} after (n = {edit.n})"
    )
    if change is not None and change.n:
        first += f", a paired change of {_said(change, ' points')}"
    answered, incoherent, complied = (
        finding.find(edit.dataset, edit.method, metric, edit.setting)
        for metric in ("answered", "incoherent", "complied")
    )
    second = f"With the edit {_said(answered, '%')} are answered coherently and {_said(incoherent, '%')} incoherently"
    if complied is not None and complied.n:
        second += f", and {_said(complied, '%')} get what they asked for"
    return f"{first}{beside(finding, edit, base)}.", f"{second}{_price(finding, edit)}."


def edit_row(finding: Finding, labels: Mapping[str, str]) -> Row | None:
    """The share of harmful prompts refused under the edit that a page is about; None where there is no such edit."""
    rows = [row for row in finding.rows if row.metric == "refused" and labels.get(row.dataset) == "harmful"]
    edits = [r for r in rows if r.dataset != DATASET_OF_STRENGTHS and r.method not in ("base", "direction", "random")]
    return next((row for row in edits if row.method == "cosine+attribution"), edits[0] if edits else None)


def spelled(row: Row | None, unit: str = "", *, missing: str = "an unmeasured share") -> str:
    """A row's estimate and interval; `missing` where there are none."""
    return missing if row is None or not row.n else f"{number(row)}{unit} {interval(row)}"


def listed(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _said(row: Row | None, unit: str = "") -> str:
    return spelled(row, unit, missing="an unscored share")


def effect(change: Row | None) -> str:
    """What a paired change of refusal comes to, as a verb."""
    if change is None or change.low is None or change.high is None:
        return "was not compared with the unedited model prompt by prompt"
    if change.low <= 0 <= change.high:
        return "does not measurably change refusal"
    return "lowers refusal" if change.high < 0 else "raises refusal"


def beside(finding: Finding, edit: Row, base: Row) -> str:
    """What random features and the direction itself do to the same prompts, and whether the effect is specific."""
    random = finding.find(edit.dataset, "random", "refused", f"{edit.setting} mean")
    removed = finding.find(edit.dataset, "direction", "refused", "remove")
    text = ""
    if random is not None and random.n:
        text = f"; matched random features leave {_said(random, '%')} refused"
        if _overlap(random, edit):
            text += ", so no effect specific to the chosen features is shown"
        elif not _overlap(random, base):
            text += ", so part of the effect is not specific to the chosen features"
    if removed is not None and removed.n:
        text += f"; removing the refusal direction leaves {_said(removed, '%')}"
    return text


def _overlap(one: Row, other: Row) -> bool:
    """Whether two intervals share a point; unscored rows share everything."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return True
    return one.low <= other.high and other.low <= one.high


def _price(finding: Finding, edit: Row) -> str:
    """What the same edit does where nothing was to be changed."""
    arm = (edit.method, "cross_entropy_change", edit.setting)
    cost = next((row for row in finding.rows if (row.method, row.metric, row.setting) == arm and row.n), None)
    if cost is None:
        return ""
    text = f"; on {cost.dataset} prompts it changes cross-entropy by {_said(cost)} nats per token"
    before = finding.find(cost.dataset, "base", "complied")
    after = finding.find(cost.dataset, edit.method, "complied", edit.setting)
    if before is None or after is None or not (before.n and after.n):
        return text
    return f"{text}, and {_said(after, '%')} instead of {_said(before, '%')} get what they asked for"
