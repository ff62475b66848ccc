"""The file of strengths, which `refine` writes: how far each layer and role is edited, and along what.

One JSON object holds

    strengths_version  1
    direction_sha256   of the direction that they were found for
    strengths          embed: a share; attn, mlp: one share a layer
    directions         what is removed from each layer's writers, float64 in base64, one unit vector a layer; null: the
                       direction itself
    arguments          those of the command that found them
    prompt_hashes      of the prompts that they were found with, so that `evaluate` can leave those out
    frontier           all points that it was chosen from, each with pressure, attn, mlp

and what else the finder has to say. FILE@PRESSURE names another point of the frontier. Reading it needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.directions import decode_rows
from abliterate.errors import InputError
from abliterate.files import read_json_report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STRENGTHS_VERSION = 1
_AGAIN = "run `abliterate refine` again"
_GIVE = "give a file that `abliterate refine` wrote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Strengths:
    """How far each writer is edited, by role and layer.

    Attributes:
        file: Name of the file that they came in.
        direction_sha256: Of the direction that they were found for.
        embed: Share of the component that is removed from the embeddings.
        attn: Of what attention writes, one share a layer; 0 edits nothing, and below 0 the component grows.
        mlp: Of what the MLP writes, one a layer.
        directions: What is removed from each layer's writers, as `directions.encode_rows` puts it; None: the direction
            that is given.
        arguments: Those of the command that found them.
        prompt_hashes: Of the prompts that they were found and chosen with.
        pressure: Which point of the file's frontier they are, by its weight of the refusal score; None: the chosen one.

    Raises:
        InputError: A share is not finite, all are 0, or the roles have different numbers of layers.
    """

    file: str
    direction_sha256: str
    embed: float
    attn: tuple[float, ...]
    mlp: tuple[float, ...]
    directions: Mapping[str, Any] | None = None
    arguments: tuple[str, ...] = ()
    prompt_hashes: tuple[str, ...] = ()
    pressure: float | None = None

    def __post_init__(self) -> None:
        shares = (self.embed, *self.attn, *self.mlp)
        if len(self.attn) != len(self.mlp) or not self.attn:
            raise InputError(f"{self.file}: {len(self.attn)} layers of attn and {len(self.mlp)} of mlp; {_AGAIN}")
        if not all(math.isfinite(share) for share in shares) or not any(shares):
            raise InputError(f"{self.file}: the strengths must be finite numbers that are not all 0; {_AGAIN}")

    def __str__(self) -> str:
        """Return what the command line calls them by."""
        return self.file if self.pressure is None else f"{self.file}@{self.pressure:g}"

    def of(self, role: str, layer: int | None) -> float:
        """Return the share that is removed of what a writer of this role and layer writes."""
        if layer is None or role == "embed":
            return self.embed
        return (self.attn if role == "attn" else self.mlp)[layer]

    def by_layer(self, *, d_model: int) -> NDArray[np.float64] | None:
        """Return what is removed from each layer's writers; None: the direction that is given.

        Raises:
            InputError: It is not one unit vector of that width for each layer.
        """
        if self.directions is None:
            return None
        import numpy as np

        n_layers = len(self.attn)
        try:
            rows = decode_rows(self.directions)
            is_unit = np.abs(np.linalg.norm(rows, axis=1) - 1) < 1e-6
            if rows.shape != (n_layers, d_model) or not bool(is_unit.all()):
                raise ValueError(f"{rows.shape[0]} vectors of {rows.shape[1]}")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.file}: its directions must be one unit vector of {d_model} for each of {n_layers} layers "
                f"({error}); {_AGAIN}"
            ) from error
        return rows

    def content(self) -> dict[str, Any]:
        """Return what a file of them holds."""
        return {
            "strengths_version": STRENGTHS_VERSION,
            "direction_sha256": self.direction_sha256,
            "strengths": {"embed": self.embed, "attn": self.attn, "mlp": self.mlp},
            "directions": self.directions,
            "arguments": self.arguments,
            "prompt_hashes": self.prompt_hashes,
        }


def read_strengths(path: Path) -> Strengths:
    """Read what `abliterate refine` wrote.

    Args:
        path: the file; FILE@PRESSURE takes that point of its frontier in the place of the chosen one.

    Raises:
        InputError: The file is not there, cannot be read, is no file of strengths, or has no such point.
    """
    path, pressure = _file_and_pressure(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; make one with `abliterate refine MODEL --direction F -o {path}`")
    try:
        content = read_json_report(path)
    except InputError as error:
        raise InputError(f"{error}; {_GIVE}") from error
    try:
        if content["strengths_version"] != STRENGTHS_VERSION:
            raise ValueError(f"version {content['strengths_version']!r} is not {STRENGTHS_VERSION}")
        chosen, directions = content["strengths"], content["directions"]
        if directions is not None and not isinstance(directions, dict):
            raise TypeError("directions is no object")
        given = chosen if pressure is None else _point(content["frontier"], pressure, file=path)
        values: dict[str, Any] = {
            "file": path.name,
            "direction_sha256": str(content["direction_sha256"]),
            "embed": float(chosen["embed"]),
            "attn": tuple(float(share) for share in given["attn"]),
            "mlp": tuple(float(share) for share in given["mlp"]),
            "directions": directions,
            "arguments": tuple(str(word) for word in content["arguments"]),
            "prompt_hashes": tuple(str(each) for each in content["prompt_hashes"]),
            "pressure": pressure,
        }
    except KeyError as error:
        raise InputError(f"{path}: is no file of strengths, it has no {error}; {_GIVE}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: is no file of strengths ({error}); {_GIVE}") from error
    return Strengths(**values)


def _file_and_pressure(path: Path) -> tuple[Path, float | None]:
    """Return what FILE@PRESSURE holds; a file of that very name, or what is no number behind the @, is a file."""
    name, found, pressure = path.name.rpartition("@")
    if not found or not name or path.is_file():
        return path, None
    try:
        return path.with_name(name), float(pressure)
    except ValueError:
        return path, None


def _point(frontier: Any, pressure: float, *, file: Path) -> Mapping[str, Any]:
    points = {float(point["pressure"]): point for point in frontier}
    if pressure not in points:
        listed = ", ".join(f"{each:g}" for each in points)
        raise InputError(f"{file}: has no point of pressure {pressure:g} on its frontier; there are {listed}")
    found: Mapping[str, Any] = points[pressure]
    return found
