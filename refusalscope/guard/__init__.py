"""A detector of harmful prompts, adversarial ones included, that reads the model they are meant for."""

from refusalscope.guard.detector import Guard, Reason, Scored
from refusalscope.guard.lines import score_lines
from refusalscope.guard.watching import Watched, watch

__all__ = ["Guard", "Reason", "Scored", "Watched", "score_lines", "watch"]
