"""A tiny twin: a small random model of a checkpoint's own config, on which an edit not known to be exact is tried.

The twin is built by transformers in float64, saved, edited on disk by the same code with the same rules, loaded and
run. Only if its stream then has nothing of the direction, and the names that were edited are those that would be edited
in the checkpoint, does an edit of an unknown model type go on. No code that comes with a checkpoint is run.

Of a type that is known not to be cleaned whole (`table`, `remains`) the twin is the text model alone, in float32. It
shows how much an edit leaves, of several directions, so that chance has less of a say; it must be clearly less than
before. The names that such a type has on disk are proved by the conformance suite, not by the twin.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from abliterate.architectures.tiny_config import shrink_config
from abliterate.architectures.vocabulary import LAYER_LISTS, TOWER
from abliterate.architectures.writers import StreamMap, map_checkpoint, map_stream
from abliterate.checkpoints.checkpoint import CONFIG_NAME, Checkpoint, open_checkpoint
from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.plan import TwinProof
from abliterate.editing.plan_report import Layout, pattern_of
from abliterate.errors import UnsupportedArchitectureError
from abliterate.files import in_one_line
from abliterate.models.loading import class_of
from abliterate.progress import SILENT, ProgressReporter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# |r . h| / |h|: what rounding in float64 may leave, and what a stream that nothing was taken out of has at least.
CLEAN, DIRTY = 1e-6, 1e-3
# What a partial edit may leave at most of the mean |r . h| / |h|, and directions that it is measured of.
CLEARLY_LESS = 0.85
_PARTIAL_DIRECTIONS = 8
# A twin is meant to be small; one that is not has sizes under names that are not known.
_MAX_PARAMETERS = 20_000_000
_SHARD_SIZE = "60KB"
_SEQUENCES, _TOKENS = 3, 20
# Settings of how a model is run or loaded, and no part of its architecture.
_NOT_ARCHITECTURE = re.compile(r"_.*|.*_implementation|architectures|transformers_version|(torch_)?dtype|auto_map")


def prove_on_tiny_twin(
    *, layout: Layout, options: EditOptions | None = None, progress: ProgressReporter = SILENT
) -> TwinProof | None:
    """Try the edit on a tiny twin of a checkpoint whose model type is not known, or cannot be cleaned whole.

    Args:
        layout: The checkpoint's config and headers.
        options: Whether they are accepted, `unverified` or `partial`; by default types that are not known.
        progress: Told what was found.

    Returns:
        What was measured; None for a type that is known and cleaned whole, which needs no proof.

    Raises:
        UnsupportedArchitectureError: The type is refused by name, transformers has no such model, or the twin does
            not come out as it must or is not edited where the checkpoint would be.
        CheckpointError: The checkpoint cannot be planned for.
    """
    options = options or EditOptions(unverified=True)
    view = layout.view(options)
    stream = map_stream(
        config=view.config,
        tensors=tuple(view.tensors()),
        path=layout.path,
        same_bytes=layout.same_bytes,
        unverified=options.unverified,
        partial=options.partial,
    )
    if stream.verified and stream.remainder is None:
        return None
    why = "is not known" if not stream.verified else "is not cleaned whole by an edit of weights"
    progress.message(f"model type {stream.model_type!r} {why}; trying the edit on a tiny model of its config")
    with tempfile.TemporaryDirectory(prefix="abliterate-twin-") as directory, _quiet(), torch.random.fork_rng([]):
        proof = (_try if not stream.verified else _try_partial)(view, stream, Path(directory))
    if not stream.verified:
        found = f"clean after the edit: |r.h|/|h| was {proof.before:.3g} at most, and is {proof.after:.3g}"
    else:
        found = (
            f"cleaner after the edit: |r.h|/|h| was {proof.mean_before:.3g} on average, and is {proof.mean_after:.3g}"
        )
    progress.message(f"its stream is {found}")
    return proof


def _try(view: Checkpoint, stream: StreamMap, work: Path) -> TwinProof:
    base, edited = work / "base", work / "edited"
    refusal = f"{view.path / CONFIG_NAME}: model type {stream.model_type!r} is not known and --unverified refuses it"
    with _refusing(refusal, "no tiny model of it can be built"):
        model = _build(_tiny_config(view.config), torch.float64)
        _check_tie(model, stream)
        model.save_pretrained(base, max_shard_size=_SHARD_SIZE)
    with _refusing(refusal, "a tiny model of it cannot be edited as this checkpoint would be"):
        _check_same_writers(stream, map_checkpoint(open_checkpoint(base), unverified=True))
        directions = _edit(base, edited, n=1, options=EditOptions(unverified=True))
    with _refusing(refusal, "a tiny model of it does not show that the edit is complete"):
        proof = _measure(model, base, edited, directions)
        _check_clean(proof.before, proof.after)
    return proof


def _try_partial(view: Checkpoint, stream: StreamMap, work: Path) -> TwinProof:
    base, edited = work / "base", work / "edited"
    refusal = f"{view.path / CONFIG_NAME}: --partial refuses model type {stream.model_type!r} with this config"
    with _refusing(refusal, "no tiny model of it can be built"):
        model = _build(_tiny_config(_text_config(view.config, stream)), torch.float32)
        model.save_pretrained(base, max_shard_size=_SHARD_SIZE)
    with _refusing(refusal, "a tiny model of it cannot be edited"):
        _check_same_kinds(stream, map_checkpoint(open_checkpoint(base), partial=True))
        directions = _edit(base, edited, n=_PARTIAL_DIRECTIONS, options=EditOptions(partial=True))
    with _refusing(refusal, "a tiny model of it does not show that the edit takes anything away"):
        proof = _measure(model, base, edited, directions)
        _check_less(proof)
    return proof


def _edit(base: Path, edited: Path, *, n: int, options: EditOptions) -> Tensor:
    """Take n random directions out of a checkpoint and return them, [n, d_model], orthonormal."""
    d_model = map_checkpoint(open_checkpoint(base), unverified=options.unverified, partial=options.partial).d_model
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(n, d_model, generator=generator, dtype=torch.float64).T).Q.T
    directions = [make_direction(mean_difference=vector) for vector in vectors]
    orthogonalize_checkpoint(source=base, direction=directions, output=edited, options=options)
    return torch.stack([direction.vector for direction in directions])


def _measure(model: "PreTrainedModel", base: Path, edited: Path, directions: Tensor) -> TwinProof:
    (before, mean_before), (after, mean_after) = (
        stream_components(_load(model, path), directions) for path in (base, edited)
    )
    return TwinProof(before=before, after=after, mean_before=mean_before, mean_after=mean_after)


def _check_clean(before: float, after: float) -> None:
    # Written so that NaN is refused too.
    if not before > DIRTY:
        raise ValueError(f"before the edit |r.h|/|h| is only {before:.3g} in its stream")
    if not after < CLEAN:
        raise ValueError(f"|r.h|/|h| is {before:.3g} in its stream before the edit, and still {after:.3g} after it")


def _check_less(proof: TwinProof) -> None:
    if not proof.mean_before > DIRTY:
        raise ValueError(f"before the edit |r.h|/|h| is only {proof.mean_before:.3g} in its stream on average")
    if not proof.mean_after < CLEARLY_LESS * proof.mean_before:
        raise ValueError(
            f"|r.h|/|h| is {proof.mean_before:.3g} in its stream on average before the edit, and still "
            f"{proof.mean_after:.3g} after it"
        )


def _text_config(config: Mapping[str, Any], stream: StreamMap) -> dict[str, Any]:
    text: Mapping[str, Any] = config
    for key in stream.text_section:
        text = text[key]
    outside = {"quantization_config", "compression_config"}
    kept = {key: value for key, value in text.items() if key not in outside}
    return kept | {"model_type": stream.text_type, "tie_word_embeddings": stream.tied_embeddings}


def _tiny_config(config: Mapping[str, Any]) -> "PreTrainedConfig":
    from transformers import CONFIG_MAPPING, __version__

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers {__version__} does not know it")
    config_class = CONFIG_MAPPING[model_type]
    complete = config_class.from_dict(_architecture(config)).to_dict()
    tiny: PreTrainedConfig = config_class.from_dict(shrink_config(_architecture(complete)))
    return tiny


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in config.items() if not _NOT_ARCHITECTURE.fullmatch(str(key))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        # How transformers writes an infinity into JSON.
        return float(value["__float__"]) if value.keys() == {"__float__"} else _architecture(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _build(config: "PreTrainedConfig", dtype: torch.dtype) -> "PreTrainedModel":
    auto_class = class_of(config)
    if type(config) not in auto_class._model_mapping:
        raise ValueError("transformers has no causal language model of it")

    def build() -> "PreTrainedModel":
        settings: dict[str, Any] = {"attn_implementation": "eager", "dtype": dtype}
        model: PreTrainedModel = auto_class.from_config(config, **settings)
        return model

    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in build().parameters())
    if n_parameters > _MAX_PARAMETERS:
        raise ValueError(f"its config does not shrink: {n_parameters} parameters are left")
    return randomize(build())


def randomize(model: "PreTrainedModel") -> "PreTrainedModel":
    """Give every parameter random values: scales about 1, all else about 0. Those it is born with hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_vector = parameter.dim() <= 1
            scale = 0.3 if is_vector else parameter.shape[-1] ** -0.5
            parameter.copy_(float(is_vector and name.endswith("weight")) + scale * noise)
    model.eval()
    return model


