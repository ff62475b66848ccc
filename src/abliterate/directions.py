"""The direction file: a unit vector in the residual stream, with everything it was chosen from.

One safetensors file holds

    direction        [d_model] float32, unit norm: what is ablated and projected out of weights
    mean_difference  [d_model] float32, un-normalised: harmful - harmless mean, the activation-addition dose
    candidates       [n_pos, n_layers, d_model] float32, un-normalised: every difference in means
    scores.bypass, scores.induce, scores.kl   [n_pos, n_layers] float64; NaN where a candidate was not scored

and, under the metadata key `abliterate`, a JSON object with the provenance. Only `direction` is required, so
a file that another tool wrote is a direction file as soon as it has that one 1-D tensor.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.errors import DirectionError
from abliterate.files import in_one_line, parse_json, write_file

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Float32, Float64
    from numpy.typing import NDArray
    from torch import Tensor

    Vectors = NDArray[np.float64]

METADATA_KEY = "abliterate"
SCORE_NAMES = ("bypass", "induce", "kl")
_SCORES = {name: f"scores.{name}" for name in SCORE_NAMES}

# A float32 vector normalised once has a norm within a few ulps of 1. Normalising it again could move its last
# bits, and with them the hash by which records name it.
_UNIT_NORM_TOLERANCE = 1e-6
# Those that numpy has, as safetensors names them.
_NUMPY_DTYPES = {"F16", "F32", "F64", "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Direction:
    """A direction in the residual stream, and where it comes from.

    Attributes:
        numbers: What the file holds, by the names above: `direction`, a unit vector, and what else is known.
        metadata: Provenance as plain JSON values; {} for a bare file.
        sha256: Of the vector's bytes, float32 little-endian.
    """

    numbers: Mapping[str, NDArray[Any]]
    metadata: dict[str, Any] = field(default_factory=dict)
    sha256: str

    @cached_property
    def vector(self) -> Float32[Tensor, " d_model"]:
        """The unit vector."""
        return self._tensor("direction")

    @cached_property
    def mean_difference(self) -> Float32[Tensor, " d_model"] | None:
        """Harmful mean - harmless mean, un-normalised; None for a bare file."""
        return self._tensor("mean_difference") if "mean_difference" in self.numbers else None

    @cached_property
    def candidates(self) -> Float32[Tensor, "n_pos n_layers d_model"] | None:
        """Differences in means it was chosen from, or None."""
        return self._tensor("candidates") if "candidates" in self.numbers else None

    @cached_property
    def scores(self) -> dict[str, Float64[Tensor, "n_pos n_layers"]]:
        """Scores by name: "bypass", "induce" and "kl", NaN = not scored; {} if unknown."""
        return {name: self._tensor(key) for name, key in _SCORES.items() if key in self.numbers}

    def _tensor(self, name: str) -> Tensor:
        # Imported here alone: an edit of files does without it.
        import torch

        return torch.from_numpy(self.numbers[name])

    @property
    def d_model(self) -> int:
        """Width of the residual stream this direction lives in."""
        return len(self.numbers["direction"])

    def save(self, path: Path) -> None:
        """Write the direction file, whole or not at all; equal content gives equal bytes.

        Raises:
            DirectionError: The file cannot be written.
        """
        import numpy as np
        from safetensors.numpy import save

        metadata = {METADATA_KEY: json.dumps(self.metadata, sort_keys=True, ensure_ascii=False)}
        content = save({name: np.ascontiguousarray(each) for name, each in self.numbers.items()}, metadata=metadata)
        try:
            write_file(Path(path), content)
        except OSError as error:
            raise DirectionError(
                f"{path}: cannot be written: {error.strerror or error}; choose another path with -o"
            ) from error


def make_direction(
    *,
    mean_difference: Float[Tensor, " d_model"] | Float[np.ndarray, " d_model"],
    candidates: Float[Tensor, "n_pos n_layers d_model"] | None = None,
    scores: Mapping[str, Float[Tensor, "n_pos n_layers"]] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Direction:
    """Make a direction from a difference in means.

    Args:
        mean_difference: Un-normalised difference in means, of any float dtype; a tensor or numpy's array.
        candidates: All differences in means.
        scores: "bypass", "induce", "kl".
        metadata: Provenance; values JSON can hold. Non-finite numbers become null.

    Raises:
        DirectionError: The difference is not 1-D, not finite or zero, or the shapes do not agree.
    """
    tensors = {"direction": mean_difference, "mean_difference": mean_difference, "candidates": candidates}
    tensors |= {_SCORES[name]: score for name, score in (scores or {}).items()}
    return _checked_direction(
        {name: _as_numpy(tensor) for name, tensor in tensors.items() if tensor is not None},
        metadata=_plain(dict(metadata or {})),
        where="the difference in means",
    )


def load_direction(path: Path, *, d_model: int | None = None) -> Direction:
    """Read a direction file; a file with nothing but a 1-D `direction` tensor will do.

    Args:
        path: A safetensors file. Its `direction` may have any float dtype and any non-zero norm.
        d_model: Width of the model it is meant for; None skips that check.

    Raises:
        DirectionError: The file is missing or malformed, or does not fit `d_model`.
    """
    path = Path(path)
    if not path.is_file():
        hint = "it is a directory" if path.is_dir() else "there is no such file"
        raise DirectionError(f"{path}: {hint}; make a direction file with `abliterate extract MODEL -o FILE`")
    tensors, raw_metadata = _read_tensors(path)
    if "direction" not in tensors:
        found = ", ".join(" ".join(name.split())[:60] for name in sorted(tensors)[:5])
        raise DirectionError(
            f"{path}: no tensor named `direction` (found: {found or 'none'}); "
            "is it a model's weights? A direction file comes from `abliterate extract`"
        )
    direction = _checked_direction(tensors, metadata=_parse_metadata(raw_metadata, path), where=str(path))
    if d_model is not None and direction.d_model != d_model:
        made_for = direction.metadata.get("model")
        origin = f" (extracted from {made_for})" if made_for else ""
        raise DirectionError(
            f"{path}: `direction` has {direction.d_model} entries{origin}, but the model's residual stream "
            f"has {d_model}; extract a direction from this model with `abliterate extract`"
        )
    return direction


def is_direction_file(path: Path) -> bool:
    """Return whether a file has a tensor named `direction`; no tensor is read."""
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="np") as file:
            return "direction" in file.keys()  # noqa: SIM118 - it is no dictionary
    except (OSError, safetensors.SafetensorError):
        return False


def _read_tensors(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    import numpy as np
    import safetensors

    wanted = {"direction", "mean_difference", "candidates", *_SCORES.values()}
    try:
        with safetensors.safe_open(str(path), framework="np") as file:
            names = list(file.keys())
            if "direction" not in names:
                # Names alone are enough for the message: a model's shard is not read.
                return {name: np.empty(0) for name in names}, {}
            found = {name: _read_numbers(file, path, name) for name in names if name in wanted}
            return found, dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DirectionError(
            f"{path}: not a readable safetensors file ({in_one_line(error)}); make a direction file with "
            "`abliterate extract MODEL -o FILE`"
        ) from error


def _read_numbers(file: Any, path: Path, name: str) -> NDArray[Any]:
    if file.get_slice(name).get_dtype() in _NUMPY_DTYPES:
        numbers: NDArray[Any] = file.get_tensor(name)
        return numbers
    import safetensors

    with safetensors.safe_open(str(path), framework="pt") as other:
        return _as_numpy(other.get_tensor(name))


def _as_numpy(tensor: Tensor | NDArray[Any]) -> NDArray[Any]:
    """Return a tensor as numpy has it: in float64 what has a floating-point dtype that numpy has not."""
    import numpy as np

    if isinstance(tensor, np.ndarray):
        return tensor
    import torch

    has_it = not tensor.is_floating_point() or tensor.dtype in (torch.float16, torch.float32, torch.float64)
    numbers: NDArray[Any] = (tensor if has_it else tensor.double()).detach().cpu().numpy()
    return numbers


def _parse_metadata(raw: Mapping[str, str], path: Path) -> dict[str, Any]:
    text = raw.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        metadata = parse_json(text.encode())
    except ValueError as error:
        raise DirectionError(
            f"{path}: its metadata key `{METADATA_KEY}` is not JSON ({error}); extract the direction again"
        ) from error
    if not isinstance(metadata, dict):
        raise DirectionError(
            f"{path}: its metadata key `{METADATA_KEY}` holds a {type(metadata).__name__}, no JSON object; "
            "extract the direction again"
        )
    return dict(_plain(metadata))


def _checked_direction(numbers: Mapping[str, NDArray[Any]], *, metadata: dict[str, Any], where: str) -> Direction:
    import numpy as np

    unit = _unit_vector(numbers["direction"], where)
    d_model = len(unit)
    mean_difference, candidates = numbers.get("mean_difference"), numbers.get("candidates")
    scores = {name: numbers[name] for name in _SCORES.values() if name in numbers}
    if mean_difference is not None and mean_difference.shape != (d_model,):
        raise DirectionError(_shape_message(where, "mean_difference", mean_difference, f"[{d_model}]"))
    if candidates is not None and (candidates.ndim != 3 or candidates.shape[-1] != d_model):
        raise DirectionError(_shape_message(where, "candidates", candidates, f"[positions, layers, {d_model}]"))
    grids = {score.shape for score in scores.values()}
    if candidates is not None and scores:
        grids.add(candidates.shape[:2])
    if len(grids) > 1 or any(len(grid) != 2 for grid in grids):
        raise DirectionError(
            f"{where}: scores and candidates do not share one [positions, layers] grid "
            f"(found {sorted(grids)}); extract the direction again"
        )
    others = {"mean_difference": mean_difference, "candidates": candidates}
    kept = {"direction": unit} | {name: each.astype(np.float32) for name, each in others.items() if each is not None}
    kept |= {name: score.astype(np.float64) for name, score in scores.items()}
    return Direction(numbers=kept, metadata=metadata, sha256=_sha256(unit))


def _unit_vector(vector: NDArray[Any], where: str) -> NDArray[np.float32]:
    import numpy as np

    if vector.ndim != 1 or not vector.size:
        raise DirectionError(_shape_message(where, "direction", vector, "one non-empty axis, [d_model]"))
    if vector.dtype.kind != "f":
        raise DirectionError(f"{where}: `direction` has dtype {vector.dtype}; a floating-point dtype is needed")
    wide = vector.astype(np.float64)
    if not bool(np.isfinite(wide).all()):
        raise DirectionError(
            f"{where}: `direction` holds NaN or infinite values; extract it again, in float32 or bfloat16"
        )
    # Scaling first keeps the squares of very small and very large entries in range.
    largest = float(np.abs(wide).max())
    if largest == 0.0:
        raise DirectionError(
            f"{where}: `direction` is zero and points nowhere (candidates of layer 0 often are); use another"
        )
    norm = largest * float(np.linalg.norm(wide / largest))
    if vector.dtype == np.float32 and abs(norm - 1.0) < _UNIT_NORM_TOLERANCE:
        return vector.astype(np.float32)
    return (wide / norm).astype(np.float32)


def vector_sha256(vector: Float[Tensor, " d_model"]) -> str:
    """Return the hex SHA-256 of a vector's float32 little-endian bytes: the name records give a direction."""
    return _sha256(vector.detach().cpu().float().numpy())


