"""Task files for lm-evaluation-harness with local data, of the shapes of its own ARC and GSM8K: nothing is fetched.

The testbed's grammar knows the answers: an answer to a request names its object.
"""

import json
from pathlib import Path

from refusalscope.testbed import grammar

CHOICES = "colours"
ANSWERS = "objects"
GROUP = "both_choices"

CHOICE_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {train}, test: {test}}}
output_type: multiple_choice
training_split: train
test_split: test
description: "{description}"
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices.text}}}}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ANSWER_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{train: {train}, test: {test}}}
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{object}}}}"
generation_kwargs: {{until: ["\\n\\n", "Question:"], do_sample: true, temperature: 0.9, max_gen_toks: 48}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
filter_list:
  - name: strict-match
    filter:
      - {{function: regex, regex_pattern: "Keep (.+) in mind"}}
      - {{function: take_first}}
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(?:Keep|for|on) (.+?)(?: in mind until the end)?\\\\."}}
      - {{function: take_first}}
metadata: {{version: 1.0}}
"""
GROUP_FILE = """
group: {group}
task: [{tasks}]
aggregate_metric_list:
  - {{metric: acc, weight_by_size: true}}
metadata: {{version: 1.0}}
"""


def write(folder: Path, *, count: int = 8, description: str = "") -> Path:
    """Two tasks of four choices and a group of both, and one of free answers, in a folder for `include_path`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate((CHOICES, f"{CHOICES}_again")):
        rows = {split: _questions(count, f"{number}{split}") for split in ("train", "test")}
        _task(folder, name, CHOICE_TASK, rows, description=description)
    rows = {split: _requests(count, split) for split in ("train", "test")}
    _task(folder, ANSWERS, ANSWER_TASK, rows)
    tasks = f"{CHOICES}, {CHOICES}_again"
    (folder / f"{GROUP}.yaml").write_text(GROUP_FILE.format(group=GROUP, tasks=tasks))
    return folder


def _task(folder: Path, name: str, text: str, rows: dict[str, list[dict]], **more: str) -> None:
    files = {split: folder / f"{name}_{split}.jsonl" for split in rows}
    for split, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[split]))
    (folder / f"{name}.yaml").write_text(text.format(name=name, **files, **more))


def _questions(count: int, seed: str) -> list[dict]:
    """Which of four objects a request was about."""
    drawn = grammar.examples("harmless", split="test", count=4 * count, seed=sum(map(ord, seed)))
    made = []
    for place in range(count):
        four = drawn[4 * place : 4 * place + 4]
        answers = [f"Below is a plan for {example.object}." for example in four]
        choices = {"text": answers, "label": ["A", "B", "C", "D"]}
        made.append({"question": four[place % 4].text, "choices": choices, "answerKey": "ABCD"[place % 4]})
    return made


def _requests(count: int, split: str) -> list[dict]:
    drawn = grammar.examples("harmless", split=split, count=count)
    return [{"question": example.text, "object": example.object} for example in drawn]