def _check_tie(model: "PreTrainedModel", stream: StreamMap) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and cast(Any, head).weight is cast(Any, embedding).weight
    if head is not None and tied != (stream.tied_embeddings or stream.head_differs):
        does = "ties" if tied else "does not tie"
        raise ValueError(
            f"transformers {does} its embeddings, which config.json does not say; "
            f"add tie_word_embeddings: {str(tied).lower()}"
        )


def _check_same_writers(stream: StreamMap, twin: StreamMap) -> None:
    wanted, found = (_generic_writers(each) for each in (stream, twin))
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"the checkpoint has the residual writer {name}, and the tiny model has not")
        if name not in wanted:
            raise ValueError(f"the tiny model has the residual writer {name}, and the checkpoint has not")
        if wanted[name] != found[name]:
            raise ValueError(f"{name} has another axis or other norms before the residual stream in the tiny model")


def _generic_writers(stream: StreamMap) -> dict[str, set[Any]]:
    writers: dict[str, set[Any]] = {}
    for writer in stream.writers:
        norms = tuple((pattern_of(norm.weight), norm.plus_one, norm.centered) for norm in writer.norm_chain)
        writers.setdefault(pattern_of(writer.tensor_name), set()).add((writer.role, writer.residual_axis, norms))
    return writers


