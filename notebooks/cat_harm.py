# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Is there one refusal, or one for every kind of harm?
#
# This is section 4.2 of *Understanding Refusal in Language Models with Sparse Autoencoders* ([arXiv
# 2505.23556](https://arxiv.org/abs/2505.23556)): every category of harm gets its own direction and its own set of SAE
# features. Some features are in all sets (*common*, the paper's F_R), the rest of each set belongs to a few categories
# or to one (*specific*, F_H). Do the specific ones act on their own category alone, and do they work by way of the
# common ones? At the end stands a second question, from *Beyond I'm Sorry, I Can't* ([arXiv
# 2509.09708](https://arxiv.org/abs/2509.09708)): how few features have to fall silent before a prompt is answered, and
# do others then wake up?
#
# As it stands it runs on the testbed, a small model that ships with the package: a few minutes on a laptop, no GPU, no
# network. Its "harmful" requests are placeholder prose of a grammar. Read `benchmark.ipynb` first: what a direction, a
# feature set and an edit are is shown there.
#
# `cat_harm.py` is what you edit; `make notebook` builds `cat_harm.ipynb` from it, which is kept without outputs. No
# answer of the model is shown.

# %%
from pathlib import Path

import pandas
from IPython.display import DisplayHandle, Image, Markdown, display
from transformers.utils import logging

import refusalscope as rs
from refusalscope.pipeline import categories, category_sets, fit, graph, measure, minimal, select
from refusalscope.report import categories as on_categories
from refusalscope.report import graph as on_graph
from refusalscope.report import minimal as on_minimal
from refusalscope.report.network import GRAPH, network

logging.disable_progress_bar()

# %% [markdown]
# ## Which model
#
# The one cell to change. For a real model:
#
# - `MODEL` is a preset (`refusalscope models` lists them: `"gemma-2-2b"`, `"llama-3.1-8b"`, ...) or a Hugging Face
#   repository or folder, then with `sae_release=` or `saes=` among the options.
# - Its requests are those of [CATQA](https://huggingface.co/datasets/declare-lab/CategoricalHarmfulQA), fetched once:
#   the published seven of its eleven categories, in English, with `CATEGORIES = None`. `category_prompts=` names a file
#   of your own, `language="zh"` or `"vi"` another language.
# - `LIMIT = None` takes as many prompts as the paper: 50 of each category, three fifths to fit on, the rest to test.
# - `K = 20` features a set is the paper's size, `NODES = 20` what `refusalscope categories` draws in the graph.
# - All edits scale by one factor: the published one where the preset has it (−3 for Gemma 2 2B, −1 for Llama 3.1 8B),
#   else 0; `factors=(-1.0,)` says otherwise.
#
# Everything made is kept in `FOLDER`. Run the notebook again, or after it was stopped, and what is there is read;
# `wildjailbreak.ipynb` goes on in the same folder with the same features. Other options need another folder.

# %%
MODEL = "testbed"
LIMIT = 12
K = 12
CATEGORIES = ("Malware", "Physical Harm", "Fraud/Deception")
NODES = 16
FOLDER = Path("runs") / f"{MODEL}-studies".replace("/", "-")

methods = ("cosine+attribution",)
options = rs.Options(model=MODEL, limit=LIMIT, k=K, categories=CATEGORIES, methods=methods, nodes=NODES)
status = DisplayHandle()
status.display(Markdown("Starting."))
job = rs.Job(options, FOLDER, lambda what, done, total: status.update(Markdown(f"{what}: {done} of {total}")))

# %% [markdown]
# ## A set for every category
#
# The run's direction says at which layer to look; there each category gets a direction from its own refused requests,
# an attribution along it, and its `K` best features. The tests below use prompts that none of this has seen.

# %%
fitted = job.run(fit.fit)
sets = job.run(lambda job: category_sets.choose_category_sets(job, fitted))
parts = {
    "fitted on": sets.prompts.train,
    "tested on": sets.prompts.test,
    "specific": sets.specific,
    "exclusive": sets.exclusive,
}
display(pandas.DataFrame({part: {name: len(of[name]) for name in sets.whole} for part, of in parts.items()}))
display(Markdown(f"**{len(sets.common)}** features are common to all; subsets compared hold **{sets.size}** each."))

# %% [markdown]
# ## Who shares what
#
# One function measures every edit on every category; its figures follow one by one. This is a long step: next to each
# set stand those of the other categories and 20 random ones.

# %%
finding = job.run(lambda job: categories.run_categories(job, fitted, sets))
drawn = rs.plots(finding)


def show(plots, *names):
    """The figures of these names that there are, and what they say."""
    for plot in (plots[name] for name in names if name in plots):
        display(Image(rs.render(plot.figure, "png"), width=560), Markdown(plot.caption))


def numbers(finding, metrics, methods):
    """Estimates with their intervals: a line a data set and edit, a column a metric; single random draws left out."""
    lines = {}
    for row in finding.rows:
        if row.metric in metrics and row.method in methods and row.n and " draw=" not in row.setting:
            text = f"{row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}]"
            lines.setdefault((row.dataset, row.method, row.setting), {})[row.metric] = text
    return pandas.DataFrame(lines).T.fillna("")


matrix = job.store.read(on_categories.MATRIX, dict)
display(Markdown("\n\n".join(on_categories.sentences(finding, matrix))))

# %% [markdown]
# Overlap says how alike two categories' sets are. It is all or nothing: a feature of rank `K` is in, the next is out.
# The shares below do without that edge: in what part of a category's prompts is the feature in the prompt's *own* top
# set? A common feature is bright from left to right, one that serves a single harm in one column alone.

