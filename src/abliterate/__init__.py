"""Find the refusal direction of a language model, remove it from the weights exactly, and measure what that did.

The library mirrors the command line: `extract_direction`, `orthogonalize_checkpoint`, `write_adapter`,
`revert_checkpoint`, `evaluate_model`, `audit_model`, `trace_direction`, `push_checkpoint`, and
`Direction`. Importing this package is light; torch is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from abliterate._version import __version__

if TYPE_CHECKING:
    from abliterate.directions import Direction, load_direction
    from abliterate.editing.adapter import write_adapter
    from abliterate.editing.orthogonalization import orthogonalize_checkpoint
    from abliterate.evaluation.auditing import audit_model
    from abliterate.evaluation.run import evaluate_model
    from abliterate.extraction.run import extract_direction
    from abliterate.interventions.tracing import trace_direction
    from abliterate.release.publishing import push_checkpoint
    from abliterate.release.reverting import revert_checkpoint

__all__ = [
    "Direction",
    "__version__",
    "audit_model",
    "evaluate_model",
    "extract_direction",
    "load_direction",
    "orthogonalize_checkpoint",
    "push_checkpoint",
    "revert_checkpoint",
    "trace_direction",
    "write_adapter",
]

_HOMES = {
    "Direction": "abliterate.directions",
    "load_direction": "abliterate.directions",
    "audit_model": "abliterate.evaluation.auditing",
    "evaluate_model": "abliterate.evaluation.run",
    "extract_direction": "abliterate.extraction.run",
    "orthogonalize_checkpoint": "abliterate.editing.orthogonalization",
    "push_checkpoint": "abliterate.release.publishing",
    "revert_checkpoint": "abliterate.release.reverting",
    "trace_direction": "abliterate.interventions.tracing",
    "write_adapter": "abliterate.editing.adapter",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'abliterate' has no attribute {name!r}")
