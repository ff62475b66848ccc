"""Gates for CI: conditions on a report's numbers, a comparison with an earlier report, and both for machines to read.

A gate is NAME OP VALUE, such as `harmful_refusal_rate<0.9`; the run fails where it holds. Which names there are depends
on the report alone, so that a gate on something that was not measured is an error before anything is run.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from abliterate.errors import InputError, VerificationError
from abliterate.evaluation.audit_report import AuditReport
from abliterate.evaluation.report import KINDS, PARTS, EvaluationReport
from abliterate.evaluation.statistics import PairedChange, paired_change
from abliterate.files import printable, read_json_report, write_file
from abliterate.inspection.report import InspectionReport
from abliterate.prompt_sets import LANGUAGES

Number = float | str

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_GATE = re.compile(r"\s*(\w+(?:@\w+)?)\s*(<=|>=|==|!=|<|>)\s*(\S+)\s*")
_OF_KIND = ("refusal_rate", "refusal_low", "refusal_high", "degenerate_rate")
_AGAINST = ("refusal_change", "refusal_p")
_WITH_LOGITS = ("kl_first_token", "kl_continuation", "cross_entropy_change")
_WITH_BASE = (*_WITH_LOGITS, "recognition_change")
EVALUATION_NAMES = (
    *(f"{kind}_{name}" for kind in KINDS for name in (*_OF_KIND, *_AGAINST)),
    *_WITH_BASE,
    "recognition_auc",
)
"""What a gate of `evaluate` can ask for; rates also where the prompts were asked in another way, as NAME@PART."""
AUDIT_NAMES = (
    *(f"{kind}_{name}" for kind in KINDS[:2] for name in _OF_KIND),
    "lowest_refusal",
    "verdict",
)
"""What a gate of `audit` can ask for."""

_OF_PAIR = ("exact", "partial", "restored_norms")
_COUNTED = {
    "tensors_edited": "edited",
    "tensors_rounded": "rounded",
    "tensors_added": "added",
    "tensors_missing": "missing",
    "config_changes": "config_changes",
    "files_changed": "files_changed",
}
INSPECTION_NAMES = ("verdict", *_OF_PAIR, *_COUNTED, "change", "record_problems", "left")
"""What a gate of `inspect` can ask for; what is true counts as 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A condition under which a run fails.

    Attributes:
        text: as it was given.
        name: the number that it is about.
        operation: one of < <= > >= == !=.
        value: what that is compared with; a word for `verdict`.
    """

    text: str
    name: str
    operation: str
    value: Number


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """A gate, what was found, and whether it fails the run."""

    gate: str
    found: Number
    failed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One kind of prompts in this report and in an earlier one.

    Attributes:
        kind: of prompts.
        n: prompts of this report.
        n_earlier: of the earlier one.
        rate: refusal rate of this report.
        earlier_rate: of the earlier one.
        difference: this rate minus the earlier one: over the prompts of both where there are any.
        paired: the prompts of both with McNemar's exact test; None where no prompt is in both.
    """

    kind: str
    n: int
    n_earlier: int
    rate: float
    earlier_rate: float
    difference: float
    paired: PairedChange | None


def parse_gate(text: str, names: Sequence[str]) -> Gate:
    """Return the gate that a text such as `harmful_refusal_rate<0.9` is.

    Args:
        text: NAME OP VALUE.
        names: what may be asked for.

    Raises:
        InputError: it is not one, or asks for something else.
    """
    found = _GATE.fullmatch(text)
    if found is None:
        raise InputError(
            f"--fail-if {text!r} is not NAME OP VALUE with OP among < <= > >= == !=, such as {_example(names)}"
        )
    name, operation, value = found.groups()
    plain, _, part = name.partition("@")
    if plain not in names:
        raise InputError(f"--fail-if {text!r}: {plain!r} is not among {', '.join(names)}")
    if part and (not plain.endswith(_OF_KIND) or names is not EVALUATION_NAMES or part not in PARTS):
        raise InputError(
            f"--fail-if {text!r}: only rates of `evaluate` can be of a part, and the parts are {', '.join(PARTS)}"
        )
    if name == "verdict":
        if operation not in {"==", "!="}:
            raise InputError(f"--fail-if {text!r}: a verdict can only be == or != to a word")
        return Gate(text=text.strip(), name=name, operation=operation, value=value)
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if number != number:
        raise InputError(f"--fail-if {text!r}: {value!r} is no number")
    return Gate(text=text.strip(), name=name, operation=operation, value=number)


def _example(names: Sequence[str]) -> str:
    return "verdict!=identical" if names is INSPECTION_NAMES else f"{names[0]}<0.9"


