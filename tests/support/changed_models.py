"""Pairs of tiny real models of which it is known what was done, for `inspect`; and the table of docs/inspection.md.

Edits of others are written down here in plain formulas, apart from the code under test.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.checkpoints.model_source import ModelSource
from abliterate.directions import encode_rows, make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.strengths import read_strengths
from abliterate.inspection.reading import Inspection, inspect_model
from abliterate.inspection.report import Verdict
from tests.support.paths import DOCS
from tests.support.quantized_models import save_quantized_llama
from tests.support.tiny_models import random_direction, save_tiny_model

PAGE = DOCS / "inspection.md"
BEGIN, END = "<!-- pairs: made by `python -m scripts.inspection_table` -->", "<!-- /pairs -->"
D_MODEL, N_LAYERS = 128, 3
SIZES = {
    "hidden_size": D_MODEL, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 16, "vocab_size": 300, "num_hidden_layers": N_LAYERS,
}  # fmt: skip
_CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": SIZES,
    "gemma2": {**SIZES, "query_pre_attn_scalar": 16},
    "qwen3_moe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gpt2": {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 8, "n_positions": 64, "vocab_size": 300},
}
Weights = dict[str, Tensor]
WRITERS = re.compile(r"o_proj\.weight|down_proj\.weight")
VECTOR = random_direction(D_MODEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A pair, and what is to be said of it.

    Attributes:
        name: What was done.
        make: Writes base and model below a directory and returns both.
        verdict: What is to be found.
        exact: Whether the stream is clean.
        restored: Whether lengths were restored.
        scope: Of the directions; None where there are none.
        k: How many directions.
        strength: The least and the greatest.
        rank: Of a change of low rank.
        vectors: The directions that the recovered ones are held against; None: not recovered.
    """

    name: str
    make: Callable[[Path], tuple[Path, Path]]
    verdict: Verdict
    exact: bool = False
    restored: bool = False
    scope: str | None = None
    k: int = 0
    strength: tuple[float, float] | None = None
    rank: int | None = None
    vectors: Tensor | None = field(default=None)


def _source(path: Path) -> ModelSource:
    return ModelSource(path=path, name=path.name, revision=None)


def inspect_case(case: Case, work: Path) -> Inspection:
    """Make a pair and inspect it."""
    base, model = case.make(work)
    return inspect_model(model=_source(model), base=_source(base))


