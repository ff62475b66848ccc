"""What was done to a model, in one word, and the thresholds that make it.

identical      every number is the base's, whatever it is stored as
requantised    numbers were rounded to another grid, and nothing else
directional    directions were projected out, or one was added by a bias, and nothing else
low_rank       the change of every matrix has a low rank, as a merged LoRA adapter has
fine_tuned     more than that was changed
unrelated      it is not made from this base
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from abliterate.architectures.writers import StreamMap
from abliterate.inspection.change import ABOVE_ROUNDING
from abliterate.inspection.consensus import AGREES, Consensus, Norm, Projected, as_written, find_consensus
from abliterate.inspection.findings import Finding
from abliterate.inspection.numbers import Array
from abliterate.inspection.pairing import Pairing
from abliterate.inspection.report import Verdict

STRENGTH_TOLERANCE = 0.02
_MOST_LEFT = 0.05
# Two models trained apart differ by about 1.4 of the norm.
_UNRELATED, _LEAST_SHARED = 0.9, 0.5
# A vector without its part along the directions is the base's to this share of the change.
_VECTOR_REST = 0.1
# Sine of the angle by which a tensor's own directions may be off before they are measured along the common ones.
_WELL_KNOWN = 3e-3


def thresholds() -> dict[str, float]:
    """Return what the verdict is made by."""
    return {
        "unrelated_change": _UNRELATED,
        "least_shared": _LEAST_SHARED,
        "above_rounding": ABOVE_ROUNDING,
        "least_cosine": AGREES,
        "strength_tolerance": STRENGTH_TOLERANCE,
        "most_left": _MOST_LEFT,
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judgement:
    """What was done.

    Attributes:
        verdict: In one word.
        reason: Why, in words.
        exact: Whether every writer was edited whole.
        partial: Whether the change is directional and not exact.
        restored_norms: Whether lengths were restored.
        consensus: The directions; None where nothing was projected or added.
        strengths: Tensor -> how strongly the directions were projected out of it.
        findings: The edited tensors; what is left of the directions measured better than before.
        added: Tensor of the model alone that is not zero -> its length.
    """

    verdict: Verdict
    reason: str
    exact: bool = False
    partial: bool = False
    restored_norms: bool = False
    consensus: Consensus | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    added: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evidence:
    """What a verdict is made of.

    Attributes:
        findings: What became of each tensor that both have.
        pairing: Which those are.
        stream: What the base's tensors are; None where that is not known.
        norms: Tensor of the base -> norms between it and the stream.
        shared: Share of the base's numbers that the model has a tensor for.
        added: Tensor of the model alone -> its length; None where it is no vector that a bias adds to the stream.
        added_vectors: The vectors of those that are.
        measure: Measures a finding along directions as its tensor writes them.
    """

    findings: Sequence[Finding]
    pairing: Pairing
    stream: StreamMap | None
    norms: Mapping[str, tuple[Norm, ...]]
    shared: float
    added: Mapping[str, float | None]
    added_vectors: Mapping[str, Array]
    measure: Callable[[Finding, Array], Finding]


def judge(evidence: Evidence) -> Judgement:
    """Return what was done."""
    edited = [finding for finding in evidence.findings if finding.is_edited]
    alone = _alone(evidence)
    placed = f"only {evidence.shared:.0%} of the base's numbers have a place in the model: other names or shapes"
    if evidence.shared < _LEAST_SHARED:
        if not _is_kin(evidence):
            return Judgement(verdict="unrelated", reason=placed)
        alone = placed if alone is None else f"{placed} ({alone})"
    moved = math.hypot(*(finding.change for finding in edited)) if edited else 0.0
    norm = math.hypot(*(finding.norm for finding in edited)) if edited else 0.0
    if norm and moved / norm > _UNRELATED and len(edited) > len(evidence.findings) / 2:
        return Judgement(
            verdict="unrelated", reason=f"the numbers differ by {moved / norm:.2f} of their norm: two models"
        )
    if not edited and not alone and not evidence.added_vectors:
        return _unedited(evidence)
    return _edited(evidence, edited, alone)


def _is_kin(evidence: Evidence) -> bool:
    """Return whether most of the matrices that both have are the base's, or were made from them."""
    matrices = [finding for finding in evidence.findings if len(finding.pair.new.shape) > 1]
    near = [each for each in matrices if each.status != "changed" or 0 < each.change <= _UNRELATED * each.norm]
    return len(near) > len(matrices) / 2


