"""Write docs/schemas anew: the JSON Schema of each document that `--json` prints.

    python -m scripts.schemas

Keys and their types are those of the reports, which are dataclasses; descriptions are from their docstrings, or the
help of an option. What a command prints beside its report, and what a `to_json` lists, stands in the tables below. A
test holds the files to this, and what the commands print to the files.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from abliterate.architectures.writers import ResidualWriter
from abliterate.arguments import arguments_of
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.cli.output import SCHEMAS
from abliterate.editing.edits import TensorEdit
from abliterate.editing.plan_report import PlanReport
from abliterate.editing.record import EditedTensor, OrthogonalizationReport
from abliterate.evaluation.audit_report import AuditReport
from abliterate.evaluation.report import EvaluationReport
from abliterate.extraction.judgement import RefusalEvidence
from abliterate.extraction.options import Thresholds
from abliterate.extraction.report import Baseline, ExtractionReport, RepairReport
from abliterate.extraction.selection import CandidateScore, Nearest
from abliterate.files import write_file
from abliterate.inspection.report import InspectionReport
from abliterate.interventions.chatting import Turn
from abliterate.interventions.hook_export import HookExport
from abliterate.interventions.refinement_report import RefinementReport
from abliterate.interventions.trace_report import TraceReport
from abliterate.models.conversion import ConversionReport
from abliterate.models.demo import DemoReport
from abliterate.prompt_sets import PromptSetInfo
from abliterate.release.file_checks import TensorCheck
from abliterate.release.gates import Comparison, GateResult
from abliterate.release.inspection_runs import RunReading
from abliterate.release.publishing import PushReport
from abliterate.release.recorded_edits import RecordedTensor
from abliterate.release.report import VerificationReport
from abliterate.release.reverting import RevertReport

DIRECTORY = Path(__file__).parents[1] / "docs" / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key of an object: the type of its value, what that is, and whether the key is always there."""

    type: Any
    description: str = ""
    always: bool = True


