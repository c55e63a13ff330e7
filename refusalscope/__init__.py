"""refusalscope shows why a chat model refuses, with sparse autoencoders on its residual stream.

Public names are imported on first use (PEP 562), so that `import refusalscope` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refusalscope.core.scores import Attribution, Scores, Trace
    from refusalscope.core.store import Store
    from refusalscope.core.types import (
        Direction,
        Feature,
        FeatureSet,
        Finding,
        Prompt,
        Prompts,
        Response,
        Responses,
        Row,
        SaeSlice,
    )
    from refusalscope.guard.detector import Guard
    from refusalscope.inputs.chat import ChatModel
    from refusalscope.inputs.saes import SaeBank
    from refusalscope.inputs.template import ChatStyle
    from refusalscope.mechanism.attribution import attribute
    from refusalscope.mechanism.direction import find
    from refusalscope.mechanism.interventions import (
        AddDirection,
        HoldFeatures,
        RemoveDirection,
        ScaleFeatures,
        SetFeatures,
        Together,
        editor,
        record,
    )
    from refusalscope.pipeline.job import Job
    from refusalscope.pipeline.options import Options
    from refusalscope.report.drawing import render
    from refusalscope.report.plots import plots

__version__ = "0.1.0"

_HOMES = {
    "Store": "core.store",
    "Attribution": "core.scores",
    "Direction": "core.types",
    "Feature": "core.types",
    "FeatureSet": "core.types",
    "Finding": "core.types",
    "Prompt": "core.types",
    "Prompts": "core.types",
    "Response": "core.types",
    "Responses": "core.types",
    "Row": "core.types",
    "SaeSlice": "core.types",
    "Guard": "guard.detector",
    "ChatModel": "inputs.chat",
    "ChatStyle": "inputs.template",
    "SaeBank": "inputs.saes",
    "attribute": "mechanism.attribution",
    "find": "mechanism.direction",
    "AddDirection": "mechanism.interventions",
    "RemoveDirection": "mechanism.interventions",
    "ScaleFeatures": "mechanism.interventions",
    "SetFeatures": "mechanism.interventions",
    "HoldFeatures": "mechanism.interventions",
    "Together": "mechanism.interventions",
    "record": "mechanism.interventions",
    "Scores": "core.scores",
    "Trace": "core.scores",
    "editor": "mechanism.interventions",
    "Options": "pipeline.options",
    "Job": "pipeline.job",
    "plots": "report.plots",
    "render": "report.drawing",
}
__all__ = [
    "AddDirection",
    "Attribution",
    "ChatModel",
    "ChatStyle",
    "Direction",
    "Feature",
    "FeatureSet",
    "Finding",
    "Guard",
    "HoldFeatures",
    "Job",
    "Options",
    "Prompt",
    "Prompts",
    "RemoveDirection",
    "Response",
    "Responses",
    "Row",
    "SaeBank",
    "SaeSlice",
    "ScaleFeatures",
    "Scores",
    "SetFeatures",
    "Store",
    "Together",
    "Trace",
    "attribute",
    "editor",
    "find",
    "plots",
    "record",
    "render",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
