"""A chat model that is never in memory as a whole: one decoder block at a time is read, used by all, and let go.

Everything between the token ids and the first block, and behind the last, is the model's own code. A pass over the
prompts first runs that code with empty blocks, which note what each is called with (masks, positions); then each block
is loaded once and run on the hidden states of all prompts in all their variants. Hidden states that wait for their next
layer are in memory up to a limit, beyond it in files. All this is exact if nothing happens to the stream between two
blocks. That is checked at every pass, and tried on a small random model of the kind before anything is read.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from abliterate.errors import InputError, ModelError
from abliterate.models.chat_model import ChatModel, stop_tokens
from abliterate.models.hooks import ablate_subspace_in_block, replaced_forward
from abliterate.models.layer_weights import LayerWeights
from abliterate.models.machine import plan_batches
from abliterate.progress import SILENT, Advance, ProgressReporter

Key = tuple[int, int]

MEMORY_BYTES = 128 << 20


class HiddenStore:
    """Tensors by key. A context manager: leaving it deletes the files.

    Files are read and written whole, not mapped, so that what lies in them takes no memory of this process.

    Args:
        directory: where to make the directory of the files; None: the system's place for temporary files.
        memory_bytes: how much to keep in memory before files are used.
    """

    def __init__(self, directory: Path | None = None, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._files = tempfile.TemporaryDirectory(prefix=".abliterate-layers-", dir=directory)
        self._left = memory_bytes
        self._in_memory: dict[Key, Tensor] = {}
        self._in_files: dict[Key, tuple[torch.dtype, torch.Size]] = {}

    def __enter__(self) -> "HiddenStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.cleanup()

    def put(self, key: Key, hidden: Tensor) -> None:
        """Keep a tensor in the place of what was there under this key.

        Raises:
            InputError: there is no room on the disk.
        """
        hidden = hidden.detach().cpu().contiguous()
        self.drop(key)
        if hidden.nbytes <= self._left:
            self._left -= hidden.nbytes
            self._in_memory[key] = hidden
            return
        try:
            hidden.view(torch.uint8).numpy().tofile(self._path(key))
        except OSError as error:
            raise InputError(
                f"{self._files.name}: hidden states cannot be written here: {error.strerror or error}; "
                "write the output to a disk with more room, or give fewer prompts (--n-val)"
            ) from error
        self._in_files[key] = (hidden.dtype, hidden.shape)

    def get(self, key: Key) -> Tensor:
        """Return the tensor under this key; it stays, and is not to be changed."""
        if key in self._in_memory:
            return self._in_memory[key]
        dtype, shape = self._in_files[key]
        return torch.from_numpy(np.fromfile(self._path(key), dtype=np.uint8)).view(dtype).reshape(shape)

    def drop(self, key: Key) -> None:
        """Forget the tensor under this key, if there is one."""
        if key in self._in_memory:
            self._left += self._in_memory.pop(key).nbytes
        elif self._in_files.pop(key, None) is not None:
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: Key) -> Path:
        return Path(self._files.name) / f"{key[0]}.{key[1]}"


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with besides the hidden states."""
Watch = Callable[[int, list[int], Tensor], None]