def _alone(evidence: Evidence) -> str | None:
    """Return in words which tensors one of the two alone has, or in another shape."""
    counts = (
        (sum(length is None for length in evidence.added.values()), "added"),
        (len(evidence.pairing.missing), "missing"),
        (len(evidence.pairing.reshaped), "of another shape"),
    )
    return ", ".join(f"{count} tensors {what}" for count, what in counts if count) or None


def _unedited(evidence: Evidence) -> Judgement:
    rounded = sum(finding.kind == "rounded" for finding in evidence.findings)
    if rounded:
        return Judgement(
            verdict="requantised", reason=f"{rounded} tensors were rounded to another grid; nothing else differs"
        )
    numbers = sum(finding.status == "equal_numbers" for finding in evidence.findings)
    more = f", {numbers} of them in other bytes" if numbers else ""
    return Judgement(verdict="identical", reason=f"all {len(evidence.findings)} tensors have the same numbers{more}")


def _edited(evidence: Evidence, edited: Sequence[Finding], alone: str | None) -> Judgement:
    consensus, strengths, edited = _directions(evidence, edited)
    explained = {finding.pair.new.name for finding in _explained_vectors(evidence, edited, consensus)}
    matrices = [finding for finding in edited if len(finding.pair.new.shape) > 1]
    left_over = [finding for finding in edited if _is_left_over(finding, explained)]
    kinds = {finding.kind for finding in matrices}
    rest = {
        "consensus": consensus,
        "strengths": strengths,
        "findings": tuple(edited),
        "added": _lengths(evidence),
    }
    if alone or "dense" in kinds or (matrices and left_over):
        dense = sum(finding.kind == "dense" for finding in matrices)
        said = [f"{dense} matrices changed in full rank"] if dense else []
        said += [f"{len(left_over)} vectors changed"] if left_over else []
        said += [alone] if alone else []
        also = sum(bool(finding.projections) for finding in matrices)
        said += [f"directions were projected out of {also} matrices besides"] if also else []
        return Judgement(verdict="fine_tuned", reason="; ".join(said), **rest)  # type: ignore[arg-type]
    if not matrices:
        return _vectors_alone(evidence, edited)
    if "low_rank" in kinds:
        count = sum(finding.kind == "low_rank" for finding in matrices)
        ranks = [finding.rank or 0 for finding in matrices if finding.kind == "low_rank"]
        reason = f"{count} matrices changed in rank {min(ranks)} to {max(ranks)}, and no projection is seen in that"
        return Judgement(verdict="low_rank", reason=reason, **rest)  # type: ignore[arg-type]
    return _directional(evidence, matrices, consensus, strengths)


def _is_left_over(finding: Finding, explained: Collection[str]) -> bool:
    return len(finding.pair.new.shape) < 2 and finding.pair.new.name not in explained


def _lengths(evidence: Evidence) -> dict[str, float]:
    return {name: length for name, length in evidence.added.items() if length}


