"""The file of strengths: what it holds is read back, and a broken one is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from abliterate.directions import encode_rows
from abliterate.editing.strengths import Strengths, read_strengths
from abliterate.errors import InputError

ROWS = np.arange(12.0).reshape(3, 4) - 5
ROWS /= np.linalg.norm(ROWS, axis=1, keepdims=True)
GOOD = Strengths(
    file="s.json",
    direction_sha256="abc",
    embed=0.0,
    attn=(0.0, 0.5, 1.0),
    mlp=(1.7, -0.4, 0.0),
    directions=encode_rows(ROWS),
    arguments=("--steps", "16"),
    prompt_hashes=("0123", "4567"),
)


def write(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps(GOOD.content() | changes))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_strengths(write(tmp_path / "s.json")) == GOOD
    assert np.array_equal(GOOD.by_layer(d_model=4), ROWS)
    assert read_strengths(write(tmp_path / "s.json", directions=None)).by_layer(d_model=4) is None


def test_each_role_and_layer_has_its_share() -> None:
    assert [GOOD.of("attn", layer) for layer in range(3)] == [0.0, 0.5, 1.0]
    assert [GOOD.of("mlp", layer) for layer in range(3)] == [1.7, -0.4, 0.0]
    assert GOOD.of("embed", None) == 0.0
    assert str(GOOD) == "s.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strengths_version": 2}, "version 2 is not 1"),
        ({"strengths": {"embed": 0.0, "attn": [1.0]}}, "it has no 'mlp'"),
        ({"strengths": {"embed": 0.0, "attn": [1.0], "mlp": [1.0, 2.0]}}, "1 layers of attn and 2 of mlp"),
        ({"strengths": {"embed": 0.0, "attn": [0.0], "mlp": [0.0]}}, "not all 0"),
        ({"strengths": {"embed": 1e999, "attn": [0.0], "mlp": [1.0]}}, "cannot be read as JSON"),
        ({"strengths": {"embed": "inf", "attn": [0.0], "mlp": [1.0]}}, "finite numbers"),
        ({"directions": [1.0]}, "directions is no object"),
        ({"arguments": None}, "is no file of strengths"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_strengths(write(tmp_path / "s.json", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "directions",
    [
        {},
        {**encode_rows(ROWS), "k": 4},
        {**encode_rows(ROWS), "base64": "?"},
        encode_rows(2 * ROWS),
        encode_rows(ROWS[:2]),
    ],
)
def test_directions_that_are_not_one_unit_vector_a_layer_are_refused(tmp_path: Path, directions: object) -> None:
    strengths = read_strengths(write(tmp_path / "s.json", directions=directions))
    with pytest.raises(InputError, match="one unit vector of 4 for each of 3 layers") as caught:
        strengths.by_layer(d_model=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; make one with `abliterate refine"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
    ],
)
def test_what_is_no_such_file_says_what_to_give(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_strengths(path)
    assert "`abliterate refine" in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        read_strengths(tmp_path)


FRONTIER = [
    {"pressure": 0.3, "attn": [0.1, 0.6, 1.0], "mlp": [1.9, -0.4, 0.0]},
    {"pressure": 0.01, "attn": [0.0, 0.5, 1.0], "mlp": [1.7, -0.4, 0.0]},
]


def test_another_point_of_the_frontier_is_named_by_its_pressure(tmp_path: Path) -> None:
    path = write(tmp_path / "s.json", frontier=FRONTIER)
    found = read_strengths(tmp_path / "s.json@0.3")
    assert (found.attn, found.mlp, found.pressure) == ((0.1, 0.6, 1.0), (1.9, -0.4, 0.0), 0.3)
    assert (found.directions, found.prompt_hashes) == (GOOD.directions, GOOD.prompt_hashes)
    assert str(found) == "s.json@0.3"
    assert read_strengths(path) == GOOD


def test_a_file_may_hold_the_sign_in_its_name(tmp_path: Path) -> None:
    for name in ("s@0.3", "s@home.json"):
        assert str(read_strengths(write(tmp_path / name, frontier=FRONTIER))) == name


@pytest.mark.parametrize(
    ("named", "frontier", "message"),
    [
        ("s.json@0.5", FRONTIER, r"s.json: has no point of pressure 0.5 on its frontier; there are 0.3, 0.01$"),
        ("s.json@nan", FRONTIER, "no point of pressure nan"),
        ("s.json@0.3", None, "is no file of strengths"),
        ("s.json@0.3", [{"pressure": 0.3}], "it has no 'attn'"),
        ("s.json@0.3", [{"pressure": None}], "is no file of strengths"),
        ("other.json@0.3", FRONTIER, "other.json: no such file"),
        ("s.json@much", FRONTIER, "s.json@much: no such file"),
    ],
)
def test_a_point_that_is_not_there_is_refused_in_one_line(
    tmp_path: Path, named: str, frontier: object, message: str
) -> None:
    write(tmp_path / "s.json", frontier=frontier)
    with pytest.raises(InputError, match=message) as caught:
        read_strengths(tmp_path / named)
    assert "\n" not in str(caught.value)