def _check_same_kinds(stream: StreamMap, twin: StreamMap) -> None:
    """Check that both have writers of the same roles behind the same norms; on disk they may have other names."""
    wanted, found = (
        {(w.role, tuple((norm.plus_one, norm.centered) for norm in w.norm_chain)) for w in each.writers}
        for each in (stream, twin)
    )
    if wanted != found:
        raise ValueError("its residual writers are of other kinds, or behind other norms, than this checkpoint's")


def _load(model: "PreTrainedModel", path: Path) -> "PreTrainedModel":
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = cast(Any, type(model)).from_pretrained(path, dtype=model.dtype, local_files_only=True, **eager)
    return cast("PreTrainedModel", loaded.eval())


def stream_components(model: "PreTrainedModel", directions: Tensor) -> tuple[float, float]:
    """Return the largest and the mean |r . h| / |h| over all block inputs, the last block's output, and random tokens.

    Args:
        model: The twin.
        directions: Unit vectors r, [n, d_model].

    Raises:
        ValueError: The blocks of the model are not found, or are not all run.
    """
    streams: list[Tensor] = []
    blocks = [block for stack in _stacks(model) for block in stack]
    ends = [stack[-1] for stack in _stacks(model)]
    handles = [block.register_forward_pre_hook(_input_to(streams.append), with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(_output_to(streams.append)) for block in ends]
    try:
        with torch.no_grad():
            model(input_ids=_token_ids(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not blocks or len(streams) < len(blocks) + len(ends):
        raise ValueError(f"{len(streams)} of {len(blocks) + len(ends)} places of its stream were seen")
    units = directions.double() / directions.double().norm(dim=-1, keepdim=True)
    # Some models hold several streams side by side.
    tokens = torch.cat([h.double().reshape(-1, units.shape[-1]) for h in streams])
    components = (tokens @ units.T).abs() / tokens.norm(dim=-1, keepdim=True)
    return float(components.max()), float(components.mean())


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """Return the lists of decoder blocks: outside towers for images or sound, and not within a block."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        is_list = isinstance(module, nn.ModuleList) and len(module) > 0 and parts[-1] in LAYER_LISTS
        if not is_list or any(TOWER.fullmatch(part) for part in parts):
            continue
        if not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def _input_to(receive: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        receive(args[0] if args else kwargs["hidden_states"])

    return hook


def _output_to(receive: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        receive(output[0] if isinstance(output, tuple) else output)

    return hook


def _token_ids(model: "PreTrainedModel") -> Tensor:
    # The first ids may stand for images, or for padding.
    vocabulary = min(cast(Any, model.get_input_embeddings()).weight.shape[0], 100)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(min(5, vocabulary - 1), vocabulary, (_SEQUENCES, _TOKENS), generator=generator)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers says about saving and loading the twin off the terminal."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()


@contextmanager
def _refusing(refusal: str, what: str) -> Iterator[None]:
    """Turn whatever goes wrong with a model that nobody has tried into a refusal of one line."""
    try:
        yield
    except Exception as error:
        reason = in_one_line(error) or type(error).__name__
        raise UnsupportedArchitectureError(
            f"{refusal}: {what}: {reason}; docs/architectures.md lists the types that need no such try"
        ) from error