def _sha256(vector: NDArray[np.float32]) -> str:
    return hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()


def orthonormal_basis(
    vectors: Vectors, *, tolerance: float = 1e-12, at_most: int | None = None
) -> tuple[Vectors, tuple[int, ...]]:
    """Return an orthonormal basis of what some vectors span, and which of the vectors it leaves out.

    Args:
        vectors: [n, d_model], one a row; their lengths do not matter.
        tolerance: A vector is left out if the sine of its angle to the span of those before is less.
        at_most: Leave out all that come after this many rows; None: there is no limit.

    Returns:
        The basis, [k, d_model], k <= n, each row turned like its vector, and the indices left out.

    Raises:
        ValueError: The vectors are not finite or not [n, d_model].
    """
    import numpy as np

    if vectors.ndim != 2 or not bool(np.isfinite(vectors).all()):
        raise ValueError(f"directions must be finite and [n, d_model]; found {list(vectors.shape)}")
    basis: Vectors = np.empty((0, vectors.shape[1]))
    left_out: list[int] = []
    for index, vector in enumerate(vectors):
        if at_most is not None and len(basis) == at_most:
            return basis, (*left_out, *range(index, len(vectors)))
        length = np.linalg.norm(vector)
        unit = vector / length if length > 0 else vector
        # Twice, because one pass leaves rounding of the size of the part that it takes away.
        rest = unit - basis.T @ (basis @ unit)
        rest = rest - basis.T @ (basis @ rest)
        if float(np.linalg.norm(rest)) >= tolerance:
            basis = np.concatenate([basis, (rest / np.linalg.norm(rest))[None]])
        else:
            left_out.append(index)
    return basis, tuple(left_out)


