"""lm-evaluation-harness as an instrument: its tasks on the edited model, document by document.

The harness is handed the model itself, edits attached, so any of its tasks runs under any edit that is the same at all
positions. What it would print, log and seed for the whole process stays inside.
"""

import hashlib
import io
import logging
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from refusalscope.core.types import SaeSlice
from refusalscope.inputs.chat import ChatModel
from refusalscope.mechanism.interventions import Intervention, check_everywhere, editor

Progress = Callable[[str, int, int], None]
SEED = 1234
"""Of few-shot examples and of tasks that shuffle their documents, so that every edit sees the same."""
ANSWERED = "generate_until"
SCORED = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class Task:
    """What was asked for by one name: one task, or a group whose tasks are scored together."""

    name: str
    parts: Mapping[str, Any]
    """The harness's own task objects by name."""


def package_version() -> str:
    """The harness's version. Raises ValueError, one line, where it is not installed."""
    if find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed: pip install 'refusalscope[capability]'")
    return version("lm_eval")


def load(names: Sequence[str], *, include_path: Path | None = None, num_fewshot: int | None = None) -> list[Task]:
    """The harness's tasks of these names, their data at hand; a tag, or a group without a score, is its tasks.

    So is a group whose score weights any metric by anything but size: over its documents it would be another score.
    `include_path` holds task files of one's own. `num_fewshot` overrides what tasks ask for, but never a 0. Raises
    ValueError, one line, for an unknown name, data that cannot be had, or a task that is not asked as a chat.
    """
    package_version()
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path {include_path} is no folder: it holds task files (YAML)")
    with _contained("cpu"):
        manager = _manager(names, include_path)
    loaded = [task for name in names for task in _load(manager, name)]
    for task in loaded:
        for part in task.parts.values():
            _check(part)
            asked = part.get_config("num_fewshot")
            if num_fewshot is not None and asked != 0:
                part.set_config(key="num_fewshot", value=num_fewshot)
            elif asked is None:
                part.set_config(key="num_fewshot", value=0)
    return loaded


