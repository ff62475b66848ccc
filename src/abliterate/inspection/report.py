"""What an inspection found, as plain values."""

from dataclasses import dataclass
from typing import Any, Literal

from abliterate.architectures.names import Role
from abliterate.inspection.consensus import Scope
from abliterate.inspection.directional import Kept

Verdict = Literal["identical", "requantised", "directional", "low_rank", "fine_tuned", "unrelated"]
Kind = Literal["rounded", "directional", "low_rank", "dense"]
PartName = Literal["embed", "attn", "mlp", "head", "reader", "norm", "tower", "prediction", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReading:
    """What one writer has of the directions.

    Attributes:
        name: The tensor, as transformers calls it.
        role: embed, attn or mlp.
        layer: Its block; None for embeddings.
        dtype: What it is stored in.
        component: |U W|/|W|.
        base_component: The same of the base; None without one.
        left: |U W| as a share of the base's; None without one.
    """

    name: str
    role: Role
    layer: int | None
    dtype: str
    component: float
    base_component: float | None
    left: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleReading:
    """What all writers of a role have of the directions, taken together.

    Attributes:
        role: embed, attn or mlp.
        tensors: How many there are.
        dtypes: What they are stored in.
        component: |U W|/|W|, each norm over all of them.
        largest: The largest of one of them.
        left: |U W| over all of them as a share of the base's; None without one.
        most_left: The largest share of one of them.
    """

    role: Role
    tensors: int
    dtypes: tuple[str, ...]
    component: float
    largest: float
    left: float | None
    most_left: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedTensor:
    """One tensor whose numbers are not those of the base; norms are Frobenius norms, D = W' - W.

    Attributes:
        name: In the model.
        base_name: In the base.
        part: What it is: a writer (embed, attn, mlp), head, reader, norm, tower, prediction (of tokens further ahead),
            other.
        layer: Its block; None outside.
        dtype: What it is stored in.
        base_dtype: What the base stores it in.
        kind: rounded: to the grid it is stored on, and nothing else; directional: directions projected out; low_rank;
            dense: neither.
        change: |D|/|W|.
        rounding: What rounding to its grid makes of that.
        rank: Singular values of D that stand out of noise; of a stack the largest number; None where more than 72 do.
        rest: Share of |D| that is not in those.
        strength: Share of the component that was projected out; None where nothing was.
        left: |U W'|/|U W|, along the tensor's own directions.
        cosine: Of the largest angle between its directions and the recovered ones, or those of its layer.
        other_axis: Whether it was projected along the axis that is not the stream's.
        row_normalised: Whether its rows were divided by their lengths before.
        kept: Lengths that were restored: columns (what one input writes), rows (what one output reads), whole (of the
            matrix).
    """

    name: str
    base_name: str
    part: PartName
    layer: int | None
    dtype: str
    base_dtype: str
    kind: Kind
    change: float
    rounding: float
    rank: int | None
    rest: float
    strength: float | None
    left: float | None
    cosine: float | None
    other_axis: bool
    row_normalised: bool
    kept: Kept | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReading:
    """All tensors of one part of the model.

    Attributes:
        part: See `ChangedTensor.part`.
        tensors: How many were paired with one of the base.
        changed: How many of them are changed by more than rounding.
        change: |D|/|W| of the changed ones together; None where there are none.
        strengths: The least and the greatest strength; None where none is directional.
    """

    part: PartName
    tensors: int
    changed: int
    change: float | None
    strengths: tuple[float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredDirections:
    """The directions that were projected out, as far as the change tells.

    Attributes:
        k: How many.
        scope: one: the same in all tensors; per_layer: each layer has its own; several: neither.
        through_norms: Whether tensors behind norms were edited through them; None where there are no such norms.
        tensors: How many have them.
        least_cosine: Of those that agree the least cosine with them, or with those of their layer.
        disagreeing: Tensors with other directions.
        cosines: With each of the given directions: of the angle between it and what the recovered ones span; where each
            layer has its own, of the layer that is nearest.
        files: Where they were written; empty: nowhere.
    """

    k: int
    scope: Scope
    through_norms: bool | None
    tensors: int
    least_cosine: float
    disagreeing: tuple[str, ...]
    cosines: tuple[float, ...]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankChange:
    """A change of low rank that projects nothing, as a merged LoRA adapter is.

    Attributes:
        rank: The largest.
        least_rank: The least.
        targets: What was changed: ends of the tensors' names, without layers.
        tensors: How many.
    """

    rank: int
    least_rank: int
    targets: tuple[str, ...]
    tensors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordReading:
    """What comes along with the model and says what was done to it.

    Attributes:
        record: The record that was read; None: there is none.
        problems: Where it does not describe the bytes, a line each.
        claims: What it says: base, strength, number of edited tensors.
        base_model: What the card names as its base; None where it does not.
        tags: Words of the card's tags that speak of an edit.
    """

    record: str | None
    problems: tuple[str, ...]
    claims: dict[str, Any]
    base_model: str | None
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReading:
    """A model held against its base.

    Attributes:
        verdict: What was done, in one word.
        reason: Why, in words.
        exact: Of a directional change whether every writer was edited whole, so that the stream is clean.
        partial: Of a directional change whether it is not exact.
        restored_norms: Whether lengths were restored after a projection.
        tensors: How many of the model have one of the base beside them.
        equal_bytes: How many of them have the same bytes.
        equal_numbers: How many have the same numbers in other bytes.
        rounded: How many were rounded to another grid, and nothing else.
        edited: How many are changed by more than that.
        shards: Files of weights of the model.
        shards_changed: How many of those hold a tensor that is edited or rounded.
        renamed: Prefixes of names that differ, the base's and the model's.
        fused: Tensors of one side that hold several of the other's, and were compared part by part.
        added: Tensors of the model alone.
        missing: Of the base alone.
        reshaped: Of both, in shapes that do not go together.
        padded: Tensor -> rows that it has more than the base's.
        copies: Heads that are stored apart, where the base ties them.
        added_vectors: Bias -> length of what was added to the stream by it.
        parts: By part of the model.
        changed: Each tensor whose numbers differ, in the model's order.
        directions: What was projected out; None where nothing was.
        low_rank: The change of low rank; None where there is none.
        config_changes: Keys of config.json that differ.
        files_changed: Other files that both have and that differ.
        thresholds: What the verdict is made by.
        notes: What the user should know besides.
    """

    verdict: Verdict
    reason: str
    exact: bool
    partial: bool
    restored_norms: bool
    tensors: int
    equal_bytes: int
    equal_numbers: int
    rounded: int
    edited: int
    shards: int
    shards_changed: int
    renamed: tuple[tuple[str, str], ...]
    fused: tuple[str, ...]
    added: tuple[str, ...]
    missing: tuple[str, ...]
    reshaped: tuple[str, ...]
    padded: dict[str, int]
    copies: tuple[str, ...]
    added_vectors: dict[str, float]
    parts: tuple[PartReading, ...]
    changed: tuple[ChangedTensor, ...]
    directions: RecoveredDirections | None
    low_rank: LowRankChange | None
    config_changes: tuple[str, ...]
    files_changed: tuple[str, ...]
    thresholds: dict[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectionReport:
    """What was done to a model, and what is left of directions in it.

    Attributes:
        model: The model, as it was named.
        base: What it is held against; None: nothing.
        model_type: As in config.json.
        verdict: What was done to it, in one word; None without a base.
        exact: Whether every writer was edited whole; None without a base.
        partial: Whether only some were, or not whole.
        restored_norms: Whether lengths were restored after it.
        pair: All that was found beside the base; None without one.
        record: What comes along and says what was done.
        k: How many directions were given, or taken from the record.
        random: |U W|/|W| of a matrix of random numbers, for comparison; None without directions.
        left: |U W| over all writers as a share of the base's; None without one.
        roles: By role.
        tensors: Each writer, in file order.
    """

    model: str
    base: str | None
    model_type: str
    verdict: Verdict | None
    exact: bool | None
    partial: bool | None
    restored_norms: bool | None
    pair: PairReading | None
    record: RecordReading
    k: int
    random: float | None
    left: float | None
    roles: tuple[RoleReading, ...]
    tensors: tuple[TensorReading, ...]
