"""`abliterate inspect` on pairs that its thresholds were not set on: other seeds, widths, architectures and strengths.

The pairs of docs/inspection.md's table were looked at while the thresholds were set. These were not: each has weights,
directions and noise of its own, from `--seed`, which also turns round which width a pair gets. Prints a table of what
was to be found and what was, and a summary line; ends with 1 if a pair is told wrong.

python -m benchmarks.inspect_heldout --seed 1
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.inspection import change as measuring
from abliterate.inspection.reading import Inspection
from tests.support.changed_models import Case, changed, inspect_case, recovered_cosine, with_rows_of
from tests.support.quantized_models import LAYOUTS
from tests.support.tiny_models import random_direction, save_tiny_model

Weights = dict[str, Tensor]
Change = Callable[[Weights], Weights]
WIDTHS = (96, 160, 256)
N_LAYERS = 3
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ATTENTION, MLP = r"o_proj\.weight", r"(down_proj|\.w2)\.weight"
LAYERS = f"{ATTENTION}|{MLP}"
_MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
}
_LEAST_COSINE, _TOLERANCE = 0.999, 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """Makes the base of one pair, and what is done to it.

    Attributes:
        seed: Of weights, directions and noise.
        width: Of the stream.
    """

    seed: int
    width: int

    def vector(self, number: int = 0) -> Tensor:
        """Return a direction."""
        return random_direction(self.width, seed=self.seed + 500 + number)

    def base(self, work: Path, kind: str = "llama", *, dtype: torch.dtype = BF16, **more: Any) -> Path:
        """Save a base and return its directory."""
        heads = self.width // 16
        sizes = {
            "hidden_size": self.width,
            "intermediate_size": self.width * 5 // 2,
            "num_attention_heads": heads,
            "vocab_size": 300,
            "num_hidden_layers": N_LAYERS,
        }
        if kind != "gpt_neox":
            sizes |= {"num_key_value_heads": heads // 2, "head_dim": 16}
        if kind == "qwen3_moe":
            sizes["moe_intermediate_size"] = self.width // 2
        path = work / "base"
        return save_tiny_model(path, kind, dtype=dtype, seed=self.seed, **{**sizes, **_MORE.get(kind, {}), **more})

    def ours(
        self,
        work: Path,
        kind: str = "llama",
        *,
        n: int = 1,
        tied: bool = False,
        dtype: torch.dtype = BF16,
        **options: Any,
    ) -> tuple[Path, Path]:
        """Edit a base with `orthogonalize`."""
        base = self.base(work, kind, tied=tied, dtype=dtype)
        return base, self.orthogonalized(base, work, n=n, **options)

    def orthogonalized(self, base: Path, work: Path, *, n: int = 1, **options: Any) -> Path:
        """Return a base edited with `orthogonalize`."""
        files = []
        for number in range(n):
            files.append(work / f"r{number}.safetensors")
            make_direction(mean_difference=2 * self.vector(number)).save(files[-1])
        orthogonalize_checkpoint(source=base, direction=files, output=work / "out", options=EditOptions(**options))
        return work / "out"

    def others(
        self, work: Path, *changes: Change, kind: str = "llama", dtype: torch.dtype = BF16, stored: Any = None
    ) -> tuple[Path, Path]:
        """Change a base in several steps, each of which is stored; the last one in a dtype of its own."""
        base = model = self.base(work, kind, dtype=dtype)
        for number, change in enumerate(changes):
            is_last = number == len(changes) - 1
            model = changed(model, work / f"step{number}", change, dtype=stored if is_last else None)
        return base, model

    def noise(self, share: float, only: str = "") -> Change:
        """Return noise on every number, of this share of its tensor's norm."""

        def change(weights: Weights) -> Weights:
            generator = torch.Generator().manual_seed(self.seed + 900)
            made = dict(weights)
            for name, weight in weights.items():
                if re.search(only, name):
                    moved = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                    made[name] = weight + share * moved * weight.norm() / moved.norm()
            return made

        return change

    def lora(
        self, rank: int, *, scale: float, targets: str = "(q|k|v|o|gate|up|down)_proj", decay: float = 1
    ) -> Change:
        """Return the merge of an adapter whose product has this share of a matrix' norm."""

        def change(weights: Weights) -> Weights:
            generator = torch.Generator().manual_seed(self.seed + 700)
            made = dict(weights)
            for name, weight in weights.items():
                if re.search(rf"{targets}\.weight", name):
                    one = torch.randn(weight.shape[0], rank, generator=generator, dtype=torch.float64)
                    other = torch.randn(rank, weight.shape[1], generator=generator, dtype=torch.float64)
                    product = one * decay ** torch.arange(rank) @ other
                    made[name] = weight + scale * product * weight.norm() / product.norm()
            return made

        return change