_UNCHANGED = -1
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What is done to the stream in one run of the prompts.

    Attributes:
        start: the block at whose input it leaves the unchanged stream.
        added: [d_model], added there to all positions; None: nothing.
        ablated: [k, d_model], orthonormal rows, removed at every write from block `start` on; None: nothing.
    """

    start: int = 0
    added: Tensor | None = None
    ablated: Tensor | None = None


class NotHandedOnError(Exception):
    """A block did not get what the one before it returned."""


class _LastBlockReached(Exception):  # noqa: N818 - it is no error
    """All blocks have been called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedChat(ChatModel):
    """A chat model whose `model` is on the meta device; see the module.

    Attributes:
        weights: reads what is needed.
        returned: how many values each block returns; 0 where it returns the stream alone.
        spill_directory: where hidden states go that do not fit into memory; None: the system's temporary directory.
        progress: is told how many layers are done.
    """

    weights: LayerWeights
    returned: int = 0
    spill_directory: Path | None = None
    progress: ProgressReporter = SILENT

    @property
    def device(self) -> torch.device:
        """Where each block is run."""
        return self.weights.device

    def generate(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        advance: Callable[[int], None] | None = None,  # noqa: ARG002
        receive: Callable[[int, list[int]], None] | None = None,  # noqa: ARG002
        streamer: Any = None,  # noqa: ARG002
    ) -> list[list[int]]:
        """Return greedy completions as token ids; each token reads all weights."""
        stops = stop_tokens(self)
        texts, going = [list(row) for row in rows], set(range(len(rows)))
        for _ in range(max_new_tokens):
            chosen = sorted(going)
            if not chosen:
                break
            tokens = self.last_logits([texts[i] for i in chosen]).argmax(dim=-1).tolist()
            for i, token in zip(chosen, tokens, strict=True):
                texts[i] += [token] if token not in stops else []
                going -= {i} if token in stops else set()
        return [text[len(row) :] for text, row in zip(texts, rows, strict=True)]

    def last_logits(self, rows: Sequence[Sequence[int]], *, advance: Callable[[int], None] | None = None) -> Tensor:  # noqa: ARG002
        """Return the logits [n, vocab] (float32, CPU) at the last token of each row."""
        return next(self.logits(self.last_hidden(rows, [Variant()])))

    @torch.inference_mode()
    def last_hidden(
        self,
        rows: Sequence[Sequence[int]],
        variants: Sequence[Variant],
        *,
        watch: Watch | None = None,
        what: str = "Layer by layer",
    ) -> Tensor:
        """Run the rows in every variant through all blocks, reading each block once.

        Args:
            rows: token ids.
            variants: what is done to the stream.
            watch: called with the layer, the indices of some rows and their unchanged input of that block,
                [n, tokens, d_model], padded on the left; needs a first variant that changes nothing.
            what: for the progress.

        Returns:
            the last block's output at the last token, [n_variants, n_rows, d_model] on the CPU.
        """
        last = torch.empty(len(variants), len(rows), self.d_model, dtype=self.model.dtype)
        batches = plan_batches([len(row) for row in rows], limits=self.batch_limits())
        with (
            HiddenStore(self.spill_directory) as store,
            self.progress.task(what, total=self.n_layers) as advance,
        ):
            calls = self._begin_all([[list(rows[i]) for i in batch] for batch in batches], store)
            run = _Pass(chat=self, variants=variants, batches=batches, calls=calls, store=store, last=last, watch=watch)
            run.through_all_blocks(advance)
        self.weights.reads += 1
        return last

    @torch.inference_mode()
    def logits(self, last: Tensor) -> Iterator[Tensor]:
        """Yield the logits [n_rows, vocab] (float32, CPU) of each variant; the output head is read once.

        Args:
            last: what the last block returned, [n_variants, n_rows, d_model].
        """
        embedding = self.model.get_input_embeddings()
        waiting: list[Tensor] = []

        def embed(token_ids: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            return torch.zeros(*token_ids.shape, self.d_model, dtype=self.model.dtype, device=self.device)

        def hand_on(_layer: int, _hidden: Tensor, _call: Call) -> Tensor:
            return waiting[0]

        def run(hidden: Tensor) -> Tensor:
            waiting[:] = [hidden[:, None].to(self.device)]
            ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=self.device)
            found: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            return found.float().cpu()

        with ExitStack() as stack:
            stack.enter_context(self.weights.outside_of_blocks())
            stack.enter_context(self._empty_blocks(hand_on))
            stack.enter_context(replaced_forward(embedding, embed))
            if self.weights.plain_head is not None:
                stack.enter_context(replaced_forward(self.weights.plain_head, self.weights.head_in_parts))
            for hidden in last:
                yield torch.cat([run(part) for part in torch.split(hidden, _ROWS_AT_ONCE)])

    def _begin_all(self, batches: Sequence[list[list[int]]], store: HiddenStore) -> list[list[Call]]:
        """Put every batch's input of the first block into the store; return what each block is called with."""
        ids = {token for batch in batches for row in batch for token in row} | {self.pad_token_id}
        calls = []
        with self.weights.outside_of_blocks(), self.weights.of_embedding(ids):
            for i, batch in enumerate(batches):
                hidden, call = self._begin(batch)
                store.put((_UNCHANGED, i), hidden)
                calls.append(call)
        return calls

    def _begin(self, batch: list[list[int]]) -> tuple[Tensor, list[Call]]:
        first: list[Tensor] = []
        handed: list[Tensor] = []
        calls: list[Call] = []

        def note(layer: int, hidden: Tensor, call: Call) -> Tensor:
            if layer == 0:
                first.append(hidden)
            elif hidden is not handed[-1]:
                raise NotHandedOnError
            calls.append(call)
            if layer == self.n_layers - 1:
                raise _LastBlockReached
            handed.append(hidden.view_as(hidden))
            return handed[-1]

        ids, mask = self.pad(batch)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with self._empty_blocks(note):
            try:
                self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
            except _LastBlockReached:
                return first[0], calls
        raise NotHandedOnError

    @contextmanager
    def _empty_blocks(self, call: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        def stand_in(layer: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                returned = call(layer, hidden_states, (args, kwargs))
                return (returned, *[None] * (self.returned - 1)) if self.returned else returned

            return forward

        with ExitStack() as stack:
            for layer, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, stand_in(layer)))
            yield


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One reading of all blocks; see `StreamedChat.last_hidden`."""

    chat: StreamedChat
    variants: Sequence[Variant]
    batches: list[list[int]]
    calls: list[list[Call]]
    store: HiddenStore
    last: Tensor
    watch: Watch | None

    def through_all_blocks(self, advance: Advance) -> None:
        last_start = max(variant.start for variant in self.variants)
        for layer, block in enumerate(self.chat.blocks):
            with self.chat.weights.of_block(block):
                for number, variant in enumerate(self.variants):
                    if variant.start <= layer:
                        self._run(number, variant, layer, block)
                for i in range(len(self.batches)):
                    if layer < last_start:
                        self.store.put((_UNCHANGED, i), self._call(block, self.store.get((_UNCHANGED, i)), i, layer))
                    else:
                        self.store.drop((_UNCHANGED, i))
            advance(1)

    def _run(self, number: int, variant: Variant, layer: int, block: nn.Module) -> None:
        ablated = variant.ablated
        with nullcontext() if ablated is None else ablate_subspace_in_block(self.chat, layer, ablated):
            for i, batch in enumerate(self.batches):
                hidden = self.store.get((_UNCHANGED if variant.start == layer else number, i))
                if self.watch is not None and number == 0:
                    self.watch(layer, batch, hidden)
                if variant.start == layer and variant.added is not None:
                    hidden = hidden + variant.added.to(hidden.dtype)
                hidden = self._call(block, hidden, i, layer)
                if layer == self.chat.n_layers - 1:
                    self.last[number, batch] = hidden[:, -1].cpu()
                    self.store.drop((number, i))
                else:
                    self.store.put((number, i), hidden)

    def _call(self, block: nn.Module, hidden: Tensor, i: int, layer: int) -> Tensor:
        args, kwargs = self.calls[i][layer]
        try:
            returned = block(hidden.to(self.chat.device), *args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise ModelError("one batch and one layer do not fit into memory; try a smaller --batch-size") from error
        found: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return found