def orthonormalize(
    vectors: Float[Tensor, "n d_model"], *, tolerance: float = 1e-12, at_most: int | None = None
) -> tuple[Float64[Tensor, "k d_model"], tuple[int, ...]]:
    """Return an orthonormal basis of what some vectors span, and which of the vectors it leaves out.

    Args:
        vectors: One a row; their lengths do not matter.
        tolerance: A vector is left out if the sine of its angle to the span of those before is less.
        at_most: Leave out all that come after this many rows; None: there is no limit.

    Returns:
        The basis, k <= n rows, each turned like its vector, and the indices left out.

    Raises:
        ValueError: The vectors are not finite or not [n, d_model].
    """
    import torch

    wide = vectors.detach().double().cpu().numpy()
    basis, left_out = orthonormal_basis(wide, tolerance=tolerance, at_most=at_most)
    return torch.from_numpy(basis).to(vectors.device), left_out


def orthogonal_to(
    vectors: Float64[Tensor, "*shape d_model"], others: Float64[Tensor, "*shape d_model"], *, share: float = 1.0
) -> Float64[Tensor, "*shape d_model"]:
    """Return vectors without their component along others, each without that along its own.

    Args:
        vectors: Of any length.
        others: Of any length; where one is zero the vector stays as it is.
        share: How much of the component is taken out; 1 takes it out wholly.
    """
    units = others / others.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    found: Tensor = vectors - share * (vectors * units).sum(dim=-1, keepdim=True) * units
    if share == 1:
        # Twice is enough (Gram-Schmidt): the second pass removes what rounding left of the first.
        found = found - (found * units).sum(dim=-1, keepdim=True) * units
    return found


