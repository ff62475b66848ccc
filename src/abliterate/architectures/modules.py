"""Which modules of a loaded model write to the residual stream: the owners of the tensors that an edit changes.

The rules are those of the files (`table`, `names`), read on the names of a loaded model's parameters, so that what a
hook ablates is what `orthogonalize` edits. What is hooked is a writer's way into the stream, the module whose output is
added: the owner of the tensor, what holds the experts where that is one of them, the last norm or the convolution
behind it, or the branch that it is a part of.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abliterate.architectures import vocabulary
from abliterate.architectures.config import read_loaded_row
from abliterate.architectures.names import (
    WRITERS,
    NormChains,
    Part,
    PostNorm,
    Role,
    TensorName,
    parse_name,
    writer_behind,
)

# Where a loaded model holds a weight in another form, what it holds of it belongs to the same module.
_WRITING = {Part.WRITER, Part.BIAS, Part.COMPANION}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleWriter:
    """One parameter of a loaded model that writes to the residual stream, and its way there.

    Attributes:
        parameter: Its name in the loaded model.
        owner: Path of the module that computes with it.
        role: attn or mlp.
        layer: Index of its decoder block in its list of blocks.
        module: Path of the module whose output is added to the stream.
        output: Which of the module's outputs it is, where it returns several.
        has_norm: Whether that module is a norm behind the one that owns the parameter.
        norm_chain: The norms between what the owner computes and the stream, innermost first, as parameters of the
            model.
        is_added: What the owner computes, or the norms make of it, is added to the stream as it is, and not what a
            convolution or another branch makes of it.
    """

    parameter: str
    owner: str
    role: Role
    layer: int
    module: str
    output: int = 0
    has_norm: bool = False
    norm_chain: tuple[PostNorm, ...] = ()
    is_added: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamModules:
    """The modules around a loaded model's residual stream.

    Attributes:
        model_type: Of the text model.
        stacks: Paths of the lists of decoder blocks.
        embeddings: Paths of the modules whose outputs start the stream: the token embedding, or the norm behind it, and
            what else writes outside the blocks.
        writers: Of each list, by block.
        not_extracted: Why no direction can be extracted; None where one can.
    """

    model_type: str
    stacks: tuple[str, ...]
    embeddings: tuple[str, ...]
    writers: Mapping[str, Mapping[int, tuple[ModuleWriter, ...]]]
    not_extracted: str | None = None

    def of_block(self, stack: str, layer: int) -> tuple[ModuleWriter, ...]:
        """Return the writers of one block."""
        return self.writers.get(stack, {}).get(layer, ())


def map_modules(
    *, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], d_model: int, name: str
) -> StreamModules:
    """Return which modules of a loaded model write to its residual stream.

    A model type that is not in the table is mapped by the rules common to all.

    Args:
        config: The loaded model's config, as in config.json.
        shapes: Of each parameter and buffer, by its name in the loaded model.
        d_model: Width of the residual stream.
        name: What to call the model in messages.

    Raises:
        UnsupportedArchitectureError: The model type is refused by name, or one of its settings is.
    """
    row, has_towers = read_loaded_row(config=config, d_model=d_model, name=name)
    names = {parameter: parse_name(parameter, has_towers=has_towers) for parameter in shapes}
    chains = NormChains(names, post_norm=row.post_norm, plus_one=row.plus_one)
    parts = {(parsed.stack, parsed.layer, parsed.path.partition(".")[0]) for parsed in names.values()}
    writers: dict[str, dict[int, tuple[ModuleWriter, ...]]] = {}
    for parameter, parsed in names.items():
        if parsed.layer is None or parsed.part not in _WRITING:
            continue
        # Experts may end in a latent space, from which another matrix leads to the stream.
        if row.latent_experts and "experts" in parsed.path.split(".") and d_model not in shapes[parameter]:
            continue
        behind = next(
            (part for part in _convolutions(parsed.role) if (parsed.stack, parsed.layer, part) in parts), None
        )
        behind = vocabulary.BRANCHES.get(parsed.path, behind)
        writer = _writer(parameter, parsed, chains, is_stack=len(shapes[parameter]) == 3, behind=behind)
        blocks = writers.setdefault(parsed.stack, {})
        blocks[parsed.layer] = (*blocks.get(parsed.layer, ()), writer)
    return StreamModules(
        model_type=row.model_type,
        embeddings=tuple(
            dict.fromkeys(
                (chains.of(parsed)[-1].weight if chains.of(parsed) else parameter).rpartition(".")[0]
                for parameter, parsed in names.items()
                if parsed.part in {Part.TOKEN_EMBEDDING, Part.OUTSIDE_WRITER}
            )
        ),
        stacks=tuple(sorted({parsed.stack for parsed in names.values() if parsed.stack})),
        writers=writers,
        not_extracted=row.not_extracted,
    )


def _convolutions(role: Role | None) -> tuple[str, ...]:
    return vocabulary.CONVOLUTIONS.get(str(role), ())


def _writer(
    parameter: str, name: TensorName, chains: NormChains, *, is_stack: bool, behind: str | None
) -> ModuleWriter:
    assert name.layer is not None
    assert name.role is not None
    chain = chains.of(name)
    block = f"{name.stack}.{name.layer}"
    owner = _owner(parameter.removeprefix(f"{block}."), name.path)
    module, output = f"{block}.{owner}", 0
    if behind is not None:
        module = f"{block}.{behind}"
    elif chain:
        module = chain[-1].weight.rpartition(".")[0]
    elif name.path in vocabulary.HANDED_ON:
        inner, output = vocabulary.HANDED_ON[name.path]
        module = f"{block}.{inner}"
    elif is_stack or "experts" in name.path.split("."):
        # An expert sees some tokens only, in an order of its own; what holds the experts puts them back.
        module = f"{block}.{name.path.partition('.')[0]}"
    return ModuleWriter(
        parameter=parameter,
        owner=f"{block}.{owner}",
        role=name.role,
        layer=name.layer,
        module=module,
        output=output,
        has_norm=bool(chain) and behind is None,
        norm_chain=chain if behind is None else (),
        is_added=behind is None,
    )


def _owner(within_block: str, path: str) -> str:
    """Return the module within the block that computes with a parameter: of a companion, that of its writer."""
    writer = writer_behind(path)
    if writer is None or path in WRITERS:
        return within_block.rpartition(".")[0]
    parts, depth = within_block.split("."), writer.count(".") + 1
    is_module = parts[depth - 1] == writer.rpartition(".")[2] and len(parts) > depth
    return ".".join(parts[: depth if is_module else depth - 1])
