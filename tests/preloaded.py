"""What a run imports, for the server that `tests.processes` forks from: importing it takes longer than a small run."""

import accelerate.utils
import matplotlib.backends.backend_svg
import sae_lens
import transformers.models.llama.modeling_llama

from refusalscope import cli
from refusalscope.evals import capability
from refusalscope.pipeline import fit, job, measure

LOADED = (accelerate, matplotlib, sae_lens, transformers, cli, capability, fit, job, measure)
