"""Proofs on a few prompts, before hours are spent: is everything as it must be that a run of this model rests on?

One check a line, the cheap ones first. What rests on a line that failed is not checked and says so; all else is.
Nothing is written. What cannot even be tried (an unknown model, an option out of range) is a ValueError.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from refusalscope.core.memory import is_out_of_memory
from refusalscope.core.types import Feature, FeatureSet, LayerScores
from refusalscope.evals import health
from refusalscope.inputs.chat import Edits
from refusalscope.inputs.template import SENTINEL, NotOneBos, Role
from refusalscope.mechanism.direction import NoDirection, find, find_refusal_tokens, first_tokens
from refusalscope.mechanism.interventions import ScaleFeatures, editor
from refusalscope.pipeline import fit, pace, workload
from refusalscope.pipeline.job import Job, Progress
from refusalscope.pipeline.options import Options
from refusalscope.pipeline.patient import FAILED, NOT_CHECKED, OK, WARNING, Patient, Verdict, is_refusal, listed

MEMORY, TEMPLATE, BOS, ROLES = "memory", "chat template", "exactly one BOS", "roles"
SAES, IDENTITY, TOKENS, KEPT = "SAE width and site", "identity edit", "refusal tokens", "SAE reconstruction"
DIRECTION, TIME = "refusal direction", "expected time"
NOWHERE = Path(os.devnull) / "doctor"
"""The run folder of a job that writes nothing."""
EXPLAINED = 0.7
"""Variance explained below which a layer's SAE is warned of; of its own kind of text a trained one keeps .8 to .99."""


class Check(NamedTuple):
    """One line."""

    do: Callable[[Patient], Verdict]
    needs: tuple[str, ...] = ()
    """The lines that must not have failed."""


def examine(options: Options, progress: Progress = lambda *_: None) -> Iterator[Verdict]:
    """Every line in turn, as soon as it is known. Raises ValueError, one line, for what cannot be tried at all."""
    with closing(Job(options, NOWHERE, progress)) as job:
        yield from verdicts(Patient(job))


def verdicts(patient: Patient) -> Iterator[Verdict]:
    """Each check's verdict, or that it rests on a line that failed."""
    roots: dict[str, str] = {}
    for line, check in CHECKS.items():
        lacking = next((roots[need] for need in check.needs if need in roots), None)
        if lacking is None:
            verdict = _tried(check, line, patient)
        else:
            verdict = Verdict(NOT_CHECKED, line, f"rests on what failed above: {lacking}")
        if verdict.word in (FAILED, NOT_CHECKED):
            roots[line] = lacking or line
        yield verdict


def _tried(check: Check, line: str, patient: Patient) -> Verdict:
    try:
        return check.do(patient)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    remedies = "a smaller --batch-size, --dtype bfloat16, --quantize 8bit, or another --device"
    return Verdict(FAILED, line, f"out of memory: try {remedies}")


def check_memory(patient: Patient) -> Verdict:
    """What a run will hold in memory, planned before weights are read; what keeps it from being planned fails below."""
    # What is wrong with these is bad input.
    _ = patient.asked, patient.job.described
    try:
        plan = patient.job.plan
    except ValueError as error:
        return Verdict(NOT_CHECKED, MEMORY, f"cannot be planned: {error}")
    assert plan is not None, "a job that writes nothing never has a folder that is begun"
    first, *more = plan.lines()
    word = OK if plan.fits else WARNING
    return Verdict(word, MEMORY, first.removeprefix("memory for "), tuple(line.strip() for line in more))


