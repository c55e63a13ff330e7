"""The `setting` of a finding's row, read and written out: the only place that knows how a setting is spelled."""

import re

DATASET_OF_STRENGTHS = "harmful-validation"
"""The data set on which every scaling factor is tried."""


def factor(setting: str) -> tuple[float, str] | None:
    """Scaling factor and set size of a setting such as `scale c=-1 k=20 draw=0`; None for any other."""
    found = re.match(r"scale c=(\S+) k=(\d+)", setting)
    return (float(found[1]), found[2]) if found else None


def value_set(setting: str) -> tuple[float, str] | None:
    """The value that features are set to and the set size, of `set v=0.5 k=20`; None for any other."""
    found = re.match(r"set v=(\S+) k=(\d+)", setting)
    return (float(found[1]), found[2]) if found else None


def part(setting: str, name: str) -> int | None:
    """The whole number that a setting such as `layer=3 nodes=16` gives to `name`, or None."""
    found = re.search(rf"(?:^| ){name}=(\d+)(?: |$)", setting)
    return int(found[1]) if found else None


def readable(setting: str) -> str:
    """A setting in the notation of a paper: `scale c=-1 k=20` becomes `c = −1, k = 20`."""
    found = re.match(r"(?:scale|set) (c|v)=(\S+) k=(\d+)(.*)", setting)
    if found:
        rest = found[4].replace(" ", ", ").replace("=", " ")
        return f"{found[1]} = {found[2]}, k = {found[3]}{rest}".replace("-", "−")
    return re.sub(r"(\w)=(\S+) (?=\w+=)", r"\1 \2, ", setting).replace("=", " ")
