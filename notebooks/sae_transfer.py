# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Do SAEs of a base model carry over to its chats?
#
# Most published SAEs were trained on a base model and on text from the web; refusal is studied in chat models, inside
# a chat template. Appendix A.9 of *Understanding Refusal in Language Models with Sparse Autoencoders* ([arXiv
# 2505.23556](https://arxiv.org/abs/2505.23556)) asks what is lost on the way. Here two sets of SAEs of one model stand
# side by side: on chats, on the template's own tokens alone, on plain text outside any chat, and on the refusal
# direction.
#
# As it stands it runs on the testbed, a small model that ships with the package: a minute on a laptop, no GPU, no
# network. Its two sets share model, recipe and seed, and differ in what they were trained on: whole chats (`sae`), or
# the same kind of prompts without the chat template (`base`).
#
# `sae_transfer.py` is what you edit; `make notebook` builds `sae_transfer.ipynb` from it, which is kept without
# outputs.

# %%
from pathlib import Path

import pandas
from IPython.display import DisplayHandle, Image, Markdown, display
from transformers.utils import logging

import refusalscope as rs
from refusalscope.pipeline import fit, health, measure
from refusalscope.report import health as on_health
from refusalscope.studies import health as study

logging.disable_progress_bar()
pandas.set_option("display.max_colwidth", None)

# %% [markdown]
# ## Which model, which sets
#
# The one cell to change. For a real model:
#
# - `MODEL` is a preset (`refusalscope models` lists them: `"gemma-2-9b"`, `"llama-3.1-8b"`, ...) or a Hugging Face
#   repository or folder, then with `sae_release=` or `saes=` among the options. Its SAEs are the first set.
# - `AGAINST` is the second: another preset of the same model (`"gemma-2-9b-it-saes"`, `"llama-3.1-8b-andyrdt"`), a
#   release of SAELens or `release:ID`, or a pattern of folders with `{layer}`.
# - `DOCUMENTS` is plain text: a file of your own, or `owner/name@revision:column` of a data set on the hub. Without it
#   only the testbed has some.
# - `LIMIT = None` takes all validation prompts, `LAYERS = None` all layers that have SAEs.
#
# Everything made is kept in `FOLDER`, layer by layer. Run the notebook again, or after it was stopped, and what is
# there is read.

# %%
MODEL = "testbed"
AGAINST = "base"
DOCUMENTS = None
LIMIT = 32
LAYERS = None
FOLDER = Path("runs") / f"{MODEL}-health".replace("/", "-")

options = rs.Options(model=MODEL, against=AGAINST, documents=DOCUMENTS, limit=LIMIT, layers=LAYERS)
status = DisplayHandle()
status.display(Markdown("Starting."))
job = rs.Job(options, FOLDER, lambda what, done, total: status.update(Markdown(f"{what}: {done} of {total}")))

# %% [markdown]
# ## Measure
#
# At one layer at a time the residual is replaced by what the SAE makes of it, everywhere but at the first token. Three
# questions are asked of the replacement. How much of the residual's variance does it keep? How much of the
# cross-entropy does it recover, between a floor (0) and the unedited model (1)? The floor is a residual of zero, as
# published, or the mean residual, which is stricter. And does the refusal direction, as a difference of means, still
# point where it did?

# %%
fitted = job.run(fit.fit)
finding = job.run(lambda job: health.run_health(job, fitted))
display(Markdown("\n\n".join(on_health.sentences(finding))))
for plot in rs.plots(finding).values():
    display(Image(rs.render(plot.figure, "png"), width=560), Markdown(plot.caption))

# %% [markdown]
# ## A verdict on every layer
#
# It goes by the figures on chats and by the cosine, with their whole intervals. A layer is *trusted* where all of them
# are shown to be good, *not to be trusted* where one of them is shown to be bad, and *doubtful* in between.

# %%
verdicts = study.verdicts(finding)
table = {(trust.layer, trust.sae_set): {"verdict": trust.word, "why": "; ".join(trust.reasons)} for trust in verdicts}
display(pandas.DataFrame(table).T)

# %% [markdown]
# ## The same texts, both sets
#
# Each text is its own control: the differences below are the second set minus the first, on the same tokens over the
# same totals, with intervals over texts; p is corrected by Holm over the layers.


# %%
def line(row):
    """A row's estimate and interval, and its corrected p where it is tested."""
    if row is None or not row.n:
        return ""
    tested = "" if row.p_holm is None else f", p = {row.p_holm:.2g}"
    return f"{row.estimate:.3f} [{row.low:.3f}, {row.high:.3f}]{tested}"


def compared(metric):
    """Layers down; for each kind of text, each set and the difference across."""
    lines = {}
    for row in finding.rows:
        if row.metric in (metric, f"{metric}_difference"):
            lines.setdefault(row.setting, {})[row.dataset, row.method] = line(row)
    return pandas.DataFrame(lines).T


display(Markdown("Variance explained"), compared("variance_explained"))
display(Markdown("Cross-entropy recovered, from zero"), compared("cross_entropy_recovered"))
display(Markdown("Cross-entropy recovered, from the mean"), compared("cross_entropy_recovered_mean"))
display(Markdown("Active features per token"), compared("l0"))
display(Markdown("Cosine of the reconstructed refusal direction"), compared("direction_cosine"))

# %% [markdown]
# **To compare with:** on Gemma 2 2B, layer 15, SAEs of the base model recover .861 of the cross-entropy on chats and
# SAEs of the chat model .988 (the paper, appendix A.9; floor zero).
#
# ## What transfers, on the testbed
#
# - **Not the reconstruction of chats.** The set that never saw the template explains next to none of the variance on
#   chats, and on the template's own tokens it does worse than the mean residual would: there it wakes more than a
#   hundred features where the other wakes a dozen.
# - **Plain text, largely.** Outside any chat it keeps most of the variance, though less than the other set. These
#   texts hold answers, which it did not see either.
# - **What the model says next, nearly all of it.** Cross-entropy recovered stays close to 1 even where the variance
#   explained is near 0: what is misread is not what the next token of a harmless answer depends on. So a high share of
#   cross-entropy recovered alone is no proof that features are read off faithfully.
# - **The direction, mostly.** Its cosine is .9 or more: harmful and harmless prompts are told apart along nearly the
#   same line after reconstruction. Everything that reads single features at the template's tokens, as attribution of
#   refusal does, is less lucky.
#
# ## What the testbed cannot show
#
# - **How wide real gaps are.** A real base model's SAEs saw markup, dialogues and brackets; here the template's tokens
#   were never seen at all. On Gemma 2 2B the published loss of cross-entropy is larger than any here.
# - **One model, two training texts.** A real pair differs in the model as well: the base model's own residuals are not
#   the chat model's. Here the model is the same, so what is seen is the effect of the text alone.
# - **Placeholder prose.** Cross-entropy is easy on a grammar of few templates; shares of it are closer to 1 than they
#   would be on free text.
#
# All caveats that the study raised itself:

# %%
measure.describe_run(job, fitted)
page = measure.write_report(job.store)
job.finish()
job.close()
status.update(Markdown("Done."))
display(Markdown("\n".join(f"- {note}" for note in finding.caveats)))
display(Markdown(f"All of it is kept in `{FOLDER}`, and `{FOLDER / page}` is a page to read."))
