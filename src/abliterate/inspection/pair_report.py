"""The report of a pair: findings and judgement as plain values."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from abliterate.architectures.writers import StreamMap
from abliterate.inspection.change import WIDE
from abliterate.inspection.findings import Finding
from abliterate.inspection.pairing import Pairing
from abliterate.inspection.report import (
    ChangedTensor,
    LowRankChange,
    PairReading,
    PartName,
    PartReading,
    RecoveredDirections,
)
from abliterate.inspection.verdict import Judgement, thresholds

PARTS: tuple[PartName, ...] = ("embed", "attn", "mlp", "head", "reader", "norm", "tower", "prediction", "other")


def report_pair(
    findings: Sequence[Finding],
    *,
    pairing: Pairing,
    judgement: Judgement,
    shards: int,
    cosines: tuple[float, ...],
    stream: StreamMap | None,
) -> PairReading:
    """Return what was found of a pair; config and other files are not looked at.

    Args:
        findings: What became of each tensor.
        pairing: Which tensors are which.
        judgement: What was done.
        shards: Files of weights of the model.
        cosines: Of given directions with the recovered ones.
        stream: What the base's tensors are; None where that is not known.
    """
    statuses = [finding.status for finding in findings]
    return PairReading(
        verdict=judgement.verdict,
        reason=judgement.reason,
        exact=judgement.exact,
        partial=judgement.partial,
        restored_norms=judgement.restored_norms,
        tensors=len(findings),
        equal_bytes=statuses.count("equal_bytes"),
        equal_numbers=statuses.count("equal_numbers"),
        rounded=sum(finding.kind == "rounded" for finding in findings),
        edited=sum(finding.is_edited for finding in findings),
        shards=shards,
        shards_changed=len({finding.pair.new.shard for finding in findings if finding.status == "changed"}),
        renamed=pairing.renamed,
        fused=pairing.fused,
        added=tuple(info.name for info in pairing.added),
        missing=tuple(info.name for info in pairing.missing),
        reshaped=pairing.reshaped,
        padded={pair.new.name: pair.padding for pair in pairing.pairs if pair.padding},
        copies=tuple(pair.new.name for pair in pairing.pairs if pair.is_copy),
        added_vectors=dict(judgement.added),
        parts=tuple(_part(part, findings) for part in PARTS if any(finding.part == part for finding in findings)),
        changed=tuple(_changed(finding, judgement) for finding in findings if finding.status == "changed"),
        directions=_directions(judgement, cosines),
        low_rank=_low_rank(findings),
        config_changes=(),
        files_changed=(),
        thresholds=thresholds(),
        notes=_notes(pairing, stream),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _changed(finding: Finding, judgement: Judgement) -> ChangedTensor:
    pair, projections = finding.pair, finding.projections
    weights = [each.before_squared for each in projections]
    left = math.sqrt(_share(sum(each.left**2 * each.before_squared for each in projections), sum(weights)))
    kept = [each.kept for each in projections if each.kept is not None]
    stream_axis = None if finding.writer is None else finding.writer.residual_axis - (len(pair.new.shape) - 2)
    consensus = judgement.consensus
    return ChangedTensor(
        name=pair.new.name,
        base_name=pair.old.name,
        part=finding.part,
        layer=finding.layer,
        dtype=pair.new.stored_dtype,
        base_dtype=pair.old.stored_dtype,
        kind=finding.kind or "dense",
        change=_share(finding.change, finding.norm),
        rounding=_share(finding.rounding, finding.norm),
        rank=finding.rank,
        rest=_share(finding.rest, finding.change),
        strength=judgement.strengths.get(pair.new.name) if projections else None,
        left=left if projections else None,
        cosine=None if consensus is None else consensus.cosines.get(pair.new.name),
        other_axis=stream_axis is not None and any(each.axis != stream_axis for each in projections),
        row_normalised=any(each.row_normalised for each in projections),
        kept=Counter(kept).most_common(1)[0][0] if kept else None,
    )


def _part(part: PartName, findings: Sequence[Finding]) -> PartReading:
    members = [finding for finding in findings if finding.part == part]
    edited = [finding for finding in members if finding.is_edited]
    moved, norm = (math.hypot(*(getattr(each, key) for each in edited)) for key in ("change", "norm"))
    strengths = [each.strength for finding in edited for each in finding.projections]
    return PartReading(
        part=part,
        tensors=len(members),
        changed=len(edited),
        change=_share(moved, norm) if edited else None,
        strengths=(min(strengths), max(strengths)) if strengths else None,
    )


def _directions(judgement: Judgement, cosines: tuple[float, ...]) -> RecoveredDirections | None:
    found = judgement.consensus
    if found is None:
        return None
    agreeing = [cosine for name, cosine in found.cosines.items() if name in found.agreeing]
    return RecoveredDirections(
        k=len(found.vectors),
        scope=found.scope,
        through_norms=found.through_norms,
        tensors=len(found.cosines),
        least_cosine=min(agreeing) if agreeing else 0.0,
        disagreeing=tuple(name for name in found.cosines if name not in found.agreeing),
        cosines=cosines,
        files=(),
    )


def _low_rank(findings: Sequence[Finding]) -> LowRankChange | None:
    members = [finding for finding in findings if finding.kind == "low_rank" and finding.rank is not None]
    if not members:
        return None
    targets: dict[str, list[Finding]] = defaultdict(list)
    for finding in members:
        # What follows the layer's number, without the numbers of experts.
        end = re.split(r"\.\d+\.", finding.pair.new.name)[-1].removesuffix(".weight")
        targets[end].append(finding)
    ranks = [finding.rank or 0 for finding in members]
    return LowRankChange(rank=max(ranks), least_rank=min(ranks), targets=tuple(sorted(targets)), tensors=len(members))


def _notes(pairing: Pairing, stream: StreamMap | None) -> tuple[str, ...]:
    notes = []
    if stream is None:
        notes.append("the architecture is not known, so which tensors write to the stream is not known either")
    elif not stream.verified:
        notes.append(f"{stream.model_type} is not in the table of architectures; its tensors are told by common rules")
    if pairing.fused:
        notes.append(
            f"{len(pairing.fused)} tensors hold several of the other side in one and were compared part by part "
            f"({pairing.fused[0]})"
        )
    if pairing.added and pairing.missing:
        notes.append(
            f"{len(pairing.missing)} tensors of the base and {len(pairing.added)} of the model were not paired, and so "
            f"not compared ({pairing.missing[0].name}, {pairing.added[0].name}): fused, split or under other names, "
            "they may hold the same numbers"
        )
    if pairing.reshaped:
        notes.append(
            f"{len(pairing.reshaped)} tensors have other shapes than the base's and were not compared "
            f"({pairing.reshaped[0]})"
        )
    notes.append(f"ranks above {WIDE} are not told from full ones")
    return tuple(notes)
