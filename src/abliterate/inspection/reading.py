"""`inspect`: a model read beside its base, and what its writers have of directions; see the modules beside this one.

Nothing is run, and nothing that comes with a checkpoint but its files is believed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from abliterate.architectures.names import Part, parse_name
from abliterate.architectures.writers import StreamMap, map_checkpoint
from abliterate.checkpoints.checkpoint import CONFIG_NAME, Checkpoint
from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.directions import Direction, load_direction, make_direction, orthonormal_basis
from abliterate.editing.checks import read_norm, read_wide
from abliterate.editing.record import RECORD_NAME, AbliterationRecord
from abliterate.errors import CheckpointError, DirectionError, InputError
from abliterate.files import in_one_line
from abliterate.formats.gguf_checkpoint import open_weights
from abliterate.formats.quantized import CONFIG_KEYS, plain_view
from abliterate.inspection.claims import CARD_NAME, hold_against, read_claims, recorded_directions
from abliterate.inspection.component import ComponentReading, read_component
from abliterate.inspection.consensus import Norm, cosine_of
from abliterate.inspection.findings import Finding, PairReader
from abliterate.inspection.numbers import Array, is_numbers
from abliterate.inspection.pair_report import report_pair
from abliterate.inspection.pairing import Pairing, pair_tensors
from abliterate.inspection.report import InspectionReport, PairReading, RecordReading
from abliterate.inspection.verdict import Evidence, Judgement, judge
from abliterate.progress import SILENT, ProgressReporter

# Keys of config.json that say how it was stored and by what, not what the model computes.
_OF_STORAGE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", *CONFIG_KEYS}
_OWN_FILES = {CONFIG_NAME, CARD_NAME, RECORD_NAME, ".gitattributes", "model.safetensors.index.json"}
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Inspection:
    """A report, and the directions that were recovered.

    Attributes:
        report: What was found.
        vectors: [k, d_model] float64, orthonormal rows; None where nothing was projected or added, or tensors have
            their own.
        by_layer: Layer -> the same, where each layer has its own; under None what tensors outside of layers have.
    """

    report: InspectionReport
    vectors: Array | None = None
    by_layer: Mapping[int | None, Array] = field(default_factory=dict)

    def directions(self) -> dict[str, Direction]:
        """Return the recovered directions as direction files hold them, by what is added to the name of the file.

        That is nothing for a single one, a number for one of several, and `layer7` (or `embed`) where each layer has
        its own.

        Raises:
            InputError: There are none.
        """
        pair = self.report.pair
        if pair is None or (self.vectors is None and not self.by_layer):
            said = "nothing was held against a base" if pair is None else f"the verdict is {pair.verdict}"
            if pair is not None and pair.directions is not None:
                said = "tensors have directions of their own, which not even those of a layer share"
            raise InputError(f"{self.report.model}: no direction was recovered: {said}; leave out --output")
        found = pair.directions
        assert found is not None
        made = {}
        of_all: Mapping[int | None, Array] = self.by_layer if self.vectors is None else {None: self.vectors}
        for layer, vectors in of_all.items():
            metadata = {
                "recovered": {
                    "model": self.report.model,
                    "base": self.report.base,
                    "tensors": found.tensors,
                    "least_cosine": found.least_cosine,
                    "sign": "of the first given direction" if found.cosines else "not known, but for a given direction",
                    **({"layer": layer} if self.by_layer else {}),
                },
                "model": self.report.base,
            }
            first = [] if not self.by_layer else ["embed"] if layer is None else [f"layer{layer}"]
            for number, vector in enumerate(vectors, 1):
                name = ".".join([*first, *([str(number)] if len(vectors) > 1 else [])])
                made[name] = make_direction(mean_difference=vector, metadata=metadata)
        return made

    def written_to(self, files: Sequence[Path]) -> InspectionReport:
        """Return the report with the files that the directions were written to."""
        pair = self.report.pair
        if not files or pair is None or pair.directions is None:
            return self.report
        found = replace(pair.directions, files=tuple(str(file) for file in files))
        return replace(self.report, pair=replace(pair, directions=found))


def inspect_model(
    *,
    model: ModelSource,
    base: ModelSource | None = None,
    directions: Sequence[Path] = (),
    opened: tuple[Checkpoint, Checkpoint] | None = None,
    same_files: frozenset[str] = frozenset(),
    progress: ProgressReporter = SILENT,
) -> Inspection:
    """Say what was done to a model, and what its writers have of directions.

    Args:
        model: The model.
        base: What it is held against; None says only what its own files tell.
        directions: Direction files, whose span is looked for in the writers; without, that of the model's record.
        opened: Model and base as checkpoints, where files of them are not in their directories.
        same_files: Shards of the model that are known to be the base's, by their hashes.
        progress: Shown the bytes read.

    Raises:
        DirectionError: A direction is malformed, or has another width than the model.
        CheckpointError: A file cannot be read, or what was changed holds NaN or infinite values.
    """
    view = plain_view(open_weights(model.path) if opened is None else opened[0])
    record, claims = read_claims(view.path)
    given = [load_direction(each) for each in directions]
    if base is None:
        stream = _map(view)
        return Inspection(report=_alone(model, view, stream, given, record, claims, progress))
    original = plain_view(open_weights(base.path) if opened is None else opened[1])
    compared = _compare(original, view, same_files, progress)
    judgement, stream = compared.judgement, compared.stream
    vectors, by_layer = _recovered(judgement, given)
    cosines = _cosines(judgement, given, stream)
    pair = _pair_reading(original, view, compared, cosines)
    if record is not None:
        problems = hold_against(
            record,
            base=base.path,
            names={info.name for info in view.tensors()},
            findings=compared.findings,
            judgement=judgement,
        )
        claims = replace(claims, problems=(*claims.problems, *problems))
    component = None
    if given and stream is not None and judgement.verdict != "unrelated":
        component = _component(view, original, _map(view), given, compared.pairing, progress)
    report = _report(model, view, claims, component)
    return Inspection(
        report=replace(
            report,
            base=base.name,
            verdict=judgement.verdict,
            exact=judgement.exact,
            partial=judgement.partial,
            restored_norms=judgement.restored_norms,
            pair=pair,
        ),
        vectors=vectors,
        by_layer=by_layer,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Compared:
    """Two checkpoints, read."""

    stream: StreamMap | None
    pairing: Pairing
    findings: list[Finding]
    judgement: Judgement


def _compare(
    original: Checkpoint, view: Checkpoint, same_files: frozenset[str], progress: ProgressReporter
) -> _Compared:
    """Read every pair of tensors, and judge."""
    stream = _map(original)
    pairing = pair_tensors(original.tensors(), view.tensors(), stream=stream)
    reader = PairReader(base=original.path, model=view.path, stream=stream, d_model=_width(original, stream))
    total = sum(pair.new.end - pair.new.start for pair in pairing.pairs)
    with progress.task("Reading both models", total=total, unit="bytes") as advance:
        findings = reader.read(pairing.pairs, same_files=same_files, advance=advance)
    judgement = judge(_evidence(original, view, stream, pairing, findings, reader))
    better = {finding.pair.new.name: finding for finding in judgement.findings}
    findings = [better.get(finding.pair.new.name, finding) for finding in findings]
    return _Compared(stream=stream, pairing=pairing, findings=findings, judgement=judgement)


def _pair_reading(
    original: Checkpoint, view: Checkpoint, compared: _Compared, cosines: tuple[float, ...]
) -> PairReading:
    pair = report_pair(
        compared.findings,
        pairing=compared.pairing,
        judgement=compared.judgement,
        shards=len(view.shards),
        cosines=cosines,
        stream=compared.stream,
    )
    return replace(
        pair,
        config_changes=_config_changes(original.config, view.config),
        files_changed=_files_changed(original, view),
    )


def _map(view: Checkpoint) -> StreamMap | None:
    """Return what a checkpoint's tensors are; None where the architecture is not known."""
    try:
        return map_checkpoint(view, unverified=True, partial=True)
    except CheckpointError:
        return None


