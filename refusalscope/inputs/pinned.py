"""SAELens's readers of SAE files, bound to one commit of the repository: by themselves they read its newest.

A second copy of their module is made, in which files are asked for at that commit; SAELens's own stays as it is.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

MODULE = "sae_lens.loading.pretrained_sae_loaders"


def reader(conversion: str, commit: str) -> Callable[..., Any]:
    """SAELens's reader of the layout `conversion`, as its registry calls it, for files at `commit`.

    Raises ValueError when the installed SAELens reads files in another way, so that no other commit is ever read.
    """
    return _bound(commit).NAMED_PRETRAINED_SAE_LOADERS[conversion]


@lru_cache(maxsize=4)
def _bound(commit: str) -> ModuleType:
    spec = find_spec(MODULE)
    if spec is None or spec.loader is None:
        raise ValueError(f"there is no {MODULE}: install the sae-lens that refusalscope asks for")
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    for name in ("hf_hub_download", "hf_hub_url"):
        if not hasattr(made, name):
            raise ValueError(f"{MODULE} has no {name}: install the sae-lens that refusalscope asks for")
        setattr(made, name, _at(getattr(made, name), commit))
    return made


def _at(ask: Callable[..., Any], commit: str) -> Callable[..., Any]:
    def asked(*names: Any, revision: str | None = None, **others: Any) -> Any:
        # Some readers name a revision of their own, None for the newest.
        return ask(*names, revision=revision or commit, **others)

    return asked
