"""Interventions on activations, as hooks that live only inside a `with` block, and recording them.

*Ablation* removes a direction at every write to the residual stream: x <- x - r (r . x) at each block's input and at
all that is added in it (Arditi et al. 2024, equation 4); `stream` says what that is. *Addition* adds a vector at one
block's input at all positions (equation 3). *Affine* editing sets the component instead of removing it. What is
recorded is `resid_pre[l]`, the input of block l, at the tokens that are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from abliterate.errors import ModelError
from abliterate.models.chat_model import ChatModel
from abliterate.models.greedy import GreedyDecoder, PromptPass, ReplyPool, can_continue

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Float64


@contextmanager
def ablate_direction(chat: ChatModel, direction: Float[Tensor, "*batch d_model"]) -> Iterator[int]:
    """Remove `direction` from the residual stream at every write, in all blocks and at all positions.

    Args:
        chat: the model.
        direction: one, or one for each row of the batch; normalised here, a zero vector removes nothing.

    Yields:
        how many hooks are attached: one for the embedding, for each block's input, and for each of its writes.

    Raises:
        ModelError: what writes to the stream of this model is not known, or its type is refused by name.
    """
    ablate = _ablating(chat, direction)
    with ExitStack() as stack:
        yield sum(stack.enter_context(_edit_stream(chat, layer, ablate)) for layer in (None, *range(chat.n_layers)))


@contextmanager
def ablate_in_block(chat: ChatModel, layer: int, direction: Float[Tensor, "*batch d_model"]) -> Iterator[int]:
    """Remove `direction` at one block's input and from all that it writes; see `ablate_direction`."""
    with _edit_stream(chat, layer, _ablating(chat, direction)) as n_hooks:
        yield n_hooks


def _ablating(chat: ChatModel, direction: Float[Tensor, "*batch d_model"]) -> Callable[[Tensor], Tensor]:
    placed = _placed(_unit(direction, chat))

    def ablate(hidden: Tensor) -> Tensor:
        unit = placed(hidden.device)
        if unit.dim() == 1:
            return hidden - (hidden @ unit).unsqueeze(-1) * unit
        if hidden.dim() == 1:
            return hidden - (unit @ hidden)[:, None, None] * unit[:, None]
        # Some mixtures of experts hand on all tokens of a batch in one axis, row after row.
        rows = hidden.reshape(len(unit), -1, hidden.shape[-1])
        share = torch.bmm(rows, unit.unsqueeze(-1))
        return torch.baddbmm(rows, share, unit.unsqueeze(1), alpha=-1).reshape(hidden.shape)

    return _in_each_stream(ablate, chat.d_model)


@contextmanager
def ablate_subspace(chat: ChatModel, basis: Float[Tensor, "k d_model"]) -> Iterator[int]:
    """Remove several directions together, as `ablate_direction` removes one.

    Args:
        chat: the model.
        basis: orthonormal rows.

    Yields:
        how many hooks are attached, as `ablate_direction` does.
    """
    ablate = _ablating_subspace(chat, basis)
    with ExitStack() as stack:
        yield sum(stack.enter_context(_edit_stream(chat, layer, ablate)) for layer in (None, *range(chat.n_layers)))


@contextmanager
def ablate_subspace_in_block(chat: ChatModel, layer: int, basis: Float[Tensor, "k d_model"]) -> Iterator[int]:
    """Remove several directions together at one block's input and from all that it writes."""
    with _edit_stream(chat, layer, _ablating_subspace(chat, basis)) as n_hooks:
        yield n_hooks


def _ablating_subspace(chat: ChatModel, basis: Float[Tensor, "k d_model"]) -> Callable[[Tensor], Tensor]:
    if basis.dim() != 2 or basis.shape[1] != chat.d_model:
        raise ModelError(f"basis has shape {tuple(basis.shape)}; the model's width is {chat.d_model}")
    placed = _placed(basis.to(chat.device, chat.model.dtype))

    def ablate(hidden: Tensor) -> Tensor:
        rows = placed(hidden.device)
        ablated: Tensor = hidden - (hidden @ rows.T) @ rows
        return ablated

    return _in_each_stream(ablate, chat.d_model)


def _in_each_stream(edit: Callable[[Tensor], Tensor], d_model: int) -> Callable[[Tensor], Tensor]:
    """Edit each of several streams that a model holds side by side in one axis."""

    def edit_each(hidden: Tensor) -> Tensor:
        if hidden.shape[-1] == d_model:
            return edit(hidden)
        return edit(hidden.reshape(*hidden.shape[:-1], -1, d_model)).reshape(hidden.shape)

    return edit_each


@contextmanager
def add_direction(
    chat: ChatModel, vector: Float[Tensor, "*batch d_model"], *, layer: int, coefficient: float = 1.0
) -> Iterator[int]:
    """Add `coefficient * vector` to the input of block `layer` at all positions.

    `vector` is one, or one for each row of the batch.
    """
    dose = (coefficient * vector).to(chat.device, chat.model.dtype)
    add = _adding(dose.unsqueeze(1) if dose.dim() == 2 else dose)
    handle = _edit_input(chat.blocks[layer], _in_each_stream(add, chat.d_model))
    try:
        yield 1
    finally:
        handle.remove()