def _directions(
    evidence: Evidence, edited: Sequence[Finding]
) -> tuple[Consensus | None, dict[str, float], list[Finding]]:
    """Return the common directions, how strongly each tensor was edited, and the findings, better measured."""
    projected = []
    for finding in edited:
        if finding.projections and finding.writer is not None:
            norms = evidence.norms.get(finding.pair.old.name, ())
            projected += [
                Projected(
                    name=finding.pair.new.name,
                    role=finding.writer.role,
                    layer=finding.layer,
                    projection=each,
                    norms=norms if _along_stream(finding, each) else (),
                )
                for each in finding.projections
            ]
    if not projected:
        # Of an architecture that is not known, or of readers alone: whatever lies along the stream's width.
        projected = [
            Projected(name=finding.pair.new.name, role="mlp", layer=finding.layer, projection=each)
            for finding in edited
            for each in finding.projections
        ]
    widths = {len(each.projection.vectors) for each in projected}
    consensus = find_consensus(projected) if len(widths) == 1 else None
    better = [_measured(evidence, finding, consensus) for finding in edited]
    strengths = {finding.pair.new.name: _strength(finding) for finding in better if finding.projections}
    return consensus, strengths, better


def _measured(evidence: Evidence, finding: Finding, consensus: Consensus | None) -> Finding:
    """Return a finding measured along the common directions, where its own are known less well than those."""
    name = finding.pair.new.name
    if consensus is None or consensus.scope != "one" or name not in consensus.agreeing:
        return finding
    if all(each.error < _WELL_KNOWN for each in finding.projections):
        return finding
    norms = evidence.norms.get(finding.pair.old.name, ()) if consensus.through_norms else ()
    return evidence.measure(finding, as_written(consensus.vectors, norms))


def _strength(finding: Finding) -> float:
    weights = [each.before_squared for each in finding.projections]
    both = zip(finding.projections, weights, strict=True)
    return sum(each.strength * weight for each, weight in both) / max(sum(weights), 1e-300)


def _along_stream(finding: Finding, projection: object) -> bool:
    assert finding.writer is not None
    axis = finding.writer.residual_axis - (len(finding.pair.new.shape) - 2)
    return getattr(projection, "axis", None) == axis


def _explained_vectors(evidence: Evidence, edited: Sequence[Finding], consensus: Consensus | None) -> list[Finding]:
    """Return the vectors that write to the stream and out of which the directions were projected, too."""
    if consensus is None:
        return []
    return [
        finding
        for finding in edited
        if finding.vectors is not None and _is_projected(evidence, finding, consensus) is not None
    ]


def _is_projected(evidence: Evidence, finding: Finding, consensus: Consensus) -> float | None:
    """Return the strength with which the directions were projected out of a vector; None: that was not done."""
    assert finding.vectors is not None
    old, change = finding.vectors
    norms = evidence.norms.get(finding.pair.old.name, ()) if consensus.through_norms else ()
    basis = as_written(consensus.of(finding.layer), norms)
    before, moved = basis @ old, basis @ change
    rest, across = change - basis.T @ moved, old - basis.T @ before
    # Where lengths were restored, what is left is a multiple of the vector.
    if across.any():
        rest = rest - across * float(rest @ across) / float(across @ across)
    if _norm(rest) > _VECTOR_REST * _norm(change) + ABOVE_ROUNDING * finding.rounding:
        return None
    squared = float(before @ before)
    return -float(moved @ before) / squared if squared else 0.0


def _norm(vector: Array) -> float:
    return float(np.linalg.norm(vector))


def _vectors_alone(evidence: Evidence, edited: Sequence[Finding]) -> Judgement:
    """Judge a change of vectors alone: one direction that a bias adds, or more than that."""
    vectors = {finding.pair.new.name: finding.vectors[1] for finding in edited if finding.vectors is not None}
    vectors |= dict(evidence.added_vectors)
    if len(vectors) == 1 and all(finding.vectors is not None for finding in edited):
        (name, vector), *_ = vectors.items()
        length = _norm(vector)
        consensus = Consensus(
            vectors=(vector / length)[None],
            scope="one",
            through_norms=None,
            cosines={name: 1.0},
            agreeing=frozenset({name}),
        )
        return Judgement(
            verdict="directional",
            reason=f"{name} adds a vector of length {length:.4g} to the stream; nothing was projected",
            partial=True,
            consensus=consensus,
            added={name: length},
        )
    return Judgement(
        verdict="fine_tuned",
        reason=f"{len(edited) + len(evidence.added_vectors)} vectors changed and no matrix",
        added=_lengths(evidence),
    )


