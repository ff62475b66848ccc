"""What the base and an edited checkpoint do when they run: the directions in the stream, and the logits.

The base, the base ablated by hooks, and the edited checkpoint see the same prompts, one model at a time.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abliterate.checkpoints.model_source import ModelSource
from abliterate.editing.record import AbliterationRecord
from abliterate.errors import ModelError
from abliterate.formats.gguf_checkpoint import gguf_file_of, holds_gguf
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import ablate_subspace
from abliterate.models.loading import open_model
from abliterate.models.options import ModelOptions
from abliterate.progress import ProgressReporter
from abliterate.prompt_sets import Kind, load_prompt_set
from abliterate.release.file_checks import QuickCheck
from abliterate.release.options import VerificationOptions
from abliterate.release.recorded_edits import recorded_options
from abliterate.release.report import LogitCheck, StreamCheck, check_logits, check_stream
from abliterate.release.stream_checks import LogitComparison, StreamComponents, run_prompts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRuns:
    """One verification's forward passes: the base, the base ablated, the edited checkpoint; one model at a time."""

    record: AbliterationRecord
    source: ModelSource
    subspace: "NDArray[np.float64]"
    options: VerificationOptions
    model_options: ModelOptions
    progress: ProgressReporter

    def measure(self, files: QuickCheck) -> tuple[StreamCheck, LogitCheck | None, tuple[str, ...]]:
        """Run the models; return what the stream and the logits showed, and why these were not compared, if not.

        Args:
            files: What the files showed.

        Raises:
            ModelError: A model does not load or run.
            PromptSetError: The prompts cannot be read.
        """
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
            with ablate_subspace(chat, torch.from_numpy(self.subspace)):
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
            return run_prompts(chat, rows, subspace=torch.from_numpy(self.subspace), receive=receive, advance=advance)

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