# %%
show(drawn, "categories-overlap", "categories-shares")

# %% [markdown]
# ## Does a category's set act on its own category?
#
# Sets are scaled on held-out requests of each category. Two read-outs are given, always:
#
# - the change of *m*, the logit of an answer's first token minus that of a refusal's, in logits. It does not saturate.
# - rates of answers, as in the paper, and its normalised drop: of refusal under the subset, over that under the whole
#   set. Rates saturate: when every set stops every refusal, they tell nothing apart.
#
# In each row of the matrix one category's specific features are scaled, the common ones *held* at what they were, so
# that what is seen does not run through them. Compare within a column, which is about the same requests: brightest on
# the diagonal means that a set acts on its own harm most.

# %%
show(drawn, "categories-transfer")
display(numbers(finding, ("metric_change", "refused", "normalised_drop"), ("all", "common", "specific", "random")))

# %% [markdown]
# The same as one number a category: own set minus the mean of the others, request by request, so that what all sets do
# alike drops out. An interval left of or across 0 shows no preference for the own category.

# %%
show(drawn, "categories-own")

# %% [markdown]
# ## Do harm features drive refusal features?
#
# A category's specific features are scaled, and the activity of the common ones in *later* layers is read, with nothing
# held. Beside it stand three kinds of control of equal size and layers, 20 draws each: any active features, features as
# active as those scaled, and other candidates for any category. Only what goes beyond the controls speaks for a path
# from harm to refusal.

# %%
driving = job.run(lambda job: graph.run_graph(job, fitted, sets))
display(Markdown("\n\n".join(on_graph.sentences(driving))))
show(rs.plots(driving), *rs.plots(driving))

# %% [markdown]
# **To compare with:** for real models harm features scaled lower refusal features by .48 (Gemma 2 2B) and .51 (Llama
# 3.1 8B), random features by .05 to .06; as cited by others, we could not verify these. The paper's common features
# are, by its notebooks' stored output (layer/index), for Gemma with Gemma Scope's 65k SAEs 11/25312, 12/32599,
# 13/48974, 14/64443, 15/30001, 16/46368, 17/38461, and for Llama with Llama Scope's 8x SAEs 8/7298, 8/31442, 10/7015,
# 10/10229, 10/23677, 10/26994, 11/10503, 12/1666, 12/7281, 13/21635. With the same SAEs these should be among yours:

# %%
display(Markdown(", ".join(map(str, sorted(sets.common.features)))))

# %% [markdown]
# ### The graph
#
# `NODES` features, half of them common, half specific. An edge's *direct* weight is what passes from one to the other
# beside the other features drawn; its *total* weight is all that silencing the first does to the second, to first
# order. How well weights rank what scaling really does is measured too, and the table says what share of a feature's
# change its direct edges explain: what they leave out came by another path, or is not linear.

# %%
data = job.store.read(GRAPH, dict)
show(network(data), "graph-network")
display(numbers(driving, ("edge_correlation", "explained"), ("total", "direct")))
edges = pandas.DataFrame(data["edges"]).sort_values("direct_share", key=abs, ascending=False)
display(edges[["source", "target", "direct", "direct_share", "total", "measured"]].head(10).round(3))

# %% [markdown]
# ## How few features flip a prompt?
#
# Silencing a whole set is a blunt edit. Here, prompt by prompt, features of its own top set are given back, the weakest
# first, while it is still answered coherently without the rest; the set left is 1-minimal: give back any one of it and
# the prompt is refused again. For some prompts all sets of up to three features are tried as well, which shows how far
# pruning is from the true minimum. Features are silenced (*c* = 0): a stronger factor flips prompts with nearly any
# feature.

# %%
chosen = job.run(lambda job: select.choose_features(job, fitted))
least = job.run(lambda job: minimal.run_minimal(job, fitted, chosen))
display(Markdown("\n\n".join(on_minimal.sentences(least))))
show(rs.plots(least), "minimal-sizes", "minimal-features")

# %% [markdown]
# With these silent, do features wake up that slept before, as if to refuse in their place? Some always will: any edit
# moves what comes after it. So each prompt's set is compared with 20 random sets of the same layers and activity.

# %%
show(rs.plots(least), "minimal-woken")

# %% [markdown]
# ## What the testbed cannot show
#
# - **The split is built in.** The testbed was trained to refuse all kinds of harm in the same words, so that there is
#   something common to find, and to let a part used in training alone read the kind of harm where it decides to refuse,
#   so that there is something specific. It shows that the method finds such a structure, not that a real model has it.
# - **Placeholder harms are cleaner than real ones.** No request belongs to two categories, and each category has its
#   own few nouns and verbs. Real categories overlap, and their features follow topics as much as harm.
# - **Rates may saturate**: where every set stops nearly every refusal, only *m* tells them apart.
# - **Few prompts, small sets, three of seven categories**, so that this runs in a minute or two: intervals are wide,
#   and a preference that is not seen may still be there. The fewer categories, the more features are "common to all".
#   `refusalscope categories testbed` takes all seven and 50 prompts of each.
# - Nothing is said about *harmful* answers: a prompt that is not refused may be answered with nothing of use.
#
# All caveats that the studies raised themselves:

# %%
measure.describe_run(job, fitted)
page = measure.write_report(job.store)
job.finish()
job.close()
status.update(Markdown("Done."))
notes = dict.fromkeys(note for one in (finding, driving, least) for note in one.caveats)
display(Markdown("\n".join(f"- {note}" for note in notes)))
display(Markdown(f"All of it is kept in `{FOLDER}`, and `{FOLDER / page}` is a page to read."))
