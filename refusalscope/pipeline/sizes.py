"""How large every study is: whole, as its own verb does it, or small, so that one run has time for all of them.

The only place that knows. A study is handed its sizes, and what is cut stands in its finding.
"""

from dataclasses import asdict, dataclass

from refusalscope.inputs import categories
from refusalscope.pipeline.options import Options


@dataclass(frozen=True)
class Sizes:
    """How much of what every study takes. `--limit` goes before the numbers of prompts, pairs and goals asked for."""

    category_prompts: int = categories.PER_CATEGORY
    """Of each category to fit on, and as many to test on."""
    edit_draws: int = 20
    """Random sets that the common and the specific features of a category are held against."""
    answered_draws: int = 3
    """Of these the ones that answers are generated under, which costs the most."""
    answered_transfers: bool = True
    """Whether answers are generated under the sets of other categories too."""
    drive_draws: int = 20
    """Random sets of each kind that a category's own features are held against where they drive others."""
    edge_prompts: int = 64
    """On which the graph's edges rest."""
    minimal_prompts: int = 48
    """Held-out refused prompts whose own sets are pruned."""
    enumerated: int = 20
    """Of these the ones whose true minimum is looked for as well: 1350 sets of up to three of 20 features each."""
    woken_draws: int = 20
    """Random sets for each set that is silenced."""
    pairs: int = 300
    """Attacks with their plain forms (the testbed: of each kind of wrapper)."""
    restored: int = 100
    """Successful attacks that are answered again."""
    restored_draws: int = 20
    """Draws of each random control of a restoration."""
    goals: int = 100
    """Goals that are asked with suffixes."""
    probe_prompts: int = 2000
    """Of each class that probes learn from; validation and test sets are in proportion."""

    def caveats(self, study: str, options: Options) -> tuple[str, ...]:
        """What a finding must say of its size: nothing where it is whole."""
        whole, mine = asdict(WHOLE), asdict(self)
        cut = [
            said.format(mine[name], whole[name])
            for name, said in CUT[study].items()
            if mine[name] < whole[name] and not (name in LIMITED and options.limit)
        ]
        if not cut:
            return ()
        verb = {"graph": "categories", "probes": "probe"}.get(study, study)
        return (
            f"A small run of the study {study}: {', '.join(cut)}. `refusalscope {verb}` with the same options, or "
            "`run --full`, measures the whole.",
        )


WHOLE = Sizes()
SMALL = Sizes(
    category_prompts=20,
    edit_draws=6,
    answered_draws=1,
    answered_transfers=False,
    drive_draws=8,
    edge_prompts=32,
    minimal_prompts=16,
    enumerated=4,
    woken_draws=6,
    pairs=60,
    restored=32,
    restored_draws=5,
    goals=24,
    probe_prompts=240,
)
LIMITED = ("category_prompts", "pairs", "goals", "probe_prompts")
"""Those that `--limit` goes before."""
SETS = {"category_prompts": "{} prompts of each category to fit on and to test on (whole: {})"}
CUT = {
    "categories": {
        **SETS,
        "edit_draws": "{} random sets of each kind (whole: {})",
        "answered_draws": "answers under {} of them (whole: {})",
        "answered_transfers": "no answers under the sets of other categories",
    },
    "graph": {
        **SETS,
        "drive_draws": "{} random sets of each kind (whole: {})",
        "edge_prompts": "at most {} prompts for the edges (whole: {})",
    },
    "minimal": {
        "minimal_prompts": "at most {} prompts searched (whole: {})",
        "enumerated": "the true minimum of at most {} (whole: {})",
        "woken_draws": "{} random sets for each set that is silenced (whole: {})",
    },
    "jailbreaks": {
        "pairs": "at most {} pairs of each kind (whole: {})",
        "restored": "at most {} successful attacks answered again (whole: {})",
        "restored_draws": "{} draws of each random control (whole: {})",
        **SETS,
    },
    "suffixes": {"goals": "at most {} goals (whole: {})", **SETS},
    "probes": {"probe_prompts": "{} prompts of each class to learn from (whole: {})", **SETS},
}
"""Study -> which sizes bear on it, in words."""


def sizes_of_run(options: Options) -> Sizes:
    """Those that `run` does its studies at: small on the testbed, which `--full` lifts, else whole."""
    return SMALL if options.model == "testbed" and not options.full else WHOLE