def measure(
    model: ChatModel,
    task: Task,
    intervention: Intervention | None,
    *,
    slices: Mapping[int, SaeSlice] | None = None,
    batch_size: int,
    limit: int | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """A task under an intervention, as plain data.

    `documents`: of every document (the first `limit` of each part) its `id`, the `part` it is of, each metric's
    `values` (one number, or several) and the `responses`: log-likelihoods in nats, or texts. `left_out`: metrics that
    have no value per document. `shortened`: requests longer than the model's context, which lost their beginning.
    `changed`: positions whose residual the edit really changed, summed over layers and requests.
    Raises ValueError, one line, for an intervention that needs a chat's roles or prompts.
    """
    from lm_eval.evaluator import evaluate

    from refusalscope.evals.harness_model import HarnessModel

    check_everywhere(intervention)
    made = editor(intervention, layers=len(model.layers), slices=slices)
    asks_for_text = all(part.OUTPUT_TYPE == ANSWERED for part in task.parts.values())
    with _contained(model.device) as stderr:
        wrapped = HarnessModel(model, batch_size=batch_size, stderr=stderr, progress=progress)
        wrapped.thinking = model.template.style.thinking if asks_for_text else "off"
        for part in task.parts.values():
            _check_room(part, wrapped)
            part.set_fewshot_seed(seed=SEED)
        with model.edited(made.edits):
            found: Any = evaluate(
                lm=wrapped,
                task_dict={"tasks": dict(task.parts), "groups": {}},
                limit=limit,
                bootstrap_iters=0,
                system_instruction=model.template.style.system,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
            )
    documents, left_out = _documents(task, found["samples"])
    return {
        "task": task.name,
        "documents": documents,
        "left_out": left_out,
        "shortened": wrapped.shortened,
        "changed": made.changed,
    }


def digest(folder: Path | None) -> str:
    """SHA-256 over all files of a folder, names included; empty for None."""
    if folder is None:
        return ""
    made = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        made.update(
            f"{file.relative_to(folder).as_posix()}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return made.hexdigest()


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """The harness's index of tasks: one's own alone where that is enough, since reading all of its own takes long."""
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=include_path, include_defaults=False)
    manager = own if set(names) <= set(own.all_tasks) else TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "see `lm_eval ls tasks`, or give --include-path"
            raise ValueError(f"there is no task {name!r}: {hint}")
    return manager


def _load(manager: Any, name: str) -> list[Task]:
    try:
        # Seeds of its own: what a task draws while it is loaded is the same whatever was loaded before.
        with _contained("cpu"):
            loaded = manager.load([name])
    except Exception as error:  # a task's files may fail in any way, its data by any library's own error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the task {name} cannot be loaded: {reason}") from error
    group = loaded["groups"].get(name)
    if group is not None and group.has_aggregation and all(one.weight_by_size for one in group.aggregate_metric_list):
        return [Task(name, loaded["tasks"])]
    return [Task(own, {own: part}) for own, part in loaded["tasks"].items()]


def _check(part: Any) -> None:
    if part.OUTPUT_TYPE not in (ANSWERED, *SCORED):
        raise ValueError(
            f"the task {part.task_name} scores raw text, not answers to a chat ({part.OUTPUT_TYPE}): for "
            "cross-entropy on text give --documents"
        )


def _check_room(part: Any, wrapped: Any) -> None:
    if part.OUTPUT_TYPE == ANSWERED:
        from lm_eval.models.utils import normalize_gen_kwargs

        settings: Any = normalize_gen_kwargs(part.get_config("generation_kwargs"), wrapped.max_gen_toks)
        longest = settings["max_gen_toks"]
        if longest >= wrapped.max_length:
            raise ValueError(
                f"the task {part.task_name} asks for answers of {longest} tokens, but {wrapped.chat.name} has a "
                f"context of {wrapped.max_length}: leave it out"
            )


def _documents(
    task: Task, samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """One entry a document, its values under all filters together; and the metrics that cannot be one's own."""
    documents: dict[str, dict[str, Any]] = {}
    left_out: set[str] = set()
    for name, part in task.parts.items():
        for sample in samples[name]:
            identity = f"{name}/{sample['doc_id']}/{sample['doc_hash'][:8]}"
            made = documents.setdefault(identity, {"id": identity, "part": name, "values": {}, "responses": []})
            made["responses"] = [_response(answers[0]) for answers in sample["resps"]]
            for metric in sample["metrics"]:
                label = metric if sample["filter"] == "none" else f"{metric}:{sample['filter']}"
                values = _values(sample[metric], part.aggregation().get(metric))
                if values is None:
                    left_out.add(label)
                else:
                    made["values"][label] = values
    return list(documents.values()), sorted(left_out)


def _response(answer: Any) -> str | float | None:
    """A text, or the log-likelihood of a continuation; None where that is no finite number."""
    if isinstance(answer, str):
        return answer
    return float(answer[0]) if math.isfinite(answer[0]) else None


def _values(value: Any, aggregation: Any) -> list[float] | None:
    """A document's own numbers, if the task's is a mean of them; several where several things are asked of it."""
    from lm_eval.api.metrics import mean, nanmean

    if isinstance(value, (list, tuple)) and value and all(isinstance(item, bool) for item in value):
        return [float(item) for item in value]
    if isinstance(value, (Real, np.bool_)) and aggregation in (mean, nanmean):
        return [float(value)]
    return None


@contextmanager
def _contained(device: torch.device | str) -> Iterator[TextIO]:
    """Nothing printed or logged, and seeds that are gone afterwards. Gives standard error as it was before."""
    logger, sink, stderr = logging.getLogger("lm_eval"), io.StringIO(), sys.stderr
    level, python, numpy = logger.level, random.getstate(), np.random.get_state()
    cards = [device] if torch.device(device).type == "cuda" else []
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(devices=cards), redirect_stdout(sink), redirect_stderr(sink):
            random.seed(SEED)
            np.random.seed(SEED)
            torch.manual_seed(SEED)
            yield stderr
    finally:
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)