@contextmanager
def set_component(chat: ChatModel, direction: Float[Tensor, " d_model"], components: Sequence[float]) -> Iterator[int]:
    """Hold the residual stream's component along `direction` at given values: affine concept editing.

    At the input of block l, x <- x - r (r . x) + components[l] r; what the block writes is ablated, so that
    the component stays there until the next block (Marshall et al. 2024, arXiv 2411.09003, with the
    harmless mean as the point of reference). With components of zero this is `ablate_direction`.

    Args:
        chat: the model.
        direction: normalised here.
        components: one value a block, in the units of the stream.

    Yields:
        how many hooks are attached: one more a block than `ablate_direction` does.
    """
    unit = _unit(direction, chat)
    with ablate_direction(chat, direction) as n_hooks, ExitStack() as stack:
        for block, component in zip(chat.blocks, components, strict=True):
            # Hooks run in the order they were attached: the component is first removed, then set.
            stack.callback(_edit_input(block, _in_each_stream(_adding(component * unit), chat.d_model)).remove)
        yield n_hooks + chat.n_layers


@contextmanager
def capture_inputs(
    chat: ChatModel, receive: Callable[[int, Float[Tensor, "batch tokens d_model"]], None]
) -> Iterator[int]:
    """Call `receive(layer, hidden)` with the input of every block."""
    with ExitStack() as stack:
        for layer, block in enumerate(chat.blocks):
            stack.callback(_edit_input(block, _watch(layer, receive)).remove)
        yield chat.n_layers


@contextmanager
def capture_stream(
    chat: ChatModel, receive: Callable[[int, Float[Tensor, "batch tokens d_model"]], None]
) -> Iterator[int]:
    """Like `capture_inputs`, and with layer = n_layers what the last block puts out, which the final norm gets."""
    with capture_inputs(chat, receive) as n_hooks:
        handle = edit_output(chat.blocks[-1], _watch(chat.n_layers, receive))
        try:
            yield n_hooks + 1
        finally:
            handle.remove()


def _watch(layer: int, receive: Callable[[int, Tensor], None]) -> Callable[[Tensor], Tensor]:
    def look(hidden: Tensor) -> Tensor:
        receive(layer, hidden)
        return hidden

    return look


@contextmanager
def start_at_block(
    chat: ChatModel, hidden: Float[Tensor, "batch tokens d_model"], *, layer: int, returned: Sequence[int]
) -> Iterator[None]:
    """Skip the blocks before `layer` and give block `layer` the input `hidden`.

    The model must be run on token ids of the same shape, so that positions and masks are the right ones. Where a block
    needs more of those before it than their output, this is not the same pass; `stream_probe` finds out.

    Args:
        chat: the model.
        hidden: the block's input.
        layer: the block.
        returned: of each block how many values it returns; 0 for one that is not in a tuple.
    """
    handle = _edit_input(chat.blocks[layer], lambda _ignored: hidden)
    try:
        with ExitStack() as stack:
            for block, count in zip(chat.blocks[:layer], returned, strict=False):
                stack.enter_context(replaced_forward(block, _pass_through(count)))
            yield
    finally:
        handle.remove()


@contextmanager
def finish_with_last_tokens(chat: ChatModel, n_tokens: int) -> Iterator[int]:
    """Run the MLP of the last block for the last tokens of each row alone.

    Theirs are the only logits that are right then, and what the block puts out at the other tokens is not the model's.
    Where an MLP does not treat tokens one by one, this is not the same pass; `stream_probe` finds out.

    Args:
        chat: the model.
        n_tokens: how many of the last tokens are read.

    Yields:
        how many modules are run in part; 0 where none is known to be an MLP and nothing more.
    """
    last = chat.stream.blocks[-1]
    owners = [(writer.role, chat.model.get_submodule(writer.owner)) for writer in last.writers]
    with ExitStack() as stack:
        n_modules = 0
        for child in last.block.children():
            inside = set(child.modules())
            if {role for role, owner in owners if owner in inside} == {"mlp"}:
                stack.enter_context(replaced_forward(child, _for_last_tokens(child.forward, n_tokens)))
                n_modules += 1
        yield n_modules


def _for_last_tokens(run: Callable[..., Any], n_tokens: int) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        n_left_out = hidden_states.shape[1] - n_tokens
        if hidden_states.dim() != 3 or n_left_out <= 0:
            return run(hidden_states, *args, **kwargs)
        output = run(hidden_states[:, -n_tokens:].contiguous(), *args, **kwargs)
        written, *rest = output if isinstance(output, tuple) else (output,)
        padded = nn.functional.pad(written, (0, 0, n_left_out, 0))
        return (padded, *rest) if isinstance(output, tuple) else padded

    return forward


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module call `forward` instead of its own, which may itself stand in for another (as accelerate's do)."""
    before = module.__dict__.get("forward")
    cast(Any, module).forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            cast(Any, module).forward = before


def _pass_through(count: int) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states, *[None] * (count - 1)) if count else hidden_states

    return forward