def check_template(patient: Patient) -> Verdict:
    """The template renders every prompt, the user's text once and unaltered."""
    asked = patient.asked
    try:
        template = patient.job.template
        frame = template.render([{"role": "user", "content": SENTINEL}])
        for prompt in asked:
            rendered = template.render([{"role": "user", "content": prompt.text}])
            if rendered not in {frame.replace(SENTINEL, text) for text in (prompt.text, prompt.text.strip())}:
                raise ValueError(f"the chat template of {template.name} alters the user's text {prompt.text[:60]!r}")
            template.encode(prompt.text)
    except NotOneBos:
        pass  # a line of its own
    except ValueError as error:
        return Verdict(FAILED, TEMPLATE, str(error))
    about = ", ".join(f"{name} {value}" for name, value in patient.job.template.about.items())
    found = f"renders {len(asked)} prompts, the user's text once in each"
    return Verdict(OK, TEMPLATE, f"{found} ({about})" if about else found)


def check_bos(patient: Patient) -> Verdict:
    """Every chat opens with the one BOS, or with none where the tokenizer adds none."""
    template, tokenizer = patient.job.template, patient.job.described.tokenizer
    try:
        chats = [template.encode(prompt.text).ids for prompt in patient.asked]
        opening = template.opening
    except NotOneBos as error:
        return Verdict(FAILED, BOS, str(error))
    if not opening:
        return Verdict(OK, BOS, "chats of this model have none: neither template nor tokenizer writes one")
    shown = repr(tokenizer.decode(opening))
    if wrong := sum(ids[:1] != opening or ids[1:2] == opening for ids in chats):
        return Verdict(FAILED, BOS, f"{wrong} of {len(chats)} chats do not open with {shown} once")
    return Verdict(OK, BOS, f"{shown} opens each of {len(chats)} chats, once")


def check_roles(patient: Patient) -> Verdict:
    """What counts as header, instruction and closing, shown on the shortest harmless prompt."""
    prompt = min((p for p in patient.asked if p.label == "harmless"), key=lambda p: len(p.text))
    ids, kinds = patient.job.template.encode(prompt.text)
    pieces = {role: [i for i, kind in zip(ids, kinds, strict=True) if kind == role] for role in list(Role)[1:4]}
    text = {role: patient.job.described.tokenizer.decode(some) for role, some in pieces.items()}
    more = tuple(f"{role.name.lower():12}{len(pieces[role]):3} tokens  {text[role]!r}" for role in pieces)
    if not pieces[Role.INSTRUCTION]:
        return Verdict(FAILED, ROLES, "no token is left for the user's text: it merges with the template's", more)
    if not pieces[Role.CLOSING]:
        return Verdict(
            WARNING, ROLES, "the template writes nothing after the user's text, not even a turn to go on", more
        )
    return Verdict(OK, ROLES, f"every token of {len(ids)} has one, on a harmless prompt", more)


def check_saes(patient: Patient) -> Verdict:
    """The SAE of every layer reads the residual stream after that layer, and has the model's width."""
    names = patient.job.target.saes.names
    faults = []
    for done, layer in enumerate(names):
        patient.job.progress("opening SAEs", done, len(names))
        try:
            patient.open(layer)
        except ValueError as error:
            faults.append(str(error))
    patient.job.saes.let_go()
    if faults:
        rest = tuple(faults[1:])
        return Verdict(FAILED, SAES, f"{faults[0]} ({len(faults)} of {len(names)} layers at fault)", rest)
    sizes = sorted({opened.size for opened in patient.opened.values()})
    unnamed = [layer for layer, opened in patient.opened.items() if opened.hook is None]
    more = [f"layers {listed(unnamed)}: their SAEs do not say which site they read"] if unnamed else []
    for note in dict.fromkeys(opened.note for opened in patient.opened.values() if opened.note):
        own = listed(layer for layer, opened in patient.opened.items() if opened.note == note)
        more.append(f"layers {own}: {note}")
    width = patient.job.described.config.hidden_size
    what = f"residual stream after layers {listed(names)}, width {width}, {listed(sizes)} features"
    return Verdict(OK, SAES, what, tuple(more))


