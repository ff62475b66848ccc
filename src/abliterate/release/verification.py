"""Verifying an orthogonalized checkpoint: its files, and what it does when it runs.

(a), (b) its files (see `file_checks`); (c) the directions in its residual stream on real prompts, beside its
base; (d) its logits beside those of the base with the directions ablated by hooks. docs/exactness.md says when the
stream must be clean and when the logits must be equal; where they need not be, (c) and (d) report and do not judge.
Of a partial edit what is left in the stream is measured, and the verdict says that it is partial.
`report` says how clean is clean.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abliterate.checkpoints.checkpoint import is_gguf
from abliterate.checkpoints.hub import ModelSource
from abliterate.directions import Direction, load_direction, orthonormalize
from abliterate.editing.record import RECORD_NAME, AbliterationRecord, read_record
from abliterate.errors import InputError, ModelError
from abliterate.formats.gguf_checkpoint import gguf_file_of, holds_gguf, open_weights
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_subspace
from abliterate.models.loading import open_model
from abliterate.models.options import ModelOptions
from abliterate.progress import SILENT, ProgressReporter
from abliterate.prompt_sets import Kind, load_prompt_set
from abliterate.release.file_checks import QuickCheck, verify_files
from abliterate.release.options import VerificationOptions
from abliterate.release.recorded_edits import find_base, recorded_options, recorded_remainder, recorded_subspace
from abliterate.release.report import (
    LogitCheck,
    StreamCheck,
    VerificationReport,
    check_logits,
    check_partial,
    check_stream,
    logit_failures,
    stream_failures,
)
from abliterate.release.stream_checks import LogitComparison, StreamComponents, run_prompts

# Sine of the angle below which two subspaces are the same; directions are stored in float32.
_SAME_SUBSPACE = 1e-6


def verify_checkpoint(
    *,
    checkpoint: Path,
    base: ModelSource | Path | str | None = None,
    directions: Sequence[Direction | Path] = (),
    options: VerificationOptions | None = None,
    model_options: ModelOptions | None = None,
    progress: ProgressReporter = SILENT,
) -> VerificationReport:
    """Verify a checkpoint that `orthogonalize_checkpoint` wrote. A failed check is in the report and raises nothing.

    Args:
        checkpoint: The directory.
        base: What it was made from; by default what its record names, from the Hub if need be.
        directions: Directions that must span what the record says was removed.
        options: See `VerificationOptions`.
        model_options: How to load and run the models.
        progress: Where to show progress.

    Raises:
        InputError: There is no record, it is of an adapter, or the base is not there or not the one that was edited.
        CheckpointError: A checkpoint cannot be read.
        ModelError: A model does not load or run.
        HubError: The base cannot be fetched.
        PromptSetError: The prompts cannot be read.
    """
    options = options or VerificationOptions()
    record = read_record(checkpoint.parent if is_gguf(checkpoint) else checkpoint)
    if record.is_adapter:
        raise InputError(
            f"{checkpoint}: is an adapter, which was merged and measured when it was written and holds no weights to "
            "verify; orthogonalize its base without --format adapter and verify that"
        )
    subspace = recorded_subspace(record)
    failures = _compare_directions(record, subspace, directions)
    source = find_base(record, base)
    original = open_weights(source.path)
    files = verify_files(record, base=original, progress=progress)
    failures += files.failures
    remainder = recorded_remainder(record, original)
    stream: StreamCheck | None = None
    logits: LogitCheck | None = None
    notes: tuple[str, ...] = ()
    if not options.quick and not failures:
        run = _Run(
            record=record,
            source=source,
            subspace=subspace,
            options=options,
            model_options=model_options or ModelOptions(),
            progress=progress,
        )
        stream, logits, notes = run.measure(files)
        failures += stream_failures(checkpoint, stream) + logit_failures(checkpoint, logits)
    elif not options.quick:
        notes = ("the models were not run, because the files failed already",)
    return VerificationReport(
        checkpoint=str(checkpoint),
        base=source.name,
        base_revision=source.revision,
        k=len(subspace),
        direction_given=bool(directions),
        files=files,
        stream=stream,
        logits=logits,
        notes=notes,
        failures=tuple(failures),
        passed=not failures,
        verdict="failed" if failures else "verified" if remainder is None else "partial",
        partial=check_partial(remainder, stream),
    )


def _compare_directions(
    record: AbliterationRecord, subspace: Tensor, directions: Sequence[Direction | Path]
) -> list[str]:
    if not directions:
        return []
    d_model = subspace.shape[1]
    loaded = [each if isinstance(each, Direction) else load_direction(each, d_model=d_model) for each in directions]
    given = orthonormalize(torch.stack([each.vector for each in loaded]))[0]
    missing = float(torch.linalg.matrix_norm(given - (given @ subspace.T) @ subspace, ord=2))
    if len(given) == len(subspace) and missing <= _SAME_SUBSPACE:
        return []
    return [
        f"{record.directory}: the {len(given)} directions given do not span the {len(subspace)} that {RECORD_NAME} "
        f"says were removed (sine of the angle between them {missing:.2g}); give those that it was made with"
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One verification's forward passes: the base, the base ablated, the edited checkpoint; one model at a time."""

    record: AbliterationRecord
    source: ModelSource
    subspace: Tensor
    options: VerificationOptions
    model_options: ModelOptions
    progress: ProgressReporter

    def measure(self, files: QuickCheck) -> tuple[StreamCheck, LogitCheck | None, tuple[str, ...]]:
        texts = [*self._prompts("harmful", self.options.harmful), *self._prompts("harmless", self.options.harmless)]
        # Each model lives in a call of its own, so that the first is gone before the second is loaded.
        of_base = self._run_base(texts)
        edited, device, comparison = self._run_edited(texts, of_base)
        stream = check_stream(
            self.record.content,
            files.tensors,
            of_base.stream,
            edited,
            of_base.ablated,
            n_prompts=len(texts),
            device=device,
        )
        if comparison is None:
            return stream, None, (f"logits not compared with the ablated base: {of_base.not_ablated}",)
        return stream, check_logits(self.record.content, files.tensors, *comparison, stream=stream), ()

    def _run_base(self, texts: Sequence[str]) -> "_BaseRun":
        chat = self._load(self.source.path, self.source.name)
        rows = chat.encode(texts)
        stream = self._pass(chat, rows, "base")
        if recorded_options(self.record).add is not None:
            return _BaseRun(rows=rows, stream=stream, ablated=None, logits=[], not_ablated="this edit is an addition")
        logits: list[Tensor] = []
        try:
            with ablate_subspace(chat, self.subspace):
                ablated = self._pass(chat, rows, "base, ablated", receive=lambda _index, found: logits.append(found))
        except ModelError as error:
            return _BaseRun(rows=rows, stream=stream, ablated=None, logits=[], not_ablated=str(error))
        return _BaseRun(rows=rows, stream=stream, ablated=ablated, logits=logits, not_ablated=None)

    def _run_edited(
        self, texts: Sequence[str], of_base: "_BaseRun"
    ) -> tuple[StreamComponents, str, tuple[LogitComparison, LogitComparison] | None]:
        chat = self._load(self.record.directory, str(self.record.directory))
        rows = chat.encode(texts)
        if rows != of_base.rows:
            raise ModelError(
                f"{self.record.directory}: its tokenizer or chat template is not that of {self.source.name}; "
                "name the model that was edited with --base"
            )
        last, everywhere = LogitComparison(), LogitComparison()

        def compare(index: int, logits: Tensor) -> None:
            last.add(of_base.logits[index][-1:], logits[-1:])
            everywhere.add(of_base.logits[index], logits)

        edited = self._pass(chat, rows, "edited", receive=compare if of_base.ablated else None)
        return edited, str(chat.device), (last, everywhere) if of_base.ablated else None

    def _prompts(self, kind: Kind, spec: str) -> tuple[str, ...]:
        return load_prompt_set(spec, kind=kind, part="test").texts[: self.options.n_prompts]

    def _pass(
        self,
        chat: ChatModel,
        rows: Sequence[Sequence[int]],
        label: str,
        *,
        receive: Callable[[int, Tensor], None] | None = None,
    ) -> StreamComponents:
        with self.progress.task(f"Running prompts ({label})", total=len(rows)) as advance:
            return run_prompts(chat, rows, subspace=self.subspace, receive=receive, advance=advance)

    def _load(self, path: Path, name: str) -> ChatModel:
        gc.collect()
        file = gguf_file_of(path) if holds_gguf(path) else path
        source = ModelSource(path=file, name=name, revision=None)
        return open_model(source, options=self.model_options, needs_template=False, progress=self.progress).chat


@dataclass(frozen=True, slots=True, kw_only=True)
class _BaseRun:
    """What the base showed; `ablated` is None, with the reason, where hooks do not fit its architecture."""

    rows: list[list[int]]
    stream: StreamComponents
    ablated: StreamComponents | None
    logits: list[Tensor]
    not_ablated: str | None