@contextmanager
def _edit_stream(chat: ChatModel, layer: int | None, edit: Callable[[Tensor], Tensor]) -> Iterator[int]:
    """Edit a block's input and all that it adds to the stream; without a layer, what starts the stream."""
    writes = chat.stream.embeddings if layer is None else chat.stream.blocks[layer].writes
    with ExitStack() as stack:
        if layer is not None:
            stack.callback(_edit_input(chat.blocks[layer], edit).remove)
        for write in writes:
            stack.callback(edit_output(write.module, edit, output=write.output).remove)
        yield len(writes) + (layer is not None)


def _unit(direction: Float[Tensor, "*batch d_model"], chat: ChatModel) -> Float[Tensor, "*batch d_model"]:
    if direction.dim() not in {1, 2} or direction.shape[-1] != chat.d_model:
        raise ModelError(f"direction has shape {tuple(direction.shape)}; the model's width is {chat.d_model}")
    double = direction.to(torch.float64)
    unit: Tensor = (double / double.norm(dim=-1, keepdim=True).clamp(min=1e-8)).to(chat.device, chat.model.dtype)
    return unit


def _adding(dose: Tensor) -> Callable[[Tensor], Tensor]:
    placed = _placed(dose)
    return lambda hidden: hidden + placed(hidden.device)


def _placed(tensor: Tensor) -> Callable[[torch.device], Tensor]:
    """Return the tensor on any device that is asked for: blocks may lie on several."""
    return cache(tensor.to)


def _edit_input(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> RemovableHandle:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        # A block takes the stream first, under whatever name.
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: edit(kwargs[name])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def edit_output(module: nn.Module, edit: Callable[[Tensor], Tensor], *, output: int = 0) -> RemovableHandle:
    """Replace a module's output, or one of several, by what `edit` makes of it, until the handle is removed."""

    def hook(_module: nn.Module, _args: Any, returned: Any) -> Any:
        if not isinstance(returned, tuple):
            return edit(returned)
        if returned[output] is None:
            return returned
        return (*returned[:output], edit(returned[output]), *returned[output + 1 :])

    return module.register_forward_hook(hook)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What one pass over some prompts left.

    Attributes:
        activations: resid_pre at the post-instruction tokens, in the order of the positions -n_pos .. -1, in the
            model's dtype on the CPU.
        logits: on the CPU, at the last token.
    """

    activations: Float[Tensor, "n_prompts n_pos n_layers d_model"]
    logits: Float32[Tensor, "n_prompts vocab"]


@torch.inference_mode()
def record(
    chat: ChatModel,
    rows: Sequence[Sequence[int]],
    *,
    decoder: GreedyDecoder | None = None,
    receive: Callable[[int, list[int]], None] = lambda _index, _reply: None,
    advance: Callable[[int], None] | None = None,
) -> Recording:
    """Run the prompts once and keep resid_pre at the post-instruction tokens and the last logits.

    Args:
        chat: the model.
        rows: token ids of the rendered prompts.
        decoder: goes on from each batch with replies; None: there are none.
        receive: called with the index of each prompt and its reply.
        advance: called with the number of prompts done.
    """
    if decoder is not None and not can_continue(chat, rows, max_new_tokens=decoder.max_new_tokens):
        for i, reply in enumerate(decoder.replies(rows)):
            receive(i, reply)
        decoder = None
    n_positions = chat.chat_format.n_positions
    cache, n_cached = chat.share_prefix(rows, keep=n_positions)
    activations = torch.zeros(len(rows), n_positions, chat.n_layers, chat.d_model, dtype=chat.model.dtype)
    logits: list[Tensor] = [torch.empty(0)] * len(rows)
    pool = None if decoder is None else ReplyPool(decoder, receive)

    def run(indices: list[int]) -> None:
        def keep(layer: int, hidden: Tensor) -> None:
            activations[indices, :, layer] = hidden[:, -n_positions:].cpu()

        batch = [list(rows[i][n_cached:]) for i in indices]
        begun: PromptPass | None = None
        with capture_inputs(chat, keep):
            if decoder is None:
                result = chat.forward(batch, cache=cache, n_cached=n_cached)
            else:
                begun = decoder.run_prompts(batch, cache=cache, n_cached=n_cached)
                result = begun.logits
        if pool is not None and begun is not None:
            pool.enter(indices, begun)
        for i, row in zip(indices, result.float().cpu(), strict=True):
            logits[i] = row
        if advance is not None:
            advance(len(indices))

    chat.for_batches([len(row) - n_cached for row in rows], run)
    if pool is not None:
        pool.finish()
    return Recording(activations=activations, logits=torch.stack(logits))


def difference_in_means(
    *,
    harmful: Float[Tensor, "n_harmful n_pos n_layers d_model"],
    harmless: Float[Tensor, "n_harmless n_pos n_layers d_model"],
) -> Float64[Tensor, "n_pos n_layers d_model"]:
    """Return mean(harmful) - mean(harmless), the candidate directions, un-normalised.

    Arditi et al. 2024, equation 1; accumulated in float64 as published.
    """
    return harmful.to(torch.float64).mean(dim=0) - harmless.to(torch.float64).mean(dim=0)