_FILE = Key(type=Path, description="The direction file that was written; of several the best.")
_GATES = Key(type=tuple[GateResult, ...], description="What each --fail-if found; not there without one.", always=False)
_ERRORS = (
    "A class of `abliterate.errors`, such as InputError; UsageError where the arguments are wrong; Interrupted or "
    "Terminated after a signal; UnexpectedError for what nobody foresaw."
)
_NOT_FOUND = {
    "error": Key(type=str, description="What went wrong."),
    "thresholds": Key(type=Thresholds, description="As asked for; that of induce counts from `refusal.zero`."),
    "baseline": Key(type=Baseline, description="The unchanged model."),
    "refusal": Key(type=RefusalEvidence, description="How prompts were found to be refused."),
    "nearest": Key(type=list[Nearest], description="The candidates that are closest to passing, the closest first."),
    "best": Key(type=dict[str, CandidateScore], description="bypass, induce, kl -> the candidate that is best by it."),
    "accepting": Key(type=list[str], description="Arguments that accept the nearest; empty where none do."),
}
_CONVERSATION = {
    "model": Key(type=str, description="The model that is edited."),
    "base": Key(type=str | None, description="What it is compared with; None: itself, left alone."),
    "direction_sha256": Key(type=str | None, description="Of the direction; None without one."),
    "max_new_tokens": Key(type=int, description="The longest reply."),
    "turns": Key(type=list[Turn], description="Messages and replies."),
}
# Document -> its report, or a sentence where it is none; and the keys beside it.
DOCUMENTS: Mapping[str, tuple[type | str, Mapping[str, Key]]] = {
    "audit": (AuditReport, {"gates": _GATES}),
    "chat": ("A conversation.", _CONVERSATION),
    "convert": (ConversionReport, {}),
    "demo": (DemoReport, {}),
    "evaluate": (
        EvaluationReport,
        {
            "against": Key(
                type=tuple[Comparison, ...],
                description="This report beside that of --against; not there without one.",
                always=False,
            ),
            "gates": _GATES,
        },
    ),
    "error": (
        "What went wrong where that left nothing to report: with --json, of any command.",
        {
            "error": Key(type=str, description=_ERRORS),
            "message": Key(type=str, description="What, where, and what to do: the line that stderr has, too."),
            "exit_code": Key(type=int, description="What the command ended with."),
        },
    ),
    "extract": (
        ExtractionReport,
        {
            "direction_file": _FILE,
            "direction_files": Key(type=list[Path], description="All that were written, the best first."),
        },
    ),
    "extract.not_found": ("What is nearest where no candidate passes the selection (exit code 3).", _NOT_FOUND),
    "extract.repair": (RepairReport, {"direction_file": _FILE}),
    "orthogonalize": (OrthogonalizationReport, {}),
    "inspect": (
        InspectionReport,
        {
            "gates": _GATES,
            "run": Key(type=RunReading, description="What both models did; not there without --run.", always=False),
        },
    ),
    "orthogonalize.hooks": (HookExport, {}),
    "plan": (PlanReport, {}),
    "prompts": (
        "The bundled prompt sets.",
        {
            "sets": Key(type=tuple[PromptSetInfo, ...], description="All, or those of --kind."),
            "problems": Key(type=tuple[str, ...], description="What is wrong with them, a line each."),
        },
    ),
    "prompts.set": (PromptSetInfo, {"first": Key(type=tuple[str, ...], description="The first prompts.")}),
    "push": (PushReport, {}),
    "refine": (
        RefinementReport,
        {"strengths_file": Key(type=Path, description="The file of strengths that was written.")},
    ),
    "revert": (RevertReport, {}),
    "trace": (TraceReport, {}),
    "verify": (VerificationReport, {}),
}
_DESCRIBED = {
    "name": (TensorEdit, "name"),
    "role": (ResidualWriter, "role"),
    "layer": (ResidualWriter, "layer"),
    "residual_axis": (ResidualWriter, "residual_axis"),
    "shape": (TensorInfo, "shape"),
    "dtype": (TensorEdit, "stored_dtype"),
    "shard": (TensorInfo, "shard"),
}
_MEASURED = ("component_before", "component_after", "survivor")
# A class with a `to_json` -> the keys that this returns, each with the field or property that it is.
LISTED: Mapping[type, Mapping[str, tuple[type, str]]] = {
    TensorEdit: {**_DESCRIBED, "bytes": (TensorEdit, "nbytes"), "norm_chain": (ResidualWriter, "norm_chain")},
    EditedTensor: {
        **_DESCRIBED,
        "stored_as": (TensorEdit, "stored_as"),
        "norm_chain": (ResidualWriter, "norm_chain"),
        "kind": (TensorEdit, "kind"),
        **{name: (EditedTensor, name) for name in _MEASURED},
    },
    TensorCheck: {
        "name": (TensorCheck, "name"),
        "role": (ResidualWriter, "role"),
        "layer": (ResidualWriter, "layer"),
        "kind": (RecordedTensor, "kind"),
        "dtype": (TensorCheck, "dtype"),
        **{name: (EditedTensor, name) for name in _MEASURED},
        "expected": (TensorCheck, "expected"),
        "bound": (TensorCheck, "bound"),
    },
}
# Of a number that is not finite a report holds null.
_PLAIN: Mapping[Any, Mapping[str, Any]] = {
    str: {"type": "string"},
    Path: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": ["number", "null"]},
    NoneType: {"type": "null"},
    Any: {},
}


def schema_of(name: str) -> dict[str, Any]:
    """Return the schema of one document."""
    report, more = DOCUMENTS[name]
    title = f"abliterate.{name}/{SCHEMAS[name]}"
    definitions = _Definitions()
    keys = {**({} if isinstance(report, str) else _keys(report)), **more}
    content = definitions.object_of(report if isinstance(report, str) else _summary(report), keys)
    marked = {"schema": {"const": title, "description": "Which document this is, and its number."}}
    return {
        "$schema": DIALECT,
        "title": title,
        **content,
        "properties": marked | content["properties"],
        "required": ["schema", *content["required"]],
        "$defs": dict(sorted(definitions.schemas.items())),
    }


def files() -> dict[str, str]:
    """Return the name and the content of each file."""
    return {
        f"{name}.json": json.dumps(schema_of(name), indent=2, ensure_ascii=False) + "\n" for name in sorted(DOCUMENTS)
    }


