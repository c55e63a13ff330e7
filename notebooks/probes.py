# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Probes that recognise harmful prompts, and a guard
#
# Section 4.4 of *Understanding Refusal in Language Models with Sparse Autoencoders* ([arXiv
# 2505.23556](https://arxiv.org/abs/2505.23556)): probes learn from plain prompts alone, and are then asked about
# adversarial ones. The paper finds that a few refusal features generalise where dense probes do not. That is contested:
# the dense figure it prints was scored on another layer's activations, its labels call a successful attack harmless,
# and others find probes on raw activations ahead. Here all of them stand in one table, under every labelling, beside
# baselines that know nothing of features.
#
# As it stands it runs on the testbed, a small model that ships with the package: two minutes on a laptop, no GPU, no
# network.
#
# `probes.py` is what you edit; `make notebook` builds `probes.ipynb` from it, which is kept without outputs.

# %%
from dataclasses import replace
from pathlib import Path

import pandas
from IPython.display import DisplayHandle, Image, Markdown, display
from transformers.utils import logging

import refusalscope as rs
from refusalscope.core.types import Prompts
from refusalscope.guard import watch
from refusalscope.pipeline import category_sets, fit, measure, probes, select
from refusalscope.pipeline.sizes import SMALL
from refusalscope.report import probes as on_probes
from refusalscope.studies.probes import ATTACKS, PAIRS

logging.disable_progress_bar()
pandas.set_option("display.max_colwidth", None)

# %% [markdown]
# ## Which model, which prompts
#
# The one cell to change. For a real model:
#
# - `MODEL` is a preset (`refusalscope models` lists them) or a Hugging Face repository or folder, then with
#   `sae_release=` or `saes=` among the options.
# - `DETECTION` is what probes learn from and are tested on. None is WildJailbreak (2000 + 2000 plain prompts to learn
#   from, 400 + 400 to choose on, 500 + 500 to test, and as many adversarial ones); a table of your own has `prompt`,
#   `adversarial`, `label`, and if you like `split` and `group`. Prompts of one group never stand in two splits, and a
#   leak in your own splits is an error.
# - `LOOK_ALIKES` are benign prompts that look harmful, such as XSTest's.
# - `POOLING` is `"last"`, the last token of the prompt, or `"max"` or `"mean"` over its instruction.
# - `CATEGORIES = None` and `K = 20` take the seven categories that the paper takes and 20 features a set, as it does,
#   and `SIZES = WHOLE` the sizes of the command line.
#
# Everything made is kept in `FOLDER`. Run the notebook again, or after it was stopped, and what is there is read.

# %%
MODEL = "testbed"
DETECTION = None
LOOK_ALIKES = None
POOLING = "last"
K = 12
CATEGORIES = ("Malware", "Physical Harm", "Fraud/Deception")
SIZES = replace(SMALL, probe_prompts=120)
FOLDER = Path("runs") / f"{MODEL}-probes".replace("/", "-")

given = {"detection": DETECTION, "look_alikes": LOOK_ALIKES, "pooling": POOLING, "paper_labels": True}
options = rs.Options(model=MODEL, k=K, categories=CATEGORIES, methods=("cosine+attribution",), **given)
status = DisplayHandle()
status.display(Markdown("Starting."))
job = rs.Job(options, FOLDER, lambda what, done, total: status.update(Markdown(f"{what}: {done} of {total}")))

# %% [markdown]
# ## Features, and every probe
#
# Features are found on plain requests alone. Then every prompt is read once, answered once, and what it shows is kept
# on disk: the residual stream at every layer, the features of the sets, and all features of one layer. Probes are
# logistic regressions on standardised inputs, their penalty chosen by folds in which no group is torn apart, and the
# difference of the class means.

# %%
fitted = job.run(fit.fit)
chosen = job.run(lambda job: select.choose_features(job, fitted))
sets = job.run(lambda job: category_sets.choose_category_sets(job, fitted, sizes=SIZES))
finding = job.run(lambda job: probes.run_probes(job, fitted, chosen, sets, sizes=SIZES))
status.update(Markdown("Done."))
display(Markdown("\n".join(f"- {note}" for note in finding.caveats)))


