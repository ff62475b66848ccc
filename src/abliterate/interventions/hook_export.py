"""An edit for weights that must not be touched: where a run-time has to hook a model, and what it takes out there.

`hooks.json` names modules of the model as transformers builds it (vLLM and others mostly keep the names), and
`hooks.safetensors` holds the vectors. At each place the tensor x, of width d_model in its last axis, becomes

    remove   x - strength * U^T (U x)       U: orthonormal rows, tensor `remove` or `remove.LAYER`
    add      x + v                          v: tensor `add`

All places with strength 1 together are `--intervention ablate`: the stream's component is gone at every block's input.
An addition is `--intervention add`, and llama.cpp takes the same as a control vector (`control_vector.gguf`).
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from abliterate.architectures.modules import StreamModules, map_modules
from abliterate.checkpoints.atomic_directory import published_directory
from abliterate.checkpoints.model_source import ModelSource, as_source
from abliterate.checkpoints.provenance import versions
from abliterate.directions import Direction, load_direction, orthonormalize
from abliterate.editing.adapter import write_contents
from abliterate.editing.options import ROLES, EditOptions
from abliterate.editing.plan_report import check_output
from abliterate.errors import InputError
from abliterate.formats.gguf_checkpoint import holds_gguf
from abliterate.models.loading import empty_model
from abliterate.progress import SILENT, ProgressReporter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

HOOKS_NAME, VECTORS_NAME, CONTROL_NAME, README_NAME = (
    "hooks.json",
    "hooks.safetensors",
    "control_vector.gguf",
    "README.md",
)
SCHEMA = "abliterate.hooks/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the residual stream is changed.

    Attributes:
        module: Path of a module of the model.
        at: Its input (the first argument) or its output.
        output: Which of its outputs, where it returns several.
        layer: Index of the decoder block in its list; None outside of the blocks.
        role: embed, attn or mlp of what writes there; None of a block's input.
        operation: remove or add.
        tensor: What is removed or added, by its name in the file of vectors.
        strength: How much of the component is removed.
    """

    module: str
    at: Literal["input", "output"]
    output: int = 0
    layer: int | None
    role: str | None
    operation: Literal["remove", "add"]
    tensor: str
    strength: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HookExport:
    """What was written.

    Attributes:
        model: The model, as it was named.
        revision: Its commit on the Hub; None of a local one.
        output: The directory.
        model_type: Of the text model.
        d_model: Width of the residual stream.
        whole: Whether the places together are `--intervention ablate`, or `add`.
        directions: SHA-256 of each direction.
        prompt_hashes: Of the prompts that they were found with.
        places: Where the stream is changed.
        control_vector: Whether there is a control vector for llama.cpp, too.
        versions: Of what wrote it.
    """

    model: str
    revision: str | None
    output: str
    model_type: str
    d_model: int
    whole: bool
    directions: tuple[str, ...]
    prompt_hashes: tuple[str, ...]
    places: tuple[Place, ...]
    control_vector: bool
    versions: dict[str, str]


def export_hooks(
    *,
    source: ModelSource | Path | str,
    direction: Direction | Path | Sequence[Direction | Path],
    output: Path | str,
    options: EditOptions | None = None,
    overwrite: bool = False,
    progress: ProgressReporter = SILENT,
) -> HookExport:
    """Write where a run-time has to change a model's residual stream, and how; no weight is read.

    Args:
        source: The model: its config.json is all that is needed.
        direction: A direction or the file that holds it, or several, whose span is removed.
        output: Directory to make.
        options: `components`, `layers`, `strength`, `strengths` and `add` say what is changed, and how far.
        overwrite: Replace `output` if it is what this or another format wrote, or empty.
        progress: Told what the files hold.

    Raises:
        InputError: `output` cannot be used, or an option is about weights.
        DirectionError: A direction is malformed, or has another width than the model.
        ModelError: transformers does not build the model.
        UnsupportedArchitectureError: Its type is refused by name.
    """
    options = options or EditOptions()
    _check_options(options)
    given = as_source(source)
    if holds_gguf(given.path):
        raise InputError(f"{given.name}: hooks need config.json; name the checkpoint that the GGUF file was made of")
    target = Path(output)
    check_output(target, given.path, overwrite=overwrite)
    model = empty_model(given.path, name=given.name)
    config = model.config
    d_model = int(config.get_text_config(decoder=True).hidden_size)
    directions = _directions(direction, d_model=d_model)
    modules = _modules(model, d_model=d_model, name=given.name)
    places, vectors = _places(modules, directions, options, d_model=d_model)
    if not places:
        raise InputError(f"{given.name}: --components and --layers select nothing that writes to the stream")
    control = _control_vector(places, vectors, modules) if options.add is not None else None
    export = HookExport(
        model=given.name,
        revision=given.revision,
        output=str(target),
        model_type=modules.model_type,
        d_model=d_model,
        whole=options.add is not None or _is_whole(options),
        directions=tuple(each.sha256 for each in directions),
        prompt_hashes=tuple(sorted({str(h) for each in directions for h in each.metadata.get("prompt_hashes") or ()})),
        places=places,
        control_vector=control is not None,
        versions=versions("abliterate", "transformers"),
    )
    names = (HOOKS_NAME, VECTORS_NAME, README_NAME, *((CONTROL_NAME,) if control else ()))
    with published_directory(target, overwrite=overwrite, files=names) as partial:
        write_contents(_contents(export, vectors, control), partial)
    progress.message(f"{len(places)} places in {HOOKS_NAME}, {len(vectors)} tensors in {VECTORS_NAME}")
    return export