def projected(vector: Tensor | Callable[[int], Tensor], strength: Any = 1.0, *, where: str | None = None) -> Change:
    """Return W - a u (u^T W) of every writer, of a direction and a strength that may depend on the layer."""
    return written(lambda weight, layer: _project(weight, _of(vector, layer), _of(strength, layer)), where=where)


def written(edit: Callable[[Tensor, int], Tensor], *, where: str | None = None) -> Change:
    """Return a change of every writer with this name, without one of all and of the embedding."""
    wanted = re.compile(where or LAYERS)

    def change(weights: Weights) -> Weights:
        made = dict(weights)
        for name, weight in weights.items():
            layer = re.search(r"\.(\d+)\.", name)
            if layer and wanted.search(name):
                made[name] = edit(weight, int(layer[1]))
            elif where is None and name.endswith("embed_tokens.weight"):
                made[name] = edit(weight.T, 0).T
        return made

    return change


def _weakly(maker: Maker, strength: float) -> Change:
    return projected(maker.vector(), strength)


def _of(value: Any, layer: int) -> Any:
    return value(layer) if callable(value) else value


def _project(weight: Tensor, vector: Tensor, strength: float) -> Tensor:
    made: Tensor = weight - strength * torch.outer(vector, vector @ weight)
    return made


def _row_normalised(weight: Tensor, vector: Tensor, strength: float) -> Tensor:
    lengths = weight.norm(dim=1, keepdim=True)
    made: Tensor = lengths * _project(weight / lengths, vector, strength)
    return made


def _together(one: Tensor, other: Tensor, cosine: float) -> Tensor:
    """Return a unit vector of this cosine with another one."""
    across = other - one * (one @ other)
    made: Tensor = cosine * one + (1 - cosine**2) ** 0.5 * across / across.norm()
    return made