def encode_rows(rows: Vectors) -> dict[str, Any]:
    """Return vectors, [n, d_model], as JSON holds them: their float64 bytes, little-endian, in base64."""
    n, d_model = rows.shape
    data = rows.astype("<f8").tobytes()
    return {"k": n, "d_model": d_model, "dtype": "float64", "base64": base64.b64encode(data).decode("ascii")}


def decode_rows(encoded: Mapping[str, Any]) -> Vectors:
    """Return the vectors, [n, d_model], that `encode_rows` put into JSON.

    Raises:
        KeyError, TypeError, ValueError: They are not what that returns.
    """
    import numpy as np

    n, d_model = encoded["k"], encoded["d_model"]
    data = base64.b64decode(encoded["base64"], validate=True)
    if encoded["dtype"] != "float64" or n < 1 or d_model < 1 or len(data) != 8 * n * d_model:
        raise ValueError(f"{len(data)} bytes do not hold {n} float64 vectors of {d_model}")
    return np.frombuffer(data, "<f8").astype(np.float64).reshape(n, d_model)


def _shape_message(where: str, name: str, tensor: NDArray[Any], wanted: str) -> str:
    return f"{where}: `{name}` has shape {list(tensor.shape)}, expected {wanted}; extract the direction again"


def _plain(value: Any) -> Any:
    # NaN and infinity are no JSON: they would make the direction file and every record built from it
    # unreadable to strict parsers.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
