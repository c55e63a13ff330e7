"""The table of contents: every chapter that the page has, grouped, read off its headings so that no link is dead."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from markupsafe import Markup

SHORT = "In short"
REST = "More"
GROUPS: Mapping[str, Mapping[str, str]] = {
    SHORT: {
        "refuses": "What refuses here",
        "costs": "What it costs to edit",
        "passes": "Which attacks pass, and why",
        "guarded": "How well the guard sees them",
        "first": "Read this first",
    },
    "Edits": {
        "results": "Results",
        "compared": "Methods compared",
        "induced": "Refusal induced",
        "safety": "Judges",
        "agreement": "Agreement",
        "cost": "Cost",
        "capability": "Cost elsewhere",
        "direction": "Direction",
        "figures": "Figures",
        "sweep": "Strength",
    },
    "How refusal is built": {"categories": "Kinds of harm", "graph": "What drives what", "minimal": "Minimal sets"},
    "Attacks": {"jailbreaks": "Attacks", "suffixes": "Suffixes"},
    "The guard": {"probes": "Probes"},
    REST: {},
    "Can it be trusted?": {"trust": "Attributions", "layers": "Layers", "health": "SAE health"},
    "One by one": {
        "features": "Features",
        "feature-pages": "Feature by feature",
        "why": "Why refused?",
        "examples": "Examples",
    },
    "This run": {"measured": "How it was measured", "reproduce": "Reproduce", "provenance": "Provenance"},
}
"""Group -> chapter -> what it is called there. A chapter that stands in no group comes under REST by its heading."""


class Entry(NamedTuple):
    """One link."""

    anchor: str
    text: str


def contents(*parts: str) -> dict[str, list[Entry]]:
    """Group -> its chapters, in the order of GROUPS; groups without a chapter on the page are left out.

    `parts` are the page's own markup. What a heading quotes is escaped there, so nothing else looks like one.
    """
    found = {anchor: text for part in parts for anchor, text in re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', part, re.S)}
    named = {anchor for group in GROUPS.values() for anchor in group}
    made = {
        group: [Entry(anchor, text) for anchor, text in chapters.items() if anchor in found]
        for group, chapters in GROUPS.items()
    }
    made[REST] = [Entry(anchor, Markup(text).striptags()) for anchor, text in found.items() if anchor not in named]
    return {group: entries for group, entries in made.items() if entries}