def _alone(
    model: ModelSource,
    view: Checkpoint,
    stream: StreamMap | None,
    given: Sequence[Direction],
    record: AbliterationRecord | None,
    claims: RecordReading,
    progress: ProgressReporter,
) -> InspectionReport:
    rows = recorded_directions(record)
    vectors = _rows(given) if given else rows
    if vectors is None:
        return _report(model, view, claims, None)
    if stream is None:
        # Said by the map itself, in one line.
        stream = map_checkpoint(view, unverified=True, partial=True)
    if given:
        _check_width(given, stream)
    elif vectors.shape[1] != stream.d_model:
        problem = f"its directions have {vectors.shape[1]} entries, and the stream has {stream.d_model}"
        return _report(model, view, replace(claims, problems=(*claims.problems, problem)), None)
    return _report(model, view, claims, read_component(view=view, stream=stream, vectors=vectors, progress=progress))


def _rows(given: Sequence[Direction]) -> Array:
    return np.stack([each.numbers["direction"] for each in given]).astype(np.float64)


def _check_width(given: Sequence[Direction], stream: StreamMap) -> None:
    for each in given:
        if each.d_model != stream.d_model:
            raise DirectionError(
                f"a direction has {each.d_model} entries, but the model's residual stream has {stream.d_model}; "
                "extract a direction from this model with `abliterate extract`"
            )