def _check_options(options: EditOptions) -> None:
    plain = EditOptions()
    for flag, given in (
        ("--preserve-norms", options.preserve_norms),
        ("--quantized", options.quantized != plain.quantized),
        ("--tied", options.tied != plain.tied),
    ):
        if given:
            raise InputError(f"{flag}: is about weights, and hooks leave them as they are; leave it out")


def _directions(given: Direction | Path | Sequence[Direction | Path], *, d_model: int) -> tuple[Direction, ...]:
    several = [given] if isinstance(given, (Direction, Path)) else list(given)
    found = tuple(
        each if isinstance(each, Direction) else load_direction(Path(each), d_model=d_model) for each in several
    )
    for each in found:
        if each.d_model != d_model:
            raise InputError(f"the direction has {each.d_model} entries; the model's width is {d_model}")
    return found


def _modules(model: "PreTrainedModel", *, d_model: int, name: str) -> StreamModules:
    held = (*model.named_parameters(), *model.named_buffers())
    shapes = {parameter: tuple(tensor.shape) for parameter, tensor in held}
    return map_modules(config=model.config.to_dict(), shapes=shapes, d_model=d_model, name=name)


def _is_whole(options: EditOptions) -> bool:
    plain = EditOptions()
    return (
        options.strengths is None
        and options.layers is None
        and options.strength == 1
        and set(options.components) == set(plain.components) == set(ROLES)
    )


def _places(
    modules: StreamModules, directions: Sequence[Direction], options: EditOptions, *, d_model: int
) -> tuple[tuple[Place, ...], dict[str, "Tensor"]]:
    if options.add is not None:
        return _addition(modules, directions, options.add)
    basis = orthonormalize(torch.stack([each.vector for each in directions]))[0]
    vectors = {"remove": basis.to(torch.float32)}
    by_layer = None if options.strengths is None else options.strengths.by_layer(d_model=d_model)
    if by_layer is not None:
        rows = torch.from_numpy(by_layer).to(torch.float32)
        vectors |= {f"remove.{layer}": row[None] for layer, row in enumerate(rows)}
    found = _all_places(modules, whole=_is_whole(options))
    return tuple(_chosen(found, options, apart=by_layer is not None)), vectors


def _all_places(modules: StreamModules, *, whole: bool) -> Iterator[Place]:
    """Yield what starts the stream, each block's input if all of it is cleaned, and all that is added to it."""
    plain: dict[str, Any] = {"operation": "remove", "tensor": "remove"}
    for path in modules.embeddings:
        yield Place(module=path, at="output", layer=None, role="embed", **plain)
    for stack in modules.stacks:
        for layer in sorted(modules.writers.get(stack, {})):
            if whole:
                yield Place(module=f"{stack}.{layer}", at="input", layer=layer, role=None, **plain)
            ways = {(writer.module, writer.output): writer.role for writer in modules.of_block(stack, layer)}
            for (module, output), role in ways.items():
                yield Place(module=module, at="output", output=output, layer=layer, role=role, **plain)