def table(metric, scheme, columns):
    """Estimates and 95% intervals: a line a probe, a column a comparison."""
    rows = [row for row in finding.rows if row.metric == metric and row.setting in (scheme, f"{scheme} mean") and row.n]
    shown = {}
    for row in rows:
        if row.dataset in columns:
            said = f"{row.estimate:.3f} [{row.low:.3f}, {row.high:.3f}]"
            shown.setdefault(row.method, {})[row.dataset] = said
    return pandas.DataFrame.from_dict(shown, orient="index", columns=columns)


# %% [markdown]
# ## By intent
#
# Harmful is 1, whatever came of it: what a guard needs. The negatives of each comparison stand after "vs". Plain
# prompts are easy for every probe; the question is what happens in disguises that none has seen. Look at the baselines
# first: where prompt length alone does well, a comparison says little.

# %%
table("auroc", "intent", [" vs ".join(pair) for pair in PAIRS["intent"]])


# %%
def show(*names):
    """The figures of these names that there are, and what they say."""
    drawn = rs.plots(finding)
    for plot in (drawn[name] for name in names if name in drawn):
        display(Image(rs.render(plot.figure, "png"), width=560), Markdown(plot.caption))


show("probes-auroc")

# %% [markdown]
# Every probe against the common refusal features, on the same prompts: an interval that holds 0 shows no difference,
# and p is Holm's over the column.

# %%
on_attacks = [r for r in finding.rows if r.metric == "auroc_difference" and r.dataset == " vs ".join(ATTACKS)]
pandas.DataFrame(
    [
        {"": r.method, "difference": f"{r.estimate:+.3f} [{r.low:+.3f}, {r.high:+.3f}]", "p (Holm)": f"{r.p_holm:.3f}"}
        for r in on_attacks
        if r.setting == "intent" and r.n
    ]
)

# %% [markdown]
# ## By refusal, and by the paper's labels
#
# *Refusal* asks whether this model refused: the log-odds of its refusal tokens nearly decide that by themselves. The
# paper's labels call a plain harmful prompt 1 and a successful attack 0, so whatever tells a disguised prompt from a
# plain one is rewarded.

# %%
display(table("auroc", "refusal", [" vs ".join(pair) for pair in PAIRS["refusal"]]))
display(table("auroc", "paper", [" vs ".join(pair) for pair in PAIRS["paper"]]))
display(table("accuracy", "paper", ["plain", "adversarial"]))

# %% [markdown]
# ## The guard
#
# Of the probes that plain validation prompts do not show to be worse than the best, the one that reads the fewest
# numbers. Its threshold was set on plain benign validation prompts; what it then flags of benign prompts in disguise is
# the realised rate.

# %%
display(Markdown("\n\n".join(on_probes.sentences(finding))))
show("probes-flagged", "probes-reliability", "probes-learning")

# %% [markdown]
# It is two small files, works before a token is generated, and says which features moved a score.

# %%
guard = rs.Guard.from_run(FOLDER, model=job.model)
adversarial = job.store.read("prompts/probe-adversarial.jsonl", Prompts)
shown = [row for label in ("harmful", "harmless") for row in [p for p in adversarial if p.label == label][:3]]
pandas.DataFrame(
    [
        {
            "label": row.label,
            "attack": row.details.get("family"),
            "probability": round(one.probability, 4),
            "flagged": one.flagged,
            "most of it": f"{one.reasons[0].feature} ({one.reasons[0].contribution:+.2f} logits)",
        }
        for row, one in zip(shown, guard.score([row.text for row in shown]), strict=True)
    ]
)

# %% [markdown]
# The same weights read an answer while it is written, at no further pass: one number after the prompt, and one after
# every token.

# %%
watched = watch(guard, [row.text for row in shown], max_new_tokens=16)
pandas.DataFrame(
    [[round(p, 3) for p in one.probabilities[:12]] for one in watched],
    index=[f"{row.label}, {row.details.get('family')}" for row in shown],
)

# %% [markdown]
# The same as a page, `report.html` in the run folder, and the guard for elsewhere:
# `refusalscope guard save RUN FOLDER`, then `refusalscope guard score FOLDER prompts.jsonl`.

# %%
measure.describe_run(job, fitted)
page = measure.write_report(job.store)
job.finish()
job.close()
display(Markdown(f"All of it is kept in `{FOLDER}`, and `{FOLDER / page}` is a page to read."))
