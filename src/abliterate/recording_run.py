"""Recording all prompts of an extraction: over several processes, saved as it goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import Recording, record
from abliterate.models.streamed_model import StreamedChat
from abliterate.processes import Ranks
from abliterate.progress import Advance, ProgressReporter
from abliterate.prompt_sets import ExtractionPrompts, PromptSet
from abliterate.saved_work import SavedWork
from abliterate.streamed_scoring import record_streamed

PARTS = ("harmful_train", "harmless_train", "harmful_validation", "harmless_validation")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingRun:
    """One round of recording.

    Attributes:
        chat: the model.
        prompts: the prompts of all parts.
        saved: where recordings are kept as they are made.
        ranks: the processes that share the work.
        progress: where to show progress.
    """

    chat: ChatModel
    prompts: ExtractionPrompts
    saved: SavedWork
    ranks: Ranks
    progress: ProgressReporter

    def record(self) -> dict[str, Recording]:
        """Return the recordings of all parts, those that are saved from there."""
        found = {name: self.ranks.first_says(self.saved.recording(name)) for name in PARTS}
        missing = [name for name in PARTS if found[name] is None]
        # Part by part, so that each is saved as it is done. Streamed layers are read once for all parts, and for all
        # again if one is missing: in other batches the rest would be rounded otherwise.
        groups = [[name] for name in missing]
        if missing and isinstance(self.chat, StreamedChat):
            groups = [list(PARTS)]
        for group in groups:
            found |= self._record(group)
        return {name: Recording(**tensors) for name, tensors in found.items() if tensors is not None}

    def _record(self, group: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        rows = {name: self.chat.encode(self._prompts(name).texts) for name in group}
        if isinstance(self.chat, StreamedChat):
            recorded = self._record_rows([row for name in group for row in rows[name]])
        else:
            with self.progress.task(f"Recording {self._prompts(group[0]).name}", total=len(rows[group[0]])) as advance:
                recorded = self._record_rows(rows[group[0]], advance)
        start, parts = 0, {}
        for name in group:
            end = start + len(rows[name])
            parts[name] = {key: tensor[start:end].clone() for key, tensor in recorded.items()}
            start = end
            if self.ranks.is_first:
                self.saved.save_recording(name, parts[name])
        return parts

    def _record_rows(self, rows: list[list[int]], advance: Advance | None = None) -> dict[str, Tensor]:
        def compute(part: Sequence[list[int]]) -> list[tuple[Tensor, Tensor]]:
            if isinstance(self.chat, StreamedChat):
                recording = record_streamed(self.chat, part)
            else:
                count = None if advance is None else lambda n: advance(n * self.ranks.count)
                recording = record(self.chat, part, advance=count)
            return list(zip(recording.activations, recording.logits, strict=True))

        activations, logits = zip(*self.ranks.share(rows, compute), strict=True)
        return {"activations": torch.stack(activations), "logits": torch.stack(logits)}

    def _prompts(self, name: str) -> PromptSet:
        prompts: PromptSet = getattr(self.prompts, name)
        return prompts