def requantised(model: Path, layout: str) -> Path:
    """Return a plain model with its Linear weights in another layout."""
    content, store = LAYOUTS[layout]
    made: Weights = {}
    for name, weight in load_file(model / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        made |= store(stem, weight) if stem.endswith("proj") else {name: weight}
    out = model.with_name(f"{model.name}-stored")
    shutil.copytree(model, out)
    save_file({name: weight.contiguous() for name, weight in made.items()}, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": content}))
    return out


def renamed(before: str, after: str) -> Change:
    """Return other prefixes of names."""
    return lambda weights: {re.sub(f"^{before}", after, name): weight for name, weight in weights.items()}


def padded(rows: int) -> Change:
    """Return a vocabulary with more rows, each the mean of the others."""

    def change(weights: Weights) -> Weights:
        made = dict(weights)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            made[name] = torch.cat([weights[name], weights[name].mean(dim=0, keepdim=True).expand(rows, -1)])
        return made

    return change


def fused(*groups: tuple[str, str]) -> Change:
    """Return several matrices in one, as some architectures store them."""

    def change(weights: Weights) -> Weights:
        made = dict(weights)
        for parts, whole in groups:
            first, *_ = names = parts.split()
            for name in [each for each in weights if f".{first}." in each]:
                stack = [made.pop(name.replace(f".{first}.", f".{part}.")) for part in names]
                made[name.replace(f".{first}.", f".{whole}.")] = torch.cat(stack)
        return made

    return change


QKV, GATE_UP = ("q_proj k_proj v_proj", "qkv_proj"), ("gate_proj up_proj", "gate_up_proj")
Make = Callable[[Maker, Path], tuple[Path, Path]]


def _unrelated(maker: Maker, work: Path, kind: str) -> tuple[Path, Path]:
    other = Maker(seed=maker.seed + 300, width=maker.width)
    return maker.base(work / "one", kind), other.base(work / "two", kind)


def _mixed(maker: Maker, work: Path, share: float) -> tuple[Path, Path]:
    """Merge a model with another fine-tune of the same base."""
    base, tuned = maker.others(work, maker.noise(0.03))
    return base, changed(tuned, work / "out", projected(maker.vector(), share))


def _two_dtypes(maker: Maker, work: Path, old: torch.dtype, new: torch.dtype) -> tuple[Path, Path]:
    """Store one model in float32 in two dtypes, each rounded from the first."""
    first = maker.base(work, dtype=F32)
    return tuple(changed(first, work / name, dict, dtype=dtype) for name, dtype in (("old", old), ("new", new)))  # type: ignore[return-value]


def _quantised_edit(maker: Maker, work: Path, layout: str) -> tuple[Path, Path]:
    base, model = maker.others(work, projected(maker.vector()))
    return base, requantised(model, layout)


def _edited_quantised(maker: Maker, work: Path, layout: str, **options: Any) -> tuple[Path, Path]:
    base = requantised(maker.base(work), layout)
    return base, maker.orthogonalized(base, work, **options)


def _stored(maker: Maker, work: Path, layout: str) -> tuple[Path, Path]:
    base = maker.base(work)
    return base, requantised(base, layout)


def _copied(maker: Maker, work: Path) -> tuple[Path, Path]:
    base = requantised(maker.base(work), "int4 groups")
    return base, shutil.copytree(base, work / "copy")


def _narrowed(maker: Maker, work: Path) -> tuple[Path, Path]:
    model, base = maker.others(work, dict, stored=F32)
    return base, model


def _headed(maker: Maker, work: Path) -> tuple[Path, Path]:
    """Store the head of a model with tied embeddings apart."""
    base = maker.base(work, "qwen2", tied=True)
    return base, changed(base, work / "out", lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"]})


def _case(name: str, make: Make, *, width: int | None = None, k: int = 0, **expected: Any) -> Callable[[Maker], Case]:
    """Return what makes a case of a seed; `expected` is that of `Case`."""

    def made(maker: Maker) -> Case:
        maker = Maker(seed=maker.seed, width=width or maker.width)
        more: dict[str, Any] = {"scope": "one"} if k else {}
        if k and expected.get("scope", "one") == "one":
            more["vectors"] = torch.stack([maker.vector(number) for number in range(k)])
        full = f"{name}, {maker.width}"
        return Case(name=full, make=partial(make, maker), k=k, **{"verdict": "directional", **more, **expected})

    return made


def _ours(kind: str = "llama", **options: Any) -> Make:
    return lambda maker, work: maker.ours(work, kind, **options)


def _others(*changes: Callable[[Maker], Change], **options: Any) -> Make:
    return lambda maker, work: maker.others(work, *(change(maker) for change in changes), **options)


_WHOLE: dict[str, Any] = {"k": 1, "exact": True, "strength": (1.0, 1.0)}
_PART: dict[str, Any] = {"k": 1, "strength": (1.0, 1.0)}
EDITS = (
    _case("orthogonalize, llama, float16", _ours(dtype=F16), **_WHOLE),
    _case("orthogonalize, qwen2", _ours("qwen2"), **_WHOLE),
    _case("orthogonalize, qwen2, tied, float32", _ours("qwen2", tied=True, dtype=F32), **_WHOLE),
    _case("orthogonalize, olmo2, norms behind", _ours("olmo2"), **_WHOLE),
    _case("orthogonalize, phi3", _ours("phi3"), **_WHOLE),
    _case("orthogonalize, gpt_neox, biases, float16", _ours("gpt_neox", dtype=F16), **_WHOLE),
    _case("orthogonalize, gpt_neox, biases", _ours("gpt_neox"), **_WHOLE),
    _case("orthogonalize, mixtral", _ours("mixtral"), **_WHOLE),
    _case("orthogonalize, qwen3_moe, float16", _ours("qwen3_moe", dtype=F16), **_WHOLE),
    _case("orthogonalize, cohere, tied", _ours("cohere", tied=True), **_WHOLE),
    _case("orthogonalize --strength 0.15", _ours(strength=0.15), k=1, strength=(0.15, 0.15)),
    _case("orthogonalize --strength 0.15, mixtral", _ours("mixtral", strength=0.15), k=1, strength=(0.15, 0.15)),
    _case("orthogonalize --strength 1.3", _ours(strength=1.3), k=1, strength=(1.3, 1.3)),
    _case("orthogonalize --strength 1.3, olmo2", _ours("olmo2", strength=1.3), k=1, strength=(1.3, 1.3)),
    _case("orthogonalize --preserve-norms, qwen2", _ours("qwen2", preserve_norms=True), **_WHOLE, restored=True),
    _case("orthogonalize --preserve-norms --strength 0.6", _ours(preserve_norms=True, strength=0.6), k=1,
          strength=(0.6, 0.6), restored=True),
    _case("orthogonalize, three directions, phi3", _ours("phi3", n=3), k=3, exact=True, strength=(1.0, 1.0)),
    _case("orthogonalize --components mlp, mixtral", _ours("mixtral", components=("mlp",)), **_PART),
    _case("orthogonalize --layers 0:2, cohere", _ours("cohere", layers=(0, 2)), **_PART),
    _case("projected, MLP only", _others(lambda m: projected(m.vector(), where=MLP)), **_PART),
    _case("projected, MLP only, float16, by 0.15", _others(lambda m: projected(m.vector(), 0.15, where=MLP), dtype=F16),
          k=1, strength=(0.15, 0.15)),
    _case("projected, attention only, by 1.3, qwen2", k=1, strength=(1.3, 1.3),
          make=_others(lambda m: projected(m.vector(), 1.3, where=ATTENTION), kind="qwen2")),
    _case("projected, olmo2, norms not seen through", _others(lambda m: projected(m.vector()), kind="olmo2"), **_PART),
    _case("strengths that fall with the layer", k=1, strength=(0.15, 1.3),
          make=_others(lambda m: projected(m.vector(), lambda layer: 1.3 - 0.575 * layer))),
    _case("a direction a layer, mixtral", k=1, scope="per_layer", strength=(0.7, 0.7),
          make=_others(lambda m: projected(m.vector, 0.7, where=LAYERS), kind="mixtral")),
    _case("rows restored, qwen2", **_PART, restored=True,
          make=_others(lambda m: written(lambda w, _: with_rows_of(_project(w, m.vector(), 1), w)), kind="qwen2")),
    _case("rows restored, by 0.6, float16", k=1, strength=(0.6, 0.6), restored=True,
          make=_others(lambda m: written(lambda w, _: with_rows_of(_project(w, m.vector(), 0.6), w)), dtype=F16)),
    _case("rows normalised before, by 1.2, writers of layers", k=1, strength=(1.2, 1.2),
          make=_others(lambda m: written(lambda w, _: _row_normalised(w, m.vector(), 1.2), where=LAYERS))),
    _case("two edits, the second across the first", _others(
        lambda m: projected(m.vector()), lambda m: projected(_together(m.vector(), m.vector(1), 0.0))),
        k=2, exact=True, strength=(1.0, 1.0)),
    _case("two edits, cosine of the directions 0.3", _others(
        lambda m: projected(m.vector()), lambda m: projected(_together(m.vector(), m.vector(1), 0.3))), k=2),
    _case("two edits along one direction, 0.5 and 0.4", k=1, strength=(0.7, 0.7),
          make=_others(lambda m: projected(m.vector(), 0.5), lambda m: projected(m.vector(), 0.4))),
    _case("two edits along one direction, MLP, then attention", **_PART, make=_others(
        lambda m: projected(m.vector(), where=MLP), lambda m: projected(m.vector(), where=ATTENTION))),
    _case("projected, then float16", _others(lambda m: projected(m.vector()), stored=F16), **_WHOLE),
    _case("projected in float16, then bfloat16", _others(lambda m: projected(m.vector()), dtype=F16, stored=BF16),
          **_WHOLE),
    _case("projected, then FP8 in blocks", partial(_quantised_edit, layout="block"), **_WHOLE, width=256),
    _case("projected, then FP8, a scale a row", partial(_quantised_edit, layout="compressed"), **_WHOLE, width=256),
    _case("projected, then int8, rows", partial(_quantised_edit, layout="int8 rows"), **_WHOLE, width=256),
    _case("projected, then int4, groups of 32", partial(_quantised_edit, layout="int4 groups"), **_PART, width=256),
    _case("projected, then AWQ", partial(_quantised_edit, layout="awq"), **_PART, width=256),
    _case("FP8 in blocks, requantised after the edit", **_WHOLE, width=256,
          make=partial(_edited_quantised, layout="block", quantized="requantize")),
    _case("FP8, a scale a row, requantised after the edit", **_WHOLE, width=256,
          make=partial(_edited_quantised, layout="compressed", quantized="requantize")),
    _case("FP8 in blocks, stored plain after the edit", **_WHOLE, width=256,
          make=partial(_edited_quantised, layout="block", quantized="dequantize")),
)  # fmt: skip
LORAS = tuple(
    _case(f"LoRA merged, rank {rank}, scale {scale}", _others(partial(Maker.lora, rank=rank, scale=scale), kind=kind),
          verdict="low_rank", rank=rank)
    for rank, kind in ((3, "qwen2"), (6, "llama"), (24, "olmo2"))
    for scale in (0.01, 0.5)
)  # fmt: skip
CHANGES = (
    *LORAS,
    _case("LoRA merged, rank 6 that decays, q and v, float16", verdict="low_rank", rank=6,
          make=_others(lambda m: m.lora(6, scale=0.1, decay=0.6, targets="(q|v)_proj"), dtype=F16)),
    _case("LoRA merged in experts, rank 3", verdict="low_rank", rank=3,
          make=_others(lambda m: m.lora(3, scale=0.1, targets=r"\.w[123]"), kind="mixtral")),
    _case("LoRA merged, rank 6, in qkv of phi3", verdict="low_rank", rank=6,
          make=_others(lambda m: m.lora(6, scale=0.1, targets="(qkv|gate_up)_proj"), kind="phi3")),
    _case("LoRA merged in q and v, then projected", verdict="low_rank", k=1, make=_others(
        lambda m: m.lora(6, scale=0.1, targets="(q|v)_proj"), lambda m: projected(m.vector()))),
    _case("fine-tuned, by 0.1 %", _others(lambda m: m.noise(0.001)), verdict="fine_tuned"),
    _case("fine-tuned, by 0.1 %, float16", _others(lambda m: m.noise(0.001), dtype=F16), verdict="fine_tuned"),
    _case("fine-tuned, by 0.1 %, stored in float32", _others(lambda m: m.noise(0.001), stored=F32),
          verdict="fine_tuned"),
    _case("fine-tuned, by 5 %", _others(lambda m: m.noise(0.05)), verdict="fine_tuned"),
    _case("fine-tuned, by 5 %, mixtral", _others(lambda m: m.noise(0.05), kind="mixtral"), verdict="fine_tuned"),
    _case("fine-tuned, by 5 %, then float16", _others(lambda m: m.noise(0.05), stored=F16), verdict="fine_tuned"),
    _case("fine-tuned, one matrix, by 1 %", _others(lambda m: m.noise(0.01, r"1\.self_attn\.k_proj")),
          verdict="fine_tuned"),
    _case("fine-tuned, norms only", _others(lambda m: m.noise(0.02, "norm")), verdict="fine_tuned"),
    _case("fine-tuned, head only, qwen2", _others(lambda m: m.noise(0.02, "lm_head"), kind="qwen2"),
          verdict="fine_tuned"),
    _case("projected, then fine-tuned by 0.5 %", verdict="fine_tuned", k=1, strength=(1.0, 1.0),
          make=_others(lambda m: projected(m.vector()), lambda m: m.noise(0.005))),
    _case("projected by 0.6, then fine-tuned by 1 %", verdict="fine_tuned", k=1, strength=(0.6, 0.6),
          make=_others(lambda m: projected(m.vector(), 0.6), lambda m: m.noise(0.01))),
    _case("fine-tuned by 3 %, then projected by 0.8", partial(_mixed, share=0.8), verdict="fine_tuned", k=1,
          strength=(0.8, 0.8)),
    _case("stored in float32, names without model.", verdict="identical",
          make=_others(lambda _: renamed("model[.]", ""), stored=F32)),
    _case("stored under other prefixes, float16 to float32", verdict="identical",
          make=_others(lambda _: renamed("model[.]", "model.language_model."), dtype=F16, stored=F32)),
    _case("float32 that holds bfloat16, stored in bfloat16", _narrowed, verdict="identical"),
    _case("tied head stored apart, qwen2", _headed, verdict="identical"),
    _case("vocabulary padded with means", _others(lambda _: padded(64)), verdict="identical"),
    _case("the same int4 groups", _copied, verdict="identical", width=256),
    _case("q, k, v fused, and gate, up", _others(lambda _: fused(QKV, GATE_UP)), verdict="identical"),
    _case("q, k, v fused", _others(lambda _: fused(QKV)), verdict="identical"),
    _case("gate and up fused, then projected", _others(lambda _: fused(GATE_UP), lambda m: projected(m.vector())),
          **_WHOLE),
    _case("float16 to bfloat16", _others(lambda _: dict, dtype=F16, stored=BF16), verdict="requantised"),
    _case("float32 to bfloat16, mixtral", _others(lambda _: dict, kind="mixtral", dtype=F32, stored=BF16),
          verdict="requantised"),
    _case("a float32 model in bfloat16 beside it in float16", partial(_two_dtypes, old=F16, new=BF16),
          verdict="requantised"),
    _case("a float32 model in float16 beside it in bfloat16", partial(_two_dtypes, old=BF16, new=F16),
          verdict="requantised"),
    *(_case(f"stored as {layout}", partial(_stored, layout=layout), verdict="requantised", width=256)
      for layout in ("compressed", "int8 groups", "gptq", "nvfp4")),
    *(_case(f"another {kind} of the same shapes", partial(_unrelated, kind=kind), verdict="unrelated")
      for kind in ("qwen2", "mixtral", "gpt_neox")),
)  # fmt: skip
CASES = (*EDITS, *CHANGES)
# Where changes come near to what rounding does; not all of them can be told.
LIMITS = (
    *(_case(f"projected, by {strength}, {name}", _others(partial(_weakly, strength=strength), dtype=dtype), k=1,
            strength=(strength, strength))
      for strength in (0.02, 0.05, 0.1) for name, dtype in (("bfloat16", BF16), ("float16", F16))),
    *(_case(f"LoRA merged, rank {rank}, scale {scale}", _others(partial(Maker.lora, rank=rank, scale=scale)),
            verdict="low_rank", rank=rank, width=width)
      for rank, scale, width in ((6, 0.001, 160), (6, 0.003, 160), (24, 0.01, 96), (24, 0.01, 160))),
    *(_case(f"fine-tuned, by {share}", _others(partial(Maker.noise, share=share)), verdict="fine_tuned")
      for share in (0.0001, 0.0003)),
    _case("fine-tuned, by 0.0003, float16, stored in bfloat16", verdict="fine_tuned",
          make=_others(lambda m: m.noise(0.0003), dtype=F16, stored=BF16)),
)  # fmt: skip


def expected_words(case: Case) -> str:
    """Return what is to be found, in words."""
    partly = case.verdict == "directional" and not case.exact
    return _words(case.verdict, case.exact, partly, case.restored, case.k, case.scope, case.strength, case.rank)


def found_words(found: Inspection) -> str:
    """Return what was found, in the same words."""
    pair = found.report.pair
    assert pair is not None
    strengths = [each.strength for each in pair.changed if each.strength is not None]
    between = (min(strengths), max(strengths)) if strengths else None
    k, scope = (0, None) if pair.directions is None else (pair.directions.k, pair.directions.scope)
    rank: Any = None
    if pair.low_rank is not None:
        least, rank = pair.low_rank.least_rank, pair.low_rank.rank
        rank = rank if least == rank else f"{least} to {rank}"
    return _words(pair.verdict, pair.exact, pair.partial, pair.restored_norms, k, scope, between, rank)


def _words(
    verdict: str,
    exact: bool,
    partly: bool,
    restored: bool,
    k: int,
    scope: str | None,
    strength: tuple[float, float] | None,
    rank: Any,
) -> str:
    said = [verdict]
    said += [word for word, holds in (("exact", exact), ("partial", partly), ("restored_norms", restored)) if holds]
    said += [f"{k} {scope}"] if k else []
    said += [f"strength {strength[0]:.2f} to {strength[1]:.2f}"] if strength else []
    said += [f"rank {rank}"] if rank is not None else []
    return ", ".join(said)


def problems(case: Case, found: Inspection) -> list[str]:
    """Return what was told wrong; nothing is asked that a case does not say."""
    pair = found.report.pair
    assert pair is not None
    wrong = []
    if (pair.verdict, pair.exact, pair.restored_norms) != (case.verdict, case.exact, case.restored):
        wrong.append(f"verdict ({pair.reason})")
    k, scope = (0, None) if pair.directions is None else (pair.directions.k, pair.directions.scope)
    if (k, scope) != (case.k, case.scope):
        wrong.append("directions")
    strengths = [each.strength for each in pair.changed if each.strength is not None]
    if case.strength is not None:
        both = zip((min(strengths, default=0.0), max(strengths, default=0.0)), case.strength, strict=True)
        wrong += ["strength"] if any(abs(one - other) > _TOLERANCE for one, other in both) else []
    if case.rank is not None:
        low = pair.low_rank
        wrong += ["rank"] if low is None or (low.least_rank, low.rank) != (case.rank, case.rank) else []
    if case.vectors is not None and (cosine := recovered_cosine(case, found)) <= _LEAST_COSINE:
        wrong.append(f"cosine {cosine:.4f}")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Inspect all pairs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--limits", action="store_true", help="changes that come near to rounding, instead")
    parser.add_argument("--only", default="", help="pairs whose name has this")
    parser.add_argument(
        "--sample-from", type=int, metavar="N", help="look at some rows first in matrices of N numbers or more"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.sample_from is not None:
        # These pairs are far smaller than what that is for.
        measuring._WORTH_SAMPLING = given.sample_from
    chosen = LIMITS if given.limits else CASES
    makers = (Maker(seed=1000 * given.seed + i, width=WIDTHS[(i + given.seed) % 3]) for i in range(len(chosen)))
    cases = [make(maker) for make, maker in zip(chosen, makers, strict=True)]
    cases = [case for case in cases if given.only in case.name]
    if not cases:
        parser.error(f"no pair has {given.only!r} in its name")
    print("| pair | expected | found | |\n|---|---|---|---|", flush=True)
    right = 0
    for case in cases:
        with tempfile.TemporaryDirectory() as work:
            found = inspect_case(case, Path(work))
        wrong = problems(case, found)
        right += not wrong
        told = f"wrong: {'; '.join(wrong)}" if wrong else "right"
        print(f"| {case.name} | {expected_words(case)} | {found_words(found)} | {told} |", flush=True)
    print(f"\n{right} right of {len(cases)}, seed {given.seed}")
    return int(right < len(cases))


if __name__ == "__main__":
    sys.exit(main())