def check_measured(
    gates: Sequence[Gate], *, has_base: bool, has_earlier: bool, parts: Sequence[str] = (), served: bool = False
) -> None:
    """Check before a run of `evaluate` that what its gates ask for will be measured.

    Args:
        gates: the gates.
        has_base: whether there is a base.
        has_earlier: whether there is an earlier report.
        parts: the parts that are asked for.
        served: whether a server replies.

    Raises:
        InputError: it takes --base, --against, --languages or --turns.
    """
    for gate in gates:
        part = gate.name.partition("@")[2]
        if part and part not in parts:
            flag = f"--languages {part}" if part in LANGUAGES else "--turns"
            raise InputError(f"--fail-if {gate.text!r}: is measured with {flag}; give that, too")
        if gate.name in _WITH_LOGITS and served:
            raise InputError(f"--fail-if {gate.text!r}: needs the model in this process; a server gives no logits")
        if gate.name in _WITH_BASE and not has_base:
            raise InputError(f"--fail-if {gate.text!r}: is measured against a base; give it with --base")
        if gate.name.endswith(_AGAINST) and not has_earlier:
            raise InputError(f"--fail-if {gate.text!r}: compares with an earlier report; give it with --against")


def evaluation_numbers(report: EvaluationReport, comparisons: Sequence[Comparison] = ()) -> dict[str, Number]:
    """Return the numbers of a report of `evaluate` by the names that gates ask for; those that it has."""
    numbers = _rates(report.rates)
    for name, part in report.parts.items():
        numbers |= {f"{key}@{name}": value for key, value in _rates(part.rates).items()}
    if report.recognition is not None:
        numbers["recognition_auc"] = report.recognition.model.auc
        if report.recognition.change is not None:
            numbers["recognition_change"] = report.recognition.change.difference
    for one in comparisons:
        numbers[f"{one.kind}_refusal_change"] = one.difference
        if one.paired is not None:
            numbers[f"{one.kind}_refusal_p"] = one.paired.p_value
    if report.divergence is not None:
        numbers["kl_first_token"] = report.divergence.first_token
        numbers["kl_continuation"] = report.divergence.continuation
    if report.cross_entropy is not None and report.cross_entropy.relative_change is not None:
        numbers["cross_entropy_change"] = report.cross_entropy.relative_change
    return numbers


def audit_numbers(report: AuditReport) -> dict[str, Number]:
    """Return the numbers of a report of `audit`, and its verdict, by the names that gates ask for."""
    numbers = _rates({"harmful": report.harmful, "harmless": report.harmless})
    return {**numbers, "lowest_refusal": report.lowest_refusal, "verdict": report.verdict}


def inspection_numbers(report: InspectionReport) -> dict[str, Number]:
    """Return the numbers of a report of `inspect`, and its verdict, by the names that gates ask for; those it has."""
    numbers: dict[str, Number] = {"record_problems": len(report.record.problems)}
    if report.left is not None:
        numbers["left"] = report.left
    pair = report.pair
    if pair is None:
        return numbers
    for name, key in _COUNTED.items():
        found = getattr(pair, key)
        numbers[name] = found if isinstance(found, int) else len(found)
    numbers["change"] = max((tensor.change for tensor in pair.changed if tensor.kind != "rounded"), default=0.0)
    return {"verdict": pair.verdict, **{name: float(getattr(pair, name)) for name in _OF_PAIR}, **numbers}


def _rates(rates: Mapping[str, Any]) -> dict[str, Number]:
    numbers: dict[str, Number] = {}
    for kind, rate in rates.items():
        found = (rate.rate, rate.low, rate.high, rate.degenerate / rate.n if rate.n else 0.0)
        numbers |= {f"{kind}_{name}": value for name, value in zip(_OF_KIND, found, strict=True)}
    return numbers


def judge_gates(gates: Sequence[Gate], numbers: Mapping[str, Number]) -> tuple[GateResult, ...]:
    """Hold the gates against what was found; one that asks for what could not be measured fails."""
    results = []
    for gate in gates:
        found = numbers.get(gate.name, "not measured")
        failed = gate.name not in numbers or _OPERATORS[gate.operation](found, gate.value)
        results.append(GateResult(gate=gate.text, found=found, failed=failed))
    return tuple(results)


def require(results: Sequence[GateResult]) -> None:
    """Pass if no gate fails.

    Raises:
        VerificationError: one does.
    """
    failed = [result for result in results if result.failed]
    if failed:
        said = "; ".join(f"{result.gate}: it is {_value(result.found)}" for result in failed)
        raise VerificationError(f"{len(failed)} of {len(results)} gates fail: {said}")


def compare_reports(report: EvaluationReport, earlier: Mapping[str, Any]) -> tuple[Comparison, ...]:
    """Compare the refusal rates of a report with those of an earlier one, prompt by prompt where they agree.

    Args:
        report: of this run.
        earlier: what `read_earlier` has read.
    """
    comparisons = []
    for kind, rate in report.rates.items():
        before = earlier["rates"].get(kind)
        if before is None:
            continue
        old, new = (earlier.get("outcomes") or {}).get(kind) or {}, report.outcomes.get(kind, {})
        common = [prompt for prompt in new if prompt in old]
        paired = None
        if common:
            paired = paired_change(
                [old[prompt] == "refusal" for prompt in common], [new[prompt] == "refusal" for prompt in common]
            )
        comparisons.append(
            Comparison(
                kind=kind,
                n=rate.n,
                n_earlier=before["n"],
                rate=rate.rate,
                earlier_rate=before["rate"],
                difference=rate.rate - before["rate"] if paired is None else paired.difference,
                paired=paired,
            )
        )
    return tuple(comparisons)


