"""The residual stream of a loaded model: its decoder blocks, and the modules whose outputs are added to it.

`architectures.modules` says which they are, by the names of the model's parameters; here they are found. A model of a
type that is refused loads and answers all the same: what is refused is to intervene on its stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from abliterate.architectures.config import read_loaded_row
from abliterate.architectures.modules import ModuleWriter, StreamModules, map_modules
from abliterate.architectures.vocabulary import LAYER_LISTS, POSITION_EMBEDDINGS
from abliterate.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """An output that is added to the residual stream.

    Attributes:
        module: whose output it is.
        output: which of its outputs, where it returns several.
    """

    module: nn.Module
    output: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStream:
    """What one decoder block does to the residual stream.

    Attributes:
        block: the block; its input is `resid_pre` of its layer.
        writes: what is added to the stream in it, each once.
        writers: the parameters behind it.
    """

    block: nn.Module
    writes: tuple[Write, ...]
    writers: tuple[ModuleWriter, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualStream:
    """The blocks of a loaded model, in order, with their writes.

    Attributes:
        embeddings: what starts the stream; some models read it past their first block too.
        blocks: one a decoder block.
        not_extracted: why no direction can be extracted from it; None where one can.
    """

    embeddings: tuple[Write, ...]
    blocks: tuple[BlockStream, ...]
    not_extracted: str | None = None


def no_extraction(kind: str, reason: str) -> ModelError:
    """Return the error about a model type from which no direction can be extracted."""
    return ModelError(
        f"no direction can be extracted from a model of type {kind}: {reason}; docs/architectures.md lists the types "
        "from which one can"
    )


def check_extractable(config: "PretrainedConfig", *, name: str) -> None:
    """Refuse by its config a model from which no direction can be extracted, before its weights are read.

    Args:
        config: as transformers reads it.
        name: what to call the model in messages.

    Raises:
        UnsupportedArchitectureError: its type is refused by name, or one of its settings is.
        ModelError: its blocks have no one input each.
    """
    d_model = int(config.get_text_config(decoder=True).hidden_size)
    row, _ = read_loaded_row(config=config.to_dict(), d_model=d_model, name=name)
    if row.not_extracted is not None:
        raise no_extraction(row.model_type, row.not_extracted)


def find_stream(model: "PreTrainedModel", blocks: Sequence[nn.Module], *, d_model: int, name: str) -> ResidualStream:
    """Return the writes of each of a model's decoder blocks.

    Args:
        model: the loaded model.
        blocks: its decoder blocks.
        d_model: width of the residual stream.
        name: what to call the model in messages.

    Raises:
        UnsupportedArchitectureError: its type is refused by name.
        ModelError: a block has no write that is known.
    """
    held = (*model.named_parameters(), *model.named_buffers())
    shapes = {parameter: tuple(tensor.shape) for parameter, tensor in held}
    modules = map_modules(config=model.config.to_dict(), shapes=shapes, d_model=d_model, name=name)
    places = {
        id(block): (stack, layer)
        for stack in modules.stacks
        for layer, block in enumerate(cast(nn.ModuleList, model.get_submodule(stack)))
    }
    found = tuple(_stream_of(model, block, modules, places.get(id(block))) for block in blocks)
    missing = next((each.block for each in found if not each.writes), None)
    if missing is not None:
        children = ", ".join(child for child, _ in missing.named_children())
        raise ModelError(
            f"{name}: cannot tell which modules of a {type(missing).__name__} write to the residual stream "
            f"(children: {children}); its architecture is not supported"
        )
    return ResidualStream(
        embeddings=tuple(Write(module=model.get_submodule(path)) for path in modules.embeddings),
        blocks=found,
        not_extracted=modules.not_extracted,
    )


def _stream_of(
    model: nn.Module, block: nn.Module, modules: StreamModules, place: tuple[str, int] | None
) -> BlockStream:
    writers = modules.of_block(*place) if place else ()
    ways = dict.fromkeys((writer.module, writer.output) for writer in writers)
    writes = tuple(Write(module=model.get_submodule(path), output=output) for path, output in ways)
    return BlockStream(block=block, writes=writes, writers=writers)


def learned_positions(model: "PreTrainedModel") -> int | None:
    """Return how many positions a model has learned embeddings for; None where it has none, and no such end."""
    for name, module in model.named_modules():
        is_of_text = not any(word in name for word in ("vision", "visual", "audio"))
        if is_of_text and name.rpartition(".")[2] in POSITION_EMBEDDINGS and isinstance(module, nn.Embedding):
            n: int | None = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
            return n
    return None


def find_blocks(model: nn.Module, n_layers: int, name: str) -> tuple[nn.Module, ...]:
    """Return a model's decoder blocks, in order; of several stacks, one after the other.

    Raises:
        ModelError: there is no list of that many modules.
    """
    decoder = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else model
    roots = [root for root in (decoder, model) if isinstance(root, nn.Module)]
    lists = [
        (path, module) for root in roots for path, module in root.named_modules() if isinstance(module, nn.ModuleList)
    ]
    whole = [module for _, module in lists if len(module) == n_layers]
    if whole:
        return tuple(whole[0])
    stacks = {id(module): module for path, module in lists if path.rpartition(".")[2] in LAYER_LISTS}
    if not stacks:
        raise ModelError(f"{name}: no list of {n_layers} decoder blocks found; this architecture is not supported")
    return tuple(block for stack in stacks.values() for block in stack)
