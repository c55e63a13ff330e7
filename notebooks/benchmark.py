# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Do a few SAE features decide whether a chat model refuses?
#
# This is the experiment of section 4.1 of *Understanding Refusal in Language Models with Sparse Autoencoders*
# ([arXiv 2505.23556](https://arxiv.org/abs/2505.23556)), from the model to the figures: find the direction in the
# residual stream that stands for refusal, find the sparse-autoencoder (SAE) features that carry it, scale them while
# the model answers, and measure what that changes and what it costs.
#
# As it stands it runs on the testbed, a model of 1.8 million parameters that ships with the package and was trained to
# refuse: a minute or two on a laptop, no GPU, no network. Its "harmful" requests and its answers are placeholder prose
# of a grammar; nothing in them can be acted upon.
#
# `benchmark.py` is what you edit; `make notebook` builds `benchmark.ipynb` from it. The notebook is kept without
# outputs: they would differ in the last digits from machine to machine, and with a real model they would hold what it
# answers to harmful requests.

# %%
from pathlib import Path

import pandas
from IPython.display import DisplayHandle, Image, Markdown, display
from transformers.utils import logging

import refusalscope as rs
from refusalscope.evals import rules
from refusalscope.pipeline import fit, measure, select

logging.disable_progress_bar()

# %% [markdown]
# ## Which model
#
# The one cell to change. For a real model:
#
# - `MODEL` is a preset (`refusalscope models` lists them: `"gemma-2-2b"`, `"llama-3.1-8b"`, ...) or a Hugging Face
#   repository or folder, then with `sae_release=` or `saes=` among the options. The weights and SAEs are fetched once.
# - `LIMIT = 100` prompts per data set is what the paper takes; the first run fetches the prompts as well.
# - Refusal by phrase, which is all that is scored below, does not say whether an answer is *harmful*. Let judges that
#   the field knows read the finished folder, for instance `refusalscope judge RUN --judge harmbench`, once the model
#   has left memory. Their figures are drawn like those below, from `findings/safety.json`.
#
# Everything made is kept in `FOLDER`. Run the notebook again, or after it was stopped, and what is there is read. Other
# options need another folder: name it after them.

# %%
MODEL = "testbed"
LIMIT = 30
FOLDER = Path("runs") / f"{MODEL}-{LIMIT}".replace("/", "-")

options = rs.Options(
    model=MODEL,
    limit=LIMIT,
    methods=("cosine+attribution", "cosine", "activation-difference", "random"),
    factors=(0.0, -1.0, -3.0),
)
status = DisplayHandle()
status.display(Markdown("Starting."))
job = rs.Job(options, FOLDER, lambda what, done, total: status.update(Markdown(f"{what}: {done} of {total}")))

# %% [markdown]
# ## The model and its prompts
#
# Prompts come in splits that cannot overlap: the direction and the features are fitted on `train`, strengths are chosen
# on `validation`, and everything reported is measured on the evaluation sets. *Look-alikes* share the words of harmful
# requests and are harmless ("kill a frozen process"): a method that merely blinds the model to words fails there.

# %%
sets = {**job.sets.fitting, **job.sets.evaluation}
display(pandas.DataFrame([(name, len(rows), rows[0].label) for name, rows in sets.items()], columns=["set", "n", "is"]))
harmful = next(rows for rows in job.sets.evaluation.values() if rows[0].label == "harmful")

# %% [markdown]
# Two of the harmful requests, as the model is given them, and how it begins its answer. A verdict is a rule with a
# reason, so that it can be checked by reading.

# %%
asked = job.model.answer_tokens(harmful[:2])


def verdicts(answers):
    """One line an answer: how it begins, whether that is a refusal, and why the judge says so."""
    judged = [(answer, rules.refused_by_phrase(answer.text)) for answer in answers]
    lines = [(answer.text[:60], bool(verdict.score), verdict.reason) for answer, verdict in judged]
    return pandas.DataFrame(lines, columns=["begins", "refused", "because"])


display(verdicts(job.model.generate(asked, max_new_tokens=job.max_new_tokens)))

# %% [markdown]
# ## The refusal direction
#
# At the last position of the prompt, the mean residual of harmful requests minus that of harmless ones (Arditi et al.
# 2024), one candidate a layer. On validation prompts a good one makes refusal vanish when it is removed everywhere and
# appear when it is added at its own layer, and leaves harmless prompts alone. Scores are the log-odds that the first
# token begins a refusal: `removed` should be low, `added` high, `kl` (in nats, on harmless prompts) small.
#
# A stage is one function of the package, the same that `refusalscope run` calls; `job.run` repeats it with half the
# batch should memory run out.

# %%
fitted = job.run(fit.fit)
scores = pandas.DataFrame(fitted.direction.scores)[["layer", "removed", "added", "kl"]].set_index("layer")
display(Markdown(f"Used: the direction of layer {fitted.direction.layer}."), scores.round(3))

# %% [markdown]
# ## Feature sets
#
# Of each layer's SAE, the features whose decoder rows point most along the direction are candidates; among those, the
# 20 with the largest attribution of refusal (integrated gradients from the clean run to the one with the direction
# removed) are the paper's set, `cosine+attribution`. It is compared with the two simpler choices, cosine alone and the
# difference of activations, and with random features matched by layer and mean activation, three draws.