class _Definitions:
    """The schemas of all classes that one document holds, each said once."""

    def __init__(self) -> None:
        self.schemas: dict[str, Any] = {}
        self._classes: dict[str, type] = {}

    def of(self, kind: Any) -> dict[str, Any]:
        """Return the schema of a type."""
        origin, parts = get_origin(kind), get_args(kind)
        if origin in {Union, UnionType}:
            return _any_of([self.of(part) for part in parts])
        if origin is Literal:
            return {"enum": list(parts)}
        if origin is tuple and parts[-1] is not Ellipsis:
            items = [self.of(part) for part in parts]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        if origin in {tuple, list, Sequence}:
            return {"type": "array", "items": self.of(parts[0])}
        if origin in {dict, Mapping}:
            return {"type": "object", "additionalProperties": self.of(parts[1])}
        is_class = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        return self._reference(kind) if is_class else dict(_PLAIN[kind])

    def object_of(self, description: str, keys: Mapping[str, Key]) -> dict[str, Any]:
        """Return the schema of an object that has these keys and no others."""
        properties = {}
        for name, key in keys.items():
            properties[name] = self.of(key.type) | ({"description": key.description} if key.description else {})
        return {
            "description": description,
            "type": "object",
            "properties": properties,
            "required": [name for name, key in keys.items() if key.always],
            "additionalProperties": False,
        }

    def _reference(self, owner: type) -> dict[str, Any]:
        name = owner.__name__
        if self._classes.setdefault(name, owner) is not owner:
            raise ValueError(f"two classes of one document are called {name}; give one of them another name")
        if name not in self.schemas:
            self.schemas[name] = {}  # it may hold itself
            self.schemas[name] = self.object_of(_summary(owner), _keys(owner))
        return {"$ref": f"#/$defs/{name}"}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of what one of some schemas takes; where these name types alone, in one list of types."""
    names: list[str] = []
    more = []
    for each in schemas:
        if each.keys() == {"type"}:
            names += [each["type"]] if isinstance(each["type"], str) else each["type"]
        else:
            more.append(each)
    types = list(dict.fromkeys(names))
    joined = {"type": types[0] if len(types) == 1 else types}
    return {"anyOf": [*more, *([joined] if types else [])]} if more else joined


def _keys(owner: type) -> dict[str, Key]:
    """Return the keys that an object of a class has in a document."""
    if owner in LISTED:
        return {name: _attribute(*source) for name, source in LISTED[owner].items()}
    if hasattr(owner, "to_json"):
        raise ValueError(f"{owner.__name__} says itself how it is listed; add its keys to LISTED")
    return {field.name: _attribute(owner, field.name) for field in dataclasses.fields(owner)}


def _attribute(owner: type, name: str) -> Key:
    """Return the type and the description of a field or a property."""
    found = inspect.getattr_static(owner, name, None)
    if isinstance(found, property) and found.fget is not None:
        return Key(type=_hints(found.fget)["return"], description=inspect.getdoc(found) or "")
    argument = arguments_of(owner).get(name)
    description = _descriptions(owner).get(name) or (argument.help if argument else "")
    return Key(type=_hints(owner)[name], description=description)


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    """Return the annotations of a class or a function as types."""
    return get_type_hints(owner, _names(owner.__module__))


@functools.cache
def _names(module_name: str) -> dict[str, Any]:
    """Return the names of a module, with those that it imports for type checkers alone."""
    module = sys.modules[module_name]
    names = dict(vars(module))
    for block in ast.parse(inspect.getsource(module)).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for node in block.body:
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("abliterate."):
                    imported = importlib.import_module(node.module or "")
                    names |= {alias.asname or alias.name: getattr(imported, alias.name) for alias in node.names}
    return names


def _summary(owner: type) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(owner) or "").partition("\n\n")[0].split())


def _descriptions(owner: type) -> dict[str, str]:
    """Return what the section `Attributes:` of a docstring says of each field."""
    section = (inspect.getdoc(owner) or "").partition("\nAttributes:\n")[2]
    # Another section would begin at the margin.
    section = re.split(r"(?m)^\S", section)[0]
    entries = re.findall(r"(?m)^    (\w+): (.*(?:\n {8}.*)*)", section)
    return {name: " ".join(text.split()) for name, text in entries}


def main() -> int:
    """Write all files, and take away those of documents that are no more."""
    made = files()
    for path in DIRECTORY.glob("*.json"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        write_file(DIRECTORY / name, text)
    print(f"{DIRECTORY}: {len(made)} schemas", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