def _component(
    view: Checkpoint,
    original: Checkpoint,
    stream: StreamMap | None,
    given: Sequence[Direction],
    pairing: Pairing,
    progress: ProgressReporter,
) -> ComponentReading | None:
    """Return what is left of the given directions, held against the base where it has every writer."""
    if stream is None:
        return None
    _check_width(given, stream)
    names = {pair.new.name: pair.old.name for pair in pairing.pairs if not pair.padding}
    is_whole = all(writer.tensor_name in names for writer in stream.writers)
    return read_component(
        view=view,
        stream=stream,
        vectors=_rows(given),
        original=original if is_whole else None,
        base_names=names,
        progress=progress,
    )


def _report(
    model: ModelSource, view: Checkpoint, claims: RecordReading, component: ComponentReading | None
) -> InspectionReport:
    return InspectionReport(
        model=model.name,
        base=None,
        model_type=str(view.config.get("model_type")),
        verdict=None,
        exact=None,
        partial=None,
        restored_norms=None,
        pair=None,
        record=claims,
        k=0 if component is None else component.k,
        random=None if component is None else component.random,
        left=None if component is None else component.left,
        roles=() if component is None else component.roles,
        tensors=() if component is None else component.tensors,
    )


def _width(view: Checkpoint, stream: StreamMap | None) -> int | None:
    """Return the width of the stream, from the config where the architecture is not known."""
    if stream is not None:
        return stream.d_model
    sections = [view.config, *(value for value in view.config.values() if isinstance(value, dict))]
    found = (section.get(key) for section in sections for key in ("hidden_size", "n_embd", "d_model"))
    return next((value for value in found if isinstance(value, int)), None)


def _evidence(
    original: Checkpoint,
    view: Checkpoint,
    stream: StreamMap | None,
    pairing: Pairing,
    findings: Sequence[Finding],
    reader: PairReader,
) -> Evidence:
    whole = sum(math.prod(info.shape) for info in original.tensors())
    paired = {pair.old.name: math.prod(pair.old.shape) for pair in pairing.pairs}
    added, vectors = _added(view, stream, pairing.added)
    return Evidence(
        findings=findings,
        pairing=pairing,
        stream=stream,
        norms=_norms(original, stream, findings),
        shared=sum(paired.values()) / whole if whole else 0.0,
        added=added,
        added_vectors=vectors,
        measure=reader.measured_along,
    )