# %%
chosen = job.run(lambda job: select.choose_features(job, fitted))
table = pandas.DataFrame(job.store.read("features/table.json", dict)["rows"])
table["promotes"] = table["promoted"].map(lambda tokens: " ".join(map(repr, tokens[:4])))
display(table[table["method"] == "cosine+attribution"][["rank", "layer", "index", "score", "promotes"]].head(10))

# %% [markdown]
# ## One edit by hand
#
# To scale a feature by *c* is to add *(c − 1)* times its activation times its decoder row to the residual stream, at
# every position, in the prompt and while answering. What the SAE does not reconstruct stays as it is. With 20 features
# silenced (*c* = 0) the two requests from above are answered; the paper goes further, to −3 for Gemma and −1 for Llama.

# %%
edit = rs.ScaleFeatures(chosen.sets["cosine+attribution"], 0.0)
made = rs.editor(edit, layers=len(job.model.layers), slices=chosen.slices)
display(verdicts(job.model.generate(asked, edits=made.edits, max_new_tokens=job.max_new_tokens)))

# %% [markdown]
# ## All methods, all data sets
#
# The same for every set, for the direction removed (the upper reference) and for random features (the control). Each
# set's factor *c* is the one under which most *validation* prompts are answered coherently. This is the long step; it
# also measures costs and tries to induce refusal, which the next sections show.

# %%
finding = job.run(lambda job: measure.run_benchmark(job, fitted, chosen))
drawn = rs.plots(finding)


def show(start):
    """The figures whose name starts so, and what they say."""
    for plot in (plot for name, plot in drawn.items() if name.startswith(start)):
        display(Image(rs.render(plot.figure, "png"), width=520), Markdown(plot.caption))


rows = pandas.DataFrame(finding.rows)
rows["95%"] = [f"{row.estimate:.3f} [{row.low:.3f}, {row.high:.3f}]" if row.n else "" for row in finding.rows]


def numbers(dataset, metrics, settings="base|remove|scale.* k=20( mean)?"):
    """Estimates with their intervals: an edit a line, a metric a column."""
    named = rows["setting"].replace("", "base").str.fullmatch(settings) & ~rows["method"].str.contains(" vs ")
    some = rows[named & (rows["dataset"] == dataset) & rows["metric"].isin(metrics)]
    lines = some.set_index(["method", "setting", "metric"])["95%"].unstack("metric", sort=False, fill_value="")
    return lines[list(metrics)]


display(numbers(harmful.name, ("refused", "answered", "refused_change")))

# %% [markdown]
# Shares of prompts come with Wilson's interval, changes against the unedited model with a paired one; requests that
# share an intent count as one draw. `answered` is fluent and not refused, neither correct nor harmful.

# %%
show("benchmark-refused")
show("benchmark-answered")

# %% [markdown]
# On the testbed the grammar that made a request also knows what an answer to it looks like, so there "did what was
# asked" is a truth and not a guess. It tells apart what "answered" cannot: an edit may stop the refusal and leave a
# fluent answer to something else.

# %%
show("benchmark-complied")

# %% [markdown]
# Whether one method beats another is a paired question, prompt by prompt. An interval that holds 0 shows no difference.

# %%
pairs = rows[rows["method"].str.contains(" vs ") & (rows["dataset"] == harmful.name)]
display(pairs.pivot(index="method", columns="metric", values="95%"))

# %% [markdown]
# ## What it costs
#
# Read on the unedited model's own answers to harmless prompts, in nats per token: how much less likely they become
# (`cross_entropy_change`), and how far the predictions move (`kl`). Less refusal is not worth much where the model has
# forgotten how to answer.

# %%
harmless = rows[rows["metric"] == "kl"]["dataset"].iloc[0]
display(numbers(harmless, ("cross_entropy_change", "kl")))
show("benchmark-cost")

# %% [markdown]
# ## The other way round: inducing refusal
#
# If these features mediate refusal, holding them at a high value should make the model refuse harmless prompts. It is
# only evidence while the answers stay coherent: a refusal phrase in broken text is not a refusal. The values tried are
# shares of the features' mean largest activation on harmful prompts. For comparison, the direction added.

# %%
show("benchmark-induced")

# %% [markdown]
# ## What it means, on the testbed
#
# - **The features mediate refusal here.** Scaling 20 of more than 8000 features stops it as thoroughly as removing the
#   direction; matched random features leave it. Look-alikes and harmless prompts are answered as before.
# - **How they are chosen shows in what is left, not in refusal.** Every set stops refusal. What was asked being done,
#   and the costs, tell them apart: chosen by their cosine, features leave the model nearly as it was; the difference of
#   activations also picks features that carry what is asked, and the answers miss the request.
# - **Induction fails here, which is a result too.** Setting features moves the text out of what the model can say
#   before it refuses coherently. Where refusals rise, look at the coherent share below before believing them.
# - **It is a model organism.** The method works where the truth is known; what holds in a real model is for that model
#   to show. Change the cell at the top.
#
# With 30 prompts a set, intervals are wide: the report of `refusalscope run testbed` takes 150, and with `--full` every
# method, unseen wordings and attacks. `refusalscope plot FOLDER` writes these figures for papers; `refusalscope judge`
# adds judges to this very folder without answering anything again.

# %%
measure.describe_run(job, fitted)
page = measure.write_report(job.store)
job.finish()
job.close()
status.update(Markdown("Done."))
display(Markdown(f"All of it is kept in `{FOLDER}`, and `{FOLDER / page}` is a page to read."))