def check_identity(patient: Patient) -> Verdict:
    """Edits that change nothing leave every logit as it is, bit for bit."""
    model = patient.model
    tokens = model.tokens(patient.chats[:2])
    layers, width = len(model.layers), tokens.ids.shape[1]

    def logits(edits: Edits) -> torch.Tensor:
        return model.run(tokens, edits=edits, logits=width).logits

    def scaled(some: Mapping[int, object]) -> Edits:
        slices = {layer: patient.opened[layer].slice for layer in some}
        features = [Feature(layer, int(i)) for layer, part in slices.items() for i in part.features]
        edit = ScaleFeatures(FeatureSet("identity", tuple(features), (0.0,) * len(features)), 1.0)
        return editor(edit, layers=layers, slices=slices).edits

    plain = logits({})
    if not torch.equal(plain, logits({layer: lambda residual, _: residual for layer in range(layers)})):
        return Verdict(FAILED, IDENTITY, "handing every layer's output on as it is changes the logits of this model")
    if not torch.equal(plain, logits(scaled(patient.opened))):
        wrong = [layer for layer in patient.opened if not torch.equal(plain, logits(scaled({layer: None})))]
        return Verdict(FAILED, IDENTITY, f"scaling features of layers {listed(wrong)} by 1 changes the logits")
    without = [layer for layer in patient.job.target.saes.names if layer not in patient.opened]
    rest = f"; SAE edits not checked at layers {listed(without)}" if without else ""
    features = f", and with SAE features of {len(patient.opened)} scaled by 1" if patient.opened else ""
    return Verdict(OK, IDENTITY, f"logits bit-equal with all {layers} layers edited to the same{features}{rest}")


def check_tokens(patient: Patient) -> Verdict:
    """The first tokens of refusals, given or found from the model's own answers."""
    job, model = patient.job, patient.model
    given = fit.token_ids(job, model.tokenizer)
    failure = ""
    for data in patient.trials:
        job.progress("refusal tokens", 0, 1)
        first = {n: first_tokens(model, getattr(data, n), batch_size=patient.batch) for n in data.__annotations__}
        try:
            tokens = tuple(given) or find_refusal_tokens(model, data, first, is_refusal)
        except NoDirection as error:
            failure = str(error)
            continue
        opened = [sum(t in tokens for t in first[n].argmax.tolist()) for n in ("harmful_train", "harmless_train")]
        shown = ", ".join(repr(text) for text in model.decode(tokens))
        counts = (
            f"{opened[0]} of {len(data.harmful_train)} harmful and {opened[1]} of {len(data.harmless_train)} harmless"
        )
        told = f"{shown} {'given' if given else 'found'}: opens the answers to {counts} train prompts"
        if not opened[0] and not job.options.keep_unrefused:
            failure = f"{told}; name another with --refusal-token"
            continue
        patient.tokens = tokens
        return Verdict(OK, TOKENS, told)
    return Verdict(FAILED, TOKENS, failure)


def check_reconstruction(patient: Patient) -> Verdict:
    """What each SAE keeps of chat prompts, and of the same texts outside any chat."""
    job, model = patient.job, patient.model
    layers = job.target.saes.names
    read = {}
    for kind, tokens in (("chats", model.tokens(patient.chats)), ("plain", model.text_tokens(patient.chats, 256))):
        inside = health.replaced("chats", tokens.roles)
        residuals = model.run(tokens, keep=layers).residuals
        read[kind] = {layer: residual[inside].float() for layer, residual in residuals.items()}
    chats, plain, seconds = {}, {}, 0.0
    for done, sae in enumerate(job.saes.each(layers)):
        job.progress("SAE reconstruction", done, len(layers))
        started, layer = time.monotonic(), sae.layer
        chats[layer], plain[layer] = (health.kept(sae, read[kind][layer]) for kind in ("chats", "plain"))
        seconds += time.monotonic() - started
    job.saes.let_go()
    patient.encoding = seconds / sum(len(some) for kind in read.values() for some in kind.values())
    more = tuple(
        f"layer {layer:2}  variance explained {kept.variance_explained:6.3f}, outside any chat "
        f"{plain[layer].variance_explained:6.3f}; L0 {kept.l0:.0f}"
        for layer, kept in chats.items()
    )
    worst = min(kept.variance_explained for kept in chats.values())
    found = f"variance explained on {len(patient.chats)} chat prompts, least of {len(layers)} layers: {worst:.3f}"
    if dead := [n for n in layers if max(chats[n].variance_explained, plain[n].variance_explained) <= 0]:
        cause = f"SAEs of layers {listed(dead)} explain nothing, in chats or outside: untrained, or another model's"
        return Verdict(FAILED, KEPT, f"{found}; {cause}", more)
    doubts = _doubts(patient, {n: k.variance_explained for n, k in chats.items()}, plain)
    return Verdict(WARNING if doubts else OK, KEPT, "; ".join([found, *doubts]), more)