def _norms(original: Checkpoint, stream: StreamMap | None, findings: Sequence[Finding]) -> dict[str, tuple[Norm, ...]]:
    edited = {finding.pair.old.name for finding in findings if finding.is_edited or finding.vectors is not None}
    return {
        writer.tensor_name: tuple(read_norm(original, norm) for norm in writer.norm_chain)
        for writer in (() if stream is None else stream.writers)
        if writer.norm_chain and writer.tensor_name in edited
    }


def _added(
    view: Checkpoint, stream: StreamMap | None, added: Sequence[TensorInfo]
) -> tuple[dict[str, float | None], dict[str, Array]]:
    """Return the length of what the model has besides, and those vectors that it adds to the stream; not what is 0."""
    lengths: dict[str, float | None] = {}
    vectors: dict[str, Array] = {}
    for info in added:
        if len(info.shape) != 1 or not is_numbers(info):
            lengths[info.name] = None
            continue
        vector = read_wide(view.path, info)
        if not vector.any():
            continue
        is_bias = stream is not None and vector.shape == (stream.d_model,)
        if is_bias and parse_name(info.name, has_towers=True).part is Part.BIAS:
            lengths[info.name] = float(np.linalg.norm(vector))
            vectors[info.name] = vector
        else:
            lengths[info.name] = None
    return lengths, vectors


def _recovered(judgement: Judgement, given: Sequence[Direction]) -> tuple[Array | None, dict[int | None, Array]]:
    """Return the common directions, None where tensors have their own, and those of each layer."""
    consensus = judgement.consensus
    if consensus is None or judgement.verdict == "unrelated":
        return None, {}
    # What a bias adds has a sign of its own.
    is_signed = bool(judgement.added) and not judgement.strengths
    if consensus.scope == "one":
        return consensus.vectors if is_signed else _turned(consensus.vectors, given), {}
    layers = sorted(consensus.by_layer, key=lambda layer: -1 if layer is None else layer)
    return None, {layer: _turned(consensus.by_layer[layer], given) for layer in layers}


def _turned(vectors: Array, given: Sequence[Direction]) -> Array:
    """Return directions turned as the first given one where there is one, else as their largest entry."""
    if given and given[0].d_model == vectors.shape[1]:
        signs = vectors @ _rows(given)[0]
    else:
        signs = vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)]
    return vectors * np.where(signs < 0, -1.0, 1.0)[:, None]


def _cosines(judgement: Judgement, given: Sequence[Direction], stream: StreamMap | None) -> tuple[float, ...]:
    if stream is not None:
        _check_width(given, stream)
    consensus = judgement.consensus
    if consensus is None:
        return ()
    of_all = list(consensus.by_layer.values()) or [consensus.vectors]
    return tuple(
        max(cosine_of(vectors, orthonormal_basis(_rows([each]))[0]) for vectors in of_all)
        for each in given
        if each.d_model == consensus.vectors.shape[1]
    )


def _config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    before, after = _flat(old), _flat(new)
    keys = sorted(before.keys() | after.keys())
    return tuple(key for key in keys if before.get(key) != after.get(key) and not set(key.split(".")) & _OF_STORAGE)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _files_changed(original: Checkpoint, view: Checkpoint) -> tuple[str, ...]:
    both = sorted(set(original.side_files) & set(view.side_files) - _OWN_FILES)
    return tuple(name for name in both if not _same_file(original.path / name, view.path / name))


def _same_file(old: Path, new: Path) -> bool:
    try:
        if old.stat().st_size != new.stat().st_size:
            return False
        with old.open("rb") as first, new.open("rb") as second:
            while True:
                one, other = first.read(_CHUNK), second.read(_CHUNK)
                if one != other:
                    return False
                if not one:
                    return True
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {in_one_line(error)}") from error