def _chosen(places: Iterator[Place], options: EditOptions, *, apart: bool) -> Iterator[Place]:
    layers = None if options.layers is None else range(*options.layers)
    for place in places:
        if place.role is None:
            yield place
        elif options.strengths is not None:
            strength = options.strengths.of(place.role, place.layer)
            tensor = f"remove.{place.layer}" if apart and place.layer is not None else place.tensor
            if strength:
                yield replace(place, strength=strength, tensor=tensor)
        elif place.role in options.components and (layers is None or (place.layer or 0) in layers):
            yield replace(place, strength=options.strength)


def _addition(
    modules: StreamModules, directions: Sequence[Direction], coefficient: float
) -> tuple[tuple[Place, ...], dict[str, "Tensor"]]:
    direction = directions[0]
    layer = direction.metadata.get("layer")
    if direction.mean_difference is None or not isinstance(layer, int):
        raise InputError("--add needs a direction file with its mean difference and layer; make one with `extract`")
    stacks = [stack for stack in modules.stacks if layer in modules.writers.get(stack, {})]
    if len(stacks) != 1:
        raise InputError(f"--add: the direction is of layer {layer}, and the model has {len(stacks)} such blocks")
    place = Place(module=f"{stacks[0]}.{layer}", at="input", layer=layer, role=None, operation="add", tensor="add")
    return (place,), {"add": (coefficient * direction.mean_difference.double()).to(torch.float32)}


def _control_vector(places: Sequence[Place], vectors: dict[str, "Tensor"], modules: StreamModules) -> bytes | None:
    """Return an addition as llama.cpp's control vector, which is added to what a block puts out.

    `direction.N` is added behind block N, so before block N + 1; llama.cpp has none behind block 0. None for the inputs
    of blocks 0 and 1, and where the package gguf is not installed.
    """
    layer = places[0].layer
    if layer is None or layer < 2:
        return None
    try:
        import gguf
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONTROL_NAME
        writer = gguf.GGUFWriter(path, "controlvector")
        writer.add_string("controlvector.model_hint", modules.model_type)
        writer.add_int32("controlvector.layer_count", 1)
        writer.add_tensor(f"direction.{layer - 1}", vectors["add"].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _contents(export: HookExport, vectors: dict[str, "Tensor"], control: bytes | None) -> dict[str, bytes]:
    from safetensors.torch import save

    plain = {key: value for key, value in asdict(export).items() if key != "output"}
    hooks = json.dumps({"schema": SCHEMA, "vectors": VECTORS_NAME, **plain}, indent=2) + "\n"
    contents = {VECTORS_NAME: save(vectors, metadata={"format": "pt"}), README_NAME: _readme(export).encode()}
    if control is not None:
        contents[CONTROL_NAME] = control
    return {**contents, HOOKS_NAME: hooks.encode()}


def _readme(export: HookExport) -> str:
    adds = export.places[0].operation == "add"
    kind = "An addition to" if adds else "A direction taken out of"
    control = f"`--control-vector {CONTROL_NAME}` adds the same vector, its scale is 1 already. " if adds else ""
    engine = control if export.control_vector else ""
    return _README.format(
        title=f"{kind} the residual stream of {export.model}, at run time",
        n=len(export.places),
        hooks=HOOKS_NAME,
        vectors=VECTORS_NAME,
        llama_cpp=f"{engine}Nothing takes a direction out at run time; for that edit the GGUF file itself.",
    )


_README = """\
# {title}

Made by `abliterate orthogonalize --format hooks`. The weights stay as they are; whoever runs the model
applies `{hooks}` to it. This is about refusals: a model that is run so has **reduced safety**, and may
answer what it was trained to refuse. Nothing was measured here; `abliterate evaluate --intervention` does.

`{hooks}` lists {n} places, each a module, its input or output, and a tensor of `{vectors}`:

- `remove`: x becomes x - strength * U^T (U x) over its last axis, U being the rows of the tensor;
- `add`: x becomes x + the tensor.

What engines do with it:

- transformers: forward hooks; `examples/apply_hooks.py` of abliterate attaches them.
- vLLM, SGLang: no option of their own. A plug-in registers forward hooks on the modules of these names in
  each worker. Captured graphs leave hooks out (`enforce_eager`). A block there takes what was added last
  beside the stream, so hook the outputs, which suffice, and leave the blocks' inputs.
- llama.cpp: {llama_cpp}
"""