def _doubts(patient: Patient, chats: Mapping[int, float], plain: Mapping[int, health.Kept]) -> list[str]:
    """Which layers keep too little of chats, and whose SAEs these are where they are not this model's."""
    found = []
    if low := [layer for layer, explained in chats.items() if explained < EXPLAINED]:
        found.append(f"below {EXPLAINED:g} at layers {listed(low)}")
        if all(plain[layer].variance_explained >= EXPLAINED for layer in low):
            found.append("outside any chat they keep enough: as SAEs do that were trained on a base model's text")
    if others := patient.trained_elsewhere():
        found.append(f"trained on {', '.join(others)}, by what they say of themselves")
    return found


def check_direction(patient: Patient) -> Verdict:
    """The direction's layer and its scores on validation prompts."""
    job, failure = patient.job, ""
    for data in patient.trials:
        try:
            found = find(
                patient.model,
                data,
                batch_size=patient.batch,
                is_refusal=is_refusal,
                refusal_tokens=patient.tokens,
                best_layer=job.best_layer,
                keep_unrefused=job.options.keep_unrefused,
                published=job.options.protocol == "paper",
                progress=job.progress,
            )
        except NoDirection as error:
            failure = str(error)
            continue
        scores = next(score for score in found.scores if score.layer == found.layer)
        told = f"layer {found.layer} {'chosen' if job.best_layer is None else 'given'}: {_told(scores)}"
        if scores.added <= 0:
            return Verdict(WARNING, DIRECTION, f"{told}; adding it does not make the model refuse", found.caveats[1:])
        return Verdict(OK, DIRECTION, told, found.caveats[1:])
    return Verdict(FAILED, DIRECTION, failure)


def _told(scores: LayerScores) -> str:
    return (
        f"removing it costs a KL of {scores.kl:.3f} nats on harmless prompts and leaves log-odds of refusal of "
        f"{scores.removed:+.1f} on harmful ones, adding it brings {scores.added:+.1f} on harmless ones"
    )


def check_time(patient: Patient) -> Verdict:
    """How long `run` with these options will take here, from this model's pace on a few prompts."""
    measured = pace.measure(patient)
    work = workload.counted(patient.job, len(patient.model.layers))
    minutes = pace.seconds(work, measured) / 60
    told = f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} hours"
    what = "the whole `run` with these options: its parts, and at what pace"
    return Verdict(OK, TIME, f"about {told} for {what}", pace.told(work, measured))


CHECKS: Mapping[str, Check] = {
    MEMORY: Check(check_memory),
    TEMPLATE: Check(check_template),
    BOS: Check(check_bos, (TEMPLATE,)),
    ROLES: Check(check_roles, (BOS,)),
    SAES: Check(check_saes),
    IDENTITY: Check(check_identity, (BOS,)),
    TOKENS: Check(check_tokens, (BOS,)),
    KEPT: Check(check_reconstruction, (BOS, SAES)),
    DIRECTION: Check(check_direction, (TOKENS,)),
    TIME: Check(check_time, (BOS,)),
}
"""In the order of the lines: what needs no weights first."""
