"""Proves from the source alone that the package keeps to its floors and to its few house rules.

A file imports only from floors below its own, or (studies excepted) from its own folder. The checkers read syntax
trees, import nothing of the package, and are themselves tried on synthetic sources at the end.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "refusalscope"
# lowest first
FLOORS = ("core", "testbed", "inputs", "mechanism", "guard", "evals", "studies", "report", "pipeline", "cli")
LIGHT = ("core/", "mechanism/", "inputs/chat.py")
LIGHT_LIBRARIES = sys.stdlib_module_names | {"torch", "transformers", "numpy", "safetensors", "jaxtyping"}
ENTRANCES = ("__init__.py", "__main__.py", "cli.py")
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LONGEST_FUNCTION = 70


class Source(NamedTuple):
    path: str
    """Where the file lies inside the package, such as `inputs/chat.py`."""
    tree: ast.Module
    """What it says."""

    @property
    def module(self) -> tuple[str, ...]:
        """The dotted name in parts: ("refusalscope", "inputs", "chat"); a folder's `__init__` is the folder."""
        parts = ("refusalscope", *self.path.removesuffix(".py").split("/"))
        return parts[:-1] if parts[-1] == "__init__" else parts

    @property
    def home(self) -> tuple[str, ...]:
        """The package that the file's relative imports start from."""
        return self.module if self.path.endswith("__init__.py") else self.module[:-1]

    @property
    def place(self) -> str:
        """The folder of FLOORS that the file is in; `__main__`, `cli_options` and `cli_words` count with `cli`."""
        first = self.path.split("/")[0].removesuffix(".py")
        return "cli" if first in ("__main__", "cli_options", "cli_words") else first


class Import(NamedTuple):
    line: int
    target: tuple[str, ...]
    """The full dotted name in parts; for `from a import b` both a and b."""


def parse(files: dict[str, str]) -> list[Source]:
    return [Source(path, ast.parse(text, filename=path)) for path, text in sorted(files.items())]


@pytest.fixture(scope="module")
def package() -> list[Source]:
    return parse({file.relative_to(PACKAGE).as_posix(): file.read_text("utf-8") for file in PACKAGE.rglob("*.py")})