def make_base(work: Path, kind: str = "llama", *, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Path:
    """Save the base."""
    path = work / "base"
    if not path.is_dir():
        save_tiny_model(path, kind, dtype=dtype, **{**_CONFIGS[kind], **more})
    return path


def changed(base: Path, model: Path, change: Callable[[Weights], Weights], *, dtype: torch.dtype | None = None) -> Path:
    """Copy a checkpoint with other weights, which `change` is given in float64, each stored in the dtype it had."""
    shutil.copytree(base, model)
    old = load_file(base / "model.safetensors")
    new = change({name: weight.double() for name, weight in old.items()})
    stored = {name: weight.to(dtype or old.get(name, next(iter(old.values()))).dtype) for name, weight in new.items()}
    save_file({name: weight.contiguous() for name, weight in stored.items()}, model / "model.safetensors")
    return model


def ours(kind: str = "llama", *, dtype: torch.dtype = torch.bfloat16, n: int = 1, **options: Any) -> Any:
    """Return what makes a base and edits it with `orthogonalize`."""
    tied = options.pop("is_tied", False)

    def make(work: Path) -> tuple[Path, Path]:
        base = make_base(work, kind, dtype=dtype, tied=tied)
        files = []
        for index in range(n):
            files.append(work / f"r{index}.safetensors")
            vector = 3 * random_direction(D_MODEL, seed=7 + index)
            make_direction(mean_difference=vector, metadata={"layer": 2, "position": -1}).save(files[-1])
        given = {name: value(work) if callable(value) else value for name, value in options.items()}
        orthogonalize_checkpoint(source=base, direction=files, output=work / "out", options=EditOptions(**given))
        return base, work / "out"

    return make


def others(change: Callable[[Weights], Weights], *, kind: str = "llama", stored: torch.dtype | None = None) -> Any:
    """Return what makes a base in bfloat16 and changes its weights."""

    def make(work: Path) -> tuple[Path, Path]:
        base = make_base(work, kind)
        return base, changed(base, work / "out", change, dtype=stored)

    return make


def each_writer(edit: Callable[[Tensor, int], Tensor], *, which: re.Pattern[str] = WRITERS) -> Any:
    """Return a change of every out-projection, which is given its layer; with the embedding turned the same way."""

    def change(weights: Weights) -> Weights:
        made = {}
        for name, weight in weights.items():
            layer = re.search(r"\.(\d+)\.", name)
            if name.endswith("embed_tokens.weight") and which is WRITERS:
                made[name] = edit(weight.T, 0).T
            else:
                made[name] = edit(weight, int(layer[1])) if which.search(name) and layer else weight
        return made

    return change


def project(weight: Tensor, vector: Tensor = VECTOR, strength: float = 1.0) -> Tensor:
    """Return W - a u (u^T W)."""
    return weight - strength * torch.outer(vector, vector @ weight)


def with_rows_of(edited: Tensor, weight: Tensor) -> Tensor:
    """Return an edited matrix whose rows have the lengths that they had."""
    return edited * (weight.norm(dim=1) / edited.norm(dim=1))[:, None]


def row_normalised(weight: Tensor, strength: float = 1.0) -> Tensor:
    """Return N (I - a u u^T) N^-1 W."""
    lengths = weight.norm(dim=1, keepdim=True)
    return lengths * project(weight / lengths, strength=strength)


def lora(rank: int, *, targets: str = "q_proj|v_proj|o_proj|down_proj", scale: float = 0.05) -> Any:
    """Return the merge of an adapter of random factors."""

    def change(weights: Weights) -> Weights:
        generator = torch.Generator().manual_seed(rank)
        made = {}
        for name, weight in weights.items():
            if not re.search(rf"({targets})\.weight", name):
                made[name] = weight
                continue
            one = torch.randn(weight.shape[0], rank, generator=generator, dtype=torch.float64)
            other = torch.randn(rank, weight.shape[1], generator=generator, dtype=torch.float64)
            product = one @ other
            made[name] = weight + scale * product * weight.norm() / product.norm()
        return made

    return change


def noise(share: float, *, seed: int = 1) -> Any:
    """Return a full fine-tune: every number moved by noise of this share of its matrix' norm."""

    def change(weights: Weights) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, weight in weights.items():
            moved = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            made[name] = weight + share * moved * weight.norm() / moved.norm()
        return made

    return change


def rounded_to_fp8(weights: Weights) -> Weights:
    """Return the matrices as FP8 with a scale a tensor holds them."""
    made = {}
    for name, weight in weights.items():
        scale = weight.abs().max() / 448
        is_matrix = weight.dim() == 2 and "proj" in name
        made[name] = (weight / scale).float().to(torch.float8_e4m3fn).double() * scale if is_matrix else weight
    return made


def strengths_file(*, directions: bool) -> Callable[[Path], Any]:
    """Return what writes a file of strengths that rise with the layer, and reads it."""

    def make(work: Path) -> Any:
        shares = [0.25 * (layer + 1) for layer in range(N_LAYERS)]
        rows = torch.stack([random_direction(D_MODEL, seed=20 + layer) for layer in range(N_LAYERS)])
        content = {
            "strengths_version": 1,
            "direction_sha256": make_direction(mean_difference=random_direction(D_MODEL)).sha256,
            "strengths": {"embed": 0.0, "attn": shares, "mlp": shares},
            "directions": encode_rows(rows.double().numpy()) if directions else None,
            "arguments": [],
            "prompt_hashes": [],
            "frontier": [],
        }
        (work / "s.json").write_text(json.dumps(content))
        return read_strengths(work / "s.json")

    return make


def same(*, dtype: torch.dtype | None = None, rename: Callable[[str], str] = str, shards: bool = False) -> Any:
    """Return what writes the same numbers in another dtype, under other names, or in many shards."""

    def make(work: Path) -> tuple[Path, Path]:
        base = make_base(work)
        model = changed(base, work / "out", lambda w: {rename(name): weight for name, weight in w.items()}, dtype=dtype)
        if shards:
            _reshard(model)
        return base, model

    return make


def _reshard(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, weight_map = sorted(weights, reverse=True), {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        part = names[number::3]
        save_file({name: weights[name] for name in part}, model / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def padded(work: Path) -> tuple[Path, Path]:
    """Make a model whose vocabulary has more rows, of zeros."""
    base = make_base(work)

    def pad(weights: Weights) -> Weights:
        grown = {"model.embed_tokens.weight", "lm_head.weight"}
        return {n: torch.nn.functional.pad(w, (0, 0, 0, 20)) if n in grown else w for n, w in weights.items()}

    return base, changed(base, work / "out", pad)


def edited_elsewhere(*, dtype: torch.dtype | None = None, prefix: str = "", shards: bool = False) -> Any:
    """Return a projection in bfloat16, then stored in another dtype, under other names, in many shards."""

    def make(work: Path) -> tuple[Path, Path]:
        base = make_base(work)
        model = changed(base, work / "plain", each_writer(lambda weight, _: project(weight)))
        renamed = changed(model, work / "out", lambda w: {f"{prefix}{n}": each for n, each in w.items()}, dtype=dtype)
        if shards:
            _reshard(renamed)
        return base, renamed

    return make


def quantised(*, edit: bool) -> Any:
    """Return a model in FP8 and, unless it is edited there, its plain base in bfloat16."""

    def make(work: Path) -> tuple[Path, Path]:
        base = save_quantized_llama(work / "base", "block")
        if not edit:
            return base, save_quantized_llama(work / "out", "block")
        make_direction(mean_difference=random_direction(256)).save(work / "r.safetensors")
        options = EditOptions(quantized="requantize")
        orthogonalize_checkpoint(source=base, direction=work / "r.safetensors", output=work / "out", options=options)
        return base, work / "out"

    return make


def another(**config: Any) -> Any:
    """Return two models that were not made from one another."""

    def make(work: Path) -> tuple[Path, Path]:
        sizes = {**SIZES, **config}
        return make_base(work), save_tiny_model(work / "out", "llama", dtype=torch.bfloat16, seed=5, **sizes)

    return make


def _per_layer(weight: Tensor, layer: int) -> Tensor:
    return project(weight, random_direction(D_MODEL, seed=40 + layer), 0.8)


_ONE: dict[str, Any] = {"verdict": "directional", "scope": "one", "k": 1, "vectors": VECTOR[None]}
_WHOLE: dict[str, Any] = {**_ONE, "exact": True, "strength": (1.0, 1.0)}
_TWO = torch.stack([random_direction(D_MODEL, seed=seed) for seed in (7, 8)])
_OUT_ONLY = re.compile(r"o_proj\.weight")
CASES = (
    Case(name="orthogonalize", make=ours(), **_WHOLE),
    Case(name="orthogonalize, float32", make=ours(dtype=torch.float32), **_WHOLE),
    Case(name="orthogonalize, float16", make=ours(dtype=torch.float16), **_WHOLE),
    Case(name="orthogonalize --preserve-norms", make=ours(preserve_norms=True), **{**_WHOLE, "restored": True}),
    Case(name="orthogonalize --components attn", make=ours(components=("attn",)), **_ONE, strength=(1.0, 1.0)),
    Case(name="orthogonalize --layers 1:3", make=ours(layers=(1, 3)), **_ONE, strength=(1.0, 1.0)),
    Case(name="orthogonalize --strength 0.5", make=ours(strength=0.5), **_ONE, strength=(0.5, 0.5)),
    Case(name="orthogonalize --strength 2", make=ours(strength=2.0), **_ONE, strength=(2.0, 2.0)),
    Case(name="orthogonalize --strengths", make=ours(strengths=strengths_file(directions=False)), **_ONE,
         strength=(0.25, 0.75)),
    Case(name="orthogonalize --strengths, a direction a layer", verdict="directional", scope="per_layer", k=1,
         make=ours(strengths=strengths_file(directions=True)), strength=(0.25, 0.75)),
    Case(name="orthogonalize, two directions", make=ours(n=2), **{**_WHOLE, "k": 2, "vectors": _TWO}),
    Case(name="orthogonalize, tied embeddings", make=ours(is_tied=True), **_WHOLE),
    Case(name="orthogonalize --tied untie", make=ours(is_tied=True, tied="untie"), **_WHOLE),
    Case(name="orthogonalize --tied skip", make=ours(is_tied=True, tied="skip"), **_ONE, strength=(1.0, 1.0)),
    Case(name="orthogonalize --add 2", make=ours(add=2.0), **_ONE),
    Case(name="orthogonalize, Gemma 2, through norms", make=ours("gemma2"), **_WHOLE),
    Case(name="orthogonalize, GPT-2, biases", make=ours("gpt2"), **_WHOLE),
    Case(name="orthogonalize, experts", make=ours("qwen3_moe"), **_WHOLE),
    Case(name="orthogonalize --quantized requantize, FP8", make=quantised(edit=True),
         **{**_WHOLE, "vectors": random_direction(256)[None]}),
    Case(name="projected in float32, rounded once", make=others(each_writer(lambda w, _: project(w))), **_WHOLE),
    Case(name="rows restored", make=others(each_writer(lambda w, _: with_rows_of(project(w), w))),
         **{**_ONE, "restored": True}, strength=(1.0, 1.0)),
    Case(name="whole matrices restored", **{**_WHOLE, "restored": True},
         make=others(each_writer(lambda w, _: project(w) * w.norm() / project(w).norm()))),
    Case(name="rows normalised before", make=others(each_writer(lambda w, _: row_normalised(w))), **_ONE,
         strength=(1.0, 1.0)),
    Case(name="o_proj only", make=others(each_writer(lambda w, _: project(w), which=_OUT_ONLY)), **_ONE,
         strength=(1.0, 1.0)),
    Case(name="strengths that rise with the layer", **_ONE, strength=(0.3, 0.9),
         make=others(each_writer(lambda w, layer: project(w, strength=0.3 * (layer + 1))))),
    Case(name="a direction a layer", make=others(each_writer(_per_layer)), verdict="directional", scope="per_layer",
         k=1, strength=(0.8, 0.8)),
    Case(name="along the wrong axis", make=others(each_writer(lambda w, _: project(w.T).T, which=_OUT_ONLY)), **_ONE,
         strength=(1.0, 1.0)),
    Case(name="Gemma 2, norms not seen through", make=others(each_writer(lambda w, _: project(w)), kind="gemma2"),
         **_ONE, strength=(1.0, 1.0)),
    *(
        Case(name=f"LoRA merged, rank {rank}", make=others(lora(rank)), verdict="low_rank", rank=rank)
        for rank in (1, 2, 4, 8, 16, 32)
    ),
    Case(name="LoRA merged, rank 8, float32", make=others(lora(8, scale=0.002), stored=torch.float32),
         verdict="low_rank", rank=8),
    Case(name="fine-tuned, by 1 %", make=others(noise(0.01)), verdict="fine_tuned"),
    Case(name="fine-tuned, by 0.1 %", make=others(noise(0.001)), verdict="fine_tuned"),
    Case(name="fine-tuned, then projected", verdict="fine_tuned", scope="one", k=1, strength=(1.0, 1.0),
         vectors=VECTOR[None],
         make=others(lambda w: each_writer(lambda each, _: project(each))(noise(0.005)(w)))),
    Case(name="stored in float32", make=same(dtype=torch.float32), verdict="identical"),
    Case(name="stored in float16", make=same(dtype=torch.float16), verdict="requantised"),
    Case(name="rounded to FP8, stored in bfloat16", make=others(rounded_to_fp8), verdict="requantised"),
    Case(name="the same FP8", make=quantised(edit=False), verdict="identical"),
    Case(name="in other shards and order", make=same(shards=True), verdict="identical"),
    Case(name="under other prefixes", make=same(rename=lambda name: f"language_model.{name}"), verdict="identical"),
    Case(name="vocabulary padded", make=padded, verdict="identical"),
    Case(name="projected, then float32, other prefixes and shards", **_WHOLE,
         make=edited_elsewhere(dtype=torch.float32, prefix="language_model.", shards=True)),
    Case(name="projected, then float16", make=edited_elsewhere(dtype=torch.float16), **_WHOLE),
    Case(name="another model of the same shapes", make=another(), verdict="unrelated"),
    Case(name="another model of other shapes", make=another(hidden_size=96), verdict="unrelated"),
)  # fmt: skip


def cells(case: Case, found: Inspection) -> str:
    """Return the row of the page that a pair makes."""
    pair = found.report.pair
    assert pair is not None
    words = ", ".join(w for w in (pair.verdict, *_words(found)) if w)
    strengths = [tensor.strength for tensor in pair.changed if tensor.strength is not None]
    shown = f"{min(strengths):.2f} to {max(strengths):.2f}" if strengths else ""
    rank = "" if pair.low_rank is None else f"{pair.low_rank.least_rank} to {pair.low_rank.rank}"
    directions = "" if pair.directions is None else f"{pair.directions.k}, {pair.directions.scope}"
    cosine = (
        ""
        if case.vectors is None
        else f"{'>' if (c := recovered_cosine(case, found)) > 0.9999 else ''} {min(c, 0.9999):.4f}"
    )
    return f"| {case.name} | {words} | {directions} | {shown} | {rank} | {cosine.strip()} |"


def _words(found: Inspection) -> list[str]:
    pair = found.report.pair
    return [word for word in ("exact", "partial", "restored_norms") if getattr(pair, word)]


def recovered_cosine(case: Case, found: Inspection) -> float:
    """Return the cosine of the largest angle between the recovered directions and the true ones."""
    assert case.vectors is not None
    if found.vectors is None or found.vectors.shape != case.vectors.shape:
        return 0.0
    basis = torch.linalg.qr(case.vectors.double().T)[0]
    return float(torch.linalg.svdvals(torch.from_numpy(found.vectors) @ basis).min())


def table(rows: list[str]) -> str:
    """Return the table of the page."""
    head = "| what was done | verdict | directions | strength | rank | cosine |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(rows)


def written() -> str:
    """Return the table that is in the page."""
    found = re.search(f"{re.escape(BEGIN)}\n\n(.*?)\n\n{re.escape(END)}", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise LookupError(f"{PAGE} has no table of pairs")
    return found[1]