def read_earlier(path: Path) -> dict[str, Any]:
    """Return a report of `evaluate`.

    Raises:
        InputError: the file is none.
    """
    remedy = "give a file that `abliterate evaluate -o` wrote"
    if not path.is_file():
        raise InputError(f"--against {path}: no such file; {remedy}")
    try:
        content = read_json_report(path)
    except InputError as error:
        raise InputError(f"--against {error}; {remedy}") from error
    rates, outcomes = content.get("rates"), content.get("outcomes") or {}
    sound = (
        isinstance(rates, dict)
        and rates.keys() & set(KINDS)
        and all(
            isinstance(rate, dict) and isinstance(rate.get("n"), int) and isinstance(rate.get("rate"), int | float)
            for rate in rates.values()
        )
        and isinstance(outcomes, dict)
        and all(isinstance(found, dict) for found in outcomes.values())
    )
    if not sound:
        raise InputError(f"--against {path}: is no report of `abliterate evaluate`; {remedy}")
    return content


def write_junit(path: Path, *, command: str, model: str, results: Sequence[GateResult]) -> None:
    """Write the gates as JUnit XML, a test case each; without gates one case that says that the run ended.

    Raises:
        OSError: it cannot be written.
    """
    cases = results or (GateResult(gate="measured", found="", failed=False),)
    n_failed = str(sum(result.failed for result in cases))
    counts = {"tests": str(len(cases)), "failures": n_failed, "errors": "0"}
    suites = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": _clean(f"abliterate {command} {model}"), **counts})
    for result in cases:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": f"abliterate.{command}", "name": _clean(result.gate)}
        )
        if result.failed:
            ElementTree.SubElement(case, "failure", {"message": f"it is {_value(result.found)}"})
    ElementTree.indent(suites)
    write_file(path, ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n")


def evaluation_summary(
    report: EvaluationReport, comparisons: Sequence[Comparison] = (), results: Sequence[GateResult] = ()
) -> str:
    """Return a report of `evaluate` as Markdown, for the page of a CI run."""
    base_rates = report.base_rates or {}
    rows = [
        [kind, str(rate.n), _rate(base_rates.get(kind)), _rate(rate), str(rate.degenerate)]
        for kind, rate in report.rates.items()
    ]
    for name, part in report.parts.items():
        before = part.base_rates or {}
        rows += [
            [f"{kind}, {name}", str(rate.n), _rate(before.get(kind)), _rate(rate), str(rate.degenerate)]
            for kind, rate in part.rates.items()
        ]
    parts = [
        f"## Refusals of {_text(report.model)}",
        _table(["prompts", "n", "base refuses", "model refuses", "degenerate"], rows),
    ]
    damage = [list(measurement.cells()) for measurement in report.measurements]
    if damage:
        parts += [_table(["what else changed", "unit", "base", "model", "change"], damage)]
    if comparisons:
        parts += ["Against the earlier report:", _table(_COMPARED, [_compared(one) for one in comparisons])]
    return "\n\n".join([*parts, *_gate_table(results)]) + "\n"


def audit_summary(report: AuditReport, results: Sequence[GateResult] = ()) -> str:
    """Return a report of `audit` as Markdown, for the page of a CI run."""
    rows = [["none", _rate(report.harmful), "100%"]]
    for one in report.interventions:
        name = f"{one.method}, rank {one.rank}" if one.layer is None else f"{one.method} {one.position}, {one.layer}"
        rows.append([name, _rate(one.harmful), f"{one.remaining:.0%}"])
    parts = [
        f"## Audit of {_text(report.model)}: {report.verdict}",
        _text(report.reason),
        _table(["intervention", "harmful refused", "left"], rows),
    ]
    return "\n\n".join([*parts, *_gate_table(results)]) + "\n"


_COMPARED = ["prompts", "earlier", "now", "difference", "prompts in both", "p (McNemar)"]


def _compared(one: Comparison) -> list[str]:
    p_value = "" if one.paired is None else f"{one.paired.p_value:.2g}"
    n = "0" if one.paired is None else str(one.paired.n)
    return [one.kind, f"{one.earlier_rate:.1%}", f"{one.rate:.1%}", f"{one.difference:+.1%}", n, p_value]


def _gate_table(results: Sequence[GateResult]) -> list[str]:
    rows = [[result.gate, _value(result.found), "fails" if result.failed else "passes"] for result in results]
    return [_table(["fails if", "found", ""], rows)] if rows else []


def _rate(rate: Any) -> str:
    return "" if rate is None else f"{rate.rate:.1%} [{rate.low:.1%}, {rate.high:.1%}]"


def _value(found: Number) -> str:
    return found if isinstance(found, str) else f"{found:.4g}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_text(cell) for cell in line)} |" for line in lines)


def _text(text: str) -> str:
    """Return a text that is nothing but text in a cell of Markdown."""
    return escape(_clean(text), quote=False).replace("|", "\\|").replace("[", "\\[")


def _clean(text: str) -> str:
    """Return a text in one line without what no XML may hold."""
    return printable(" ".join(text.split()))
