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

    def caveats(self, study: str, options: Options) -> tuple[str, ...]:
        """What a finding must say of its size: nothing where it is whole."""
        whole, mine = asdict(WHOLE), asdict(self)
        cut = [
            f"{mine[name]} {said} (whole: {whole[name]})"
            for name, said in CUT[study].items()
            if mine[name] < whole[name] and not (name in LIMITED and options.limit)
        ]
        if not cut:
            return ()
        verb = "categories" if study == "graph" else study
        return (
            f"A small run of the study {study}: {', '.join(cut)}. `refusalscope {verb}` with the same options, or "
            "`run --full`, measures the whole.",
        )


WHOLE = Sizes()
SMALL = Sizes()
LIMITED = ("category_prompts", "pairs", "goals")
"""Those that `--limit` goes before."""
SETS = {"category_prompts": "prompts of each category to fit on and to test on"}
CUT = {
    "categories": SETS | {"edit_draws": "random sets of each kind", "answered_draws": "random sets answered under"},
    "graph": SETS | {"drive_draws": "random sets of each kind", "edge_prompts": "prompts for the edges"},
    "minimal": {
        "minimal_prompts": "prompts searched at most",
        "enumerated": "of them enumerated",
        "woken_draws": "random sets for each set silenced",
    },
    "jailbreaks": {
        "pairs": "pairs asked for of each kind",
        "restored": "successful attacks answered again at most",
        "restored_draws": "draws of each random control",
        **SETS,
    },
    "suffixes": {"goals": "goals", **SETS},
}
"""Study -> which sizes bear on it, in words."""


def sizes_of_run(options: Options) -> Sizes:
    """Those that `run` does its studies at: small on the testbed, which `--full` lifts, else whole."""
    return SMALL if options.model == "testbed" and not options.full else WHOLE