def is_type_checking(test: ast.expr) -> bool:
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def run_at_import(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Every node that importing the file executes: no function's body, no `if TYPE_CHECKING` block."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        if isinstance(node, ast.If) and is_type_checking(node.test):
            yield from run_at_import(node.orelse)
        else:
            yield from run_at_import(ast.iter_child_nodes(node))


def imports(source: Source, nodes: Iterable[ast.AST]) -> Iterator[Import]:
    """What the nodes import, relative names resolved; `import_module("a.b")` counts where its name is spelled out."""
    for node in nodes:
        match node:
            case ast.Import():
                yield from (Import(node.lineno, tuple(alias.name.split("."))) for alias in node.names)
            case ast.ImportFrom():
                start = source.home[: len(source.home) - node.level + 1] if node.level else ()
                base = (*start, *(node.module.split(".") if node.module else ()))
                yield from (Import(node.lineno, (*base, alias.name)) for alias in node.names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(node.lineno, tuple(name.split(".")))


def may_import(here: str, there: str) -> bool:
    """Whether a file in the folder `here` may import from the folder `there`, or the root package's name `there`."""
    if there not in FLOORS:  # a name that the root package re-exports may come from any floor; its version from none
        return here == "cli" or there == "__version__"
    if here == there:
        return here != "studies"
    return FLOORS.index(there) < FLOORS.index(here)


def floor_faults(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if source.path == "__init__.py":
            continue
        if source.place not in FLOORS:
            yield f"{source.path} stands on no floor: expected one of {', '.join(FLOORS)}"
            continue
        for line, target in imports(source, ast.walk(source.tree)):
            there = (*target, "the root package")[1]
            if target[0] == "refusalscope" and not may_import(source.place, there):
                yield f"{source.path}:{line} imports {'.'.join(target)}: {source.place} may not import {there}"


def root_faults(sources: list[Source]) -> Iterator[str]:
    """`refusalscope/__init__.py` re-exports lazily: importing it imports nothing of the package."""
    for source in sources:
        if source.path == "__init__.py":
            for line, target in imports(source, run_at_import(source.tree.body)):
                if target[0] == "refusalscope":
                    yield f"{source.path}:{line} imports {'.'.join(target)} as soon as the package is imported"


def loaded_by(start: Source, sources: list[Source]) -> dict[str, Source]:
    """The files that importing `start` executes, itself included, each under the way that leads to it."""
    files = {source.module: source for source in sources}
    reached = {start.module: start.path}
    waiting = [(start.path, start.module)]
    while waiting:
        way, module = waiting.pop(0)
        source = files.get(module)
        targets = [found.target for found in imports(source, run_at_import(source.tree.body))] if source else []
        for target in [module, *targets]:
            for length in range(1, len(target) + 1):  # the folders' own `__init__` files are executed too
                if target[:length] in files and target[:length] not in reached:
                    reached[target[:length]] = f"{way} -> {files[target[:length]].path}"
                    waiting.append((reached[target[:length]], target[:length]))
    return {way: files[module] for module, way in reached.items()}


def heavy_faults(sources: list[Source]) -> Iterator[str]:
    """Core, the mechanism and the chat model import on a machine that has only LIGHT_LIBRARIES; each culprit once."""
    told = set()
    for start in sources:
        for way, source in loaded_by(start, sources).items() if start.path.startswith(LIGHT) else ():
            for line, target in imports(source, run_at_import(source.tree.body)):
                culprit = (source.path, line, target[0])
                if target[0] not in LIGHT_LIBRARIES | {"refusalscope"} and culprit not in told:
                    told.add(culprit)
                    yield f"{way}:{line} imports {target[0]} at module level: import it where it is used"


def entrance_faults(sources: list[Source]) -> Iterator[str]:
    """The help text must not wait for torch."""
    for source in sources:
        if source.path in ENTRANCES:
            for line, target in imports(source, run_at_import(source.tree.body)):
                if target[0] in {"torch", "sae_lens"}:
                    yield f"{source.path}:{line} imports {target[0]} at module level: import it where it is used"


def star_faults(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        for line, target in imports(source, ast.walk(source.tree)):
            if target[-1] == "*":
                yield f"{source.path}:{line} imports * from {'.'.join(target[:-1])}: name what is used"


def print_faults(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        for node in ast.walk(source.tree) if source.path != "cli.py" else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{source.path}:{node.lineno} prints: only cli.py does"


def name_faults(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if "utils" in source.module:
            yield f"{source.path} is called utils: call it by what it knows"


def pickle_faults(sources: list[Source]) -> Iterator[str]:
    """A file of weights or results is data; reading a pickle runs what is in it."""
    for source in sources:
        torches = {"torch"}
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Import):
                torches |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
        for line, target in imports(source, ast.walk(source.tree)):
            if target[0] in PICKLES or target[:2] == ("torch", "load"):
                yield f"{source.path}:{line} imports {'.'.join(target)}: use safetensors or JSON"
        for node in ast.walk(source.tree):
            match node:
                case ast.Attribute(value=ast.Name(id=name), attr="load") if name in torches:
                    yield f"{source.path}:{node.lineno} uses torch.load: use safetensors"
                case ast.keyword(arg="allow_pickle", value=value) if getattr(value, "value", None) is not False:
                    yield f"{source.path}:{node.lineno} allows a pickle: use safetensors"


def length_faults(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    yield f"{source.path}:{node.lineno} {node.name} has {lines} lines, over {LONGEST_FUNCTION}"


CHECKERS = (
    floor_faults,
    root_faults,
    heavy_faults,
    entrance_faults,
    star_faults,
    print_faults,
    name_faults,
    pickle_faults,
    length_faults,
)


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_package_keeps_the_rule(checker, package):
    faults = list(checker(package))
    assert not faults, "\n" + "\n".join(faults)


CASES = [
    (floor_faults, {"core/stats.py": "from refusalscope.inputs import chat"}, "core may not import inputs"),
    (floor_faults, {"inputs/chat.py": "from ..mechanism.direction import find"}, "inputs may not import mechanism"),
    (floor_faults, {"inputs/chat.py": "from .. import report"}, "inputs may not import report"),
    (floor_faults, {"evals/__init__.py": "from ..studies import health"}, "evals may not import studies"),
    (
        floor_faults,
        {"mechanism/direction.py": "def find():\n    import refusalscope.cli"},
        ":2 imports refusalscope.cli",
    ),
    (floor_faults, {"core/types.py": "if TYPE_CHECKING:\n    from ..report.page import Page"}, "core may not import"),
    (floor_faults, {"core/types.py": "import_module('refusalscope.evals.judges')"}, "core may not import evals"),
    (
        floor_faults,
        {"studies/health.py": "from refusalscope.studies.probes import fit"},
        "studies may not import studies",
    ),
    (floor_faults, {"studies/health.py": "from . import probes"}, "studies may not import studies"),
    (floor_faults, {"testbed/build.py": "from refusalscope.inputs.chat import load"}, "testbed may not import inputs"),
    (floor_faults, {"core/store.py": "from refusalscope.testbed import grammar"}, "core may not import testbed"),
    (floor_faults, {"core/store.py": "from refusalscope import Finding"}, "core may not import Finding"),
    (floor_faults, {"core/store.py": "import refusalscope"}, "core may not import the root package"),
    (floor_faults, {"misc/thing.py": ""}, "misc/thing.py stands on no floor"),
    (root_faults, {"__init__.py": "from .core.types import Prompts"}, "__init__.py:1 imports refusalscope.core"),
    (root_faults, {"__init__.py": "if not TYPE_CHECKING:\n    import refusalscope.cli"}, "__init__.py:2"),
    (heavy_faults, {"core/types.py": "import pydantic"}, "core/types.py:1 imports pydantic"),
    (
        heavy_faults,
        {"inputs/chat.py": "try:\n    from sae_lens import SAE\nexcept ImportError: ..."},
        "imports sae_lens",
    ),
    (heavy_faults, {"mechanism/features.py": "class A:\n    import networkx"}, "imports networkx"),
    (
        heavy_faults,
        {"mechanism/features.py": "from ..inputs import saes", "inputs/saes.py": "import sae_lens"},
        "mechanism/features.py -> inputs/saes.py:1 imports sae_lens",
    ),
    (
        heavy_faults,
        {"inputs/chat.py": "", "inputs/__init__.py": "import rich"},
        "inputs/chat.py -> inputs/__init__.py:1 imports rich",
    ),
    (entrance_faults, {"cli.py": "import torch.nn"}, "cli.py:1 imports torch"),
    (entrance_faults, {"__init__.py": "from sae_lens import SAE"}, "__init__.py:1 imports sae_lens"),
    (star_faults, {"core/types.py": "from .stats import *"}, "imports * from refusalscope.core.stats"),
    (print_faults, {"core/types.py": "def f():\n    print(1)"}, "core/types.py:2 prints"),
    (name_faults, {"core/utils.py": ""}, "core/utils.py is called utils"),
    (name_faults, {"utils/text.py": ""}, "utils/text.py is called utils"),
    (pickle_faults, {"core/store.py": "import pickle"}, "imports pickle"),
    (pickle_faults, {"core/store.py": "from torch import load"}, "imports torch.load"),
    (pickle_faults, {"core/store.py": "import torch as t\nt.load('x')"}, ":2 uses torch.load"),
    (pickle_faults, {"core/store.py": "numpy.load('x', allow_pickle=True)"}, "allows a pickle"),
    (length_faults, {"core/stats.py": "def long():\n" + "    1\n" * 70}, "long has 71 lines, over 70"),
]


@pytest.mark.parametrize(("checker", "files", "fault"), CASES)
def test_the_floors_test_can_fail(checker, files, fault):
    faults = list(checker(parse(files)))
    assert len(faults) == 1
    assert fault in faults[0]


def test_the_floors_test_can_pass():
    files = {
        "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .core.types import Prompts",
        "__main__.py": "from refusalscope.cli import main",
        "cli.py": "from refusalscope import Finding\nprint(1)\ndef f():\n    import torch\n    from . import evals",
        "core/stats.py": "from refusalscope import __version__\nfrom . import types\nfrom .types import Prompts",
        "core/types.py": "from __future__ import annotations\nimport torch, numpy, json\nfrom jaxtyping import Float",
        "evals/judges.py": "import httpx\nfrom ..testbed import grammar",
        "inputs/chat.py": "import torch\nif TYPE_CHECKING:\n    import sae_lens\ndef load():\n    import sae_lens",
        "inputs/saes.py": "import sae_lens\nimport torch\nfrom .chat import load\ntorch.save({}, 'x')",
        "mechanism/features.py": "if TYPE_CHECKING:\n    from ..inputs import saes\nfrom ..inputs.chat import load",
        "report/page.py": "import jinja2\nfrom refusalscope.report import plots",
        "studies/health.py": "from ..mechanism.features import select\nconsole.print(1)\njson.load(file)",
        "testbed/build.py": "from ..core import types\nfrom .grammar import draw\ndef f():\n" + "    1\n" * 69,
    }
    assert [fault for checker in CHECKERS for fault in checker(parse(files))] == []