def _directional(
    evidence: Evidence, matrices: Sequence[Finding], consensus: Consensus | None, strengths: Mapping[str, float]
) -> Judgement:
    kept = sum(any(each.kept for each in finding.projections) for finding in matrices)
    restored = kept > len(matrices) / 2
    lacks = _lacks(evidence, matrices, consensus, strengths)
    k = 0 if consensus is None else len(consensus.vectors)
    what = f"{k} directions were" if k > 1 else "a direction was"
    if consensus is not None and consensus.scope == "per_layer":
        what = "a direction of each layer's own was"
    elif consensus is not None and consensus.scope == "several":
        what = "directions that differ from tensor to tensor were"
    values = list(strengths.values())
    said = [f"{what} projected out of {len(matrices)} matrices, strength {_range(values)}"]
    if restored:
        kinds = sorted({each.kept for finding in matrices for each in finding.projections if each.kept})
        said.append(f"lengths of {' and '.join(_KEPT[each] for each in kinds)} were restored")
    said += lacks or ["every writer of the stream was edited whole"]
    return Judgement(
        verdict="directional",
        reason="; ".join(said),
        exact=not lacks,
        partial=bool(lacks),
        restored_norms=restored,
        consensus=consensus,
        strengths=strengths,
        findings=tuple(matrices),
        added=_lengths(evidence),
    )


_KEPT = {"columns": "columns", "rows": "rows", "whole": "whole matrices"}


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if high - low < 0.005 else f"{low:.3f} to {high:.3f}"


def _lacks(
    evidence: Evidence, matrices: Sequence[Finding], consensus: Consensus | None, strengths: Mapping[str, float]
) -> list[str]:
    """Return why the stream may still have the directions; empty if every writer was edited whole."""
    if consensus is None or evidence.stream is None:
        return ["which tensors write to the stream is not known"]
    found = []
    if consensus.scope != "one" or len(consensus.agreeing) < len(consensus.cosines):
        found.append("not all tensors have the same directions")
    if consensus.through_norms is False:
        found.append("norms behind the writers were not seen through")
    if any(not finding.projections or _is_other(finding) for finding in matrices):
        found.append("some were edited along the axis that is not the stream's")
    weak = [name for name, value in strengths.items() if abs(value - 1) > STRENGTH_TOLERANCE]
    if weak:
        found.append(f"{len(weak)} of them not whole")
    back = [each.left for finding in matrices for each in finding.projections]
    by_rows = any(each.kept == "rows" for finding in matrices for each in finding.projections)
    if not weak and back and (max(back) > _MOST_LEFT or by_rows):
        found.append(f"up to {max(back):.1%} of the component came back")
    untouched = _untouched(evidence, consensus)
    if untouched:
        found.append(f"{len(untouched)} writers were left as they were")
    if evidence.stream.remainder is not None:
        found.append(f"no edit cleans its stream whole: {evidence.stream.remainder.reason}")
    return found


def _is_other(finding: Finding) -> bool:
    return finding.writer is not None and not all(_along_stream(finding, each) for each in finding.projections)


def _untouched(evidence: Evidence, consensus: Consensus) -> list[str]:
    """Return the writers that were not edited and have something of the directions."""
    names = []
    for finding in evidence.findings:
        if finding.writer is None or finding.projections or finding.pair.is_copy:
            continue
        if finding.vectors is not None:
            old, change = finding.vectors
            norms = evidence.norms.get(finding.pair.old.name, ()) if consensus.through_norms else ()
            basis = as_written(consensus.of(finding.layer), norms)
            by_chance = _norm(old) / math.sqrt(len(old))
            most = _MOST_LEFT * max(_norm(basis @ old), by_chance)
            if _norm(basis @ (old + change)) <= most:
                continue
        names.append(finding.pair.new.name)
    return names
