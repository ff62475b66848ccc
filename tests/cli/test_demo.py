"""`abliterate demo`: which adapter is merged, and what is said of the result; the merge itself is replaced."""

import json

import pytest

from abliterate.models.demo import ADAPTER_DIRECTORY, HARDENED_ADAPTER_DIRECTORY, DemoReport


@pytest.fixture
def asked(monkeypatch):
    """What the command asked for, last."""
    found = {}

    def build(*, output, overwrite, adapter, progress):
        found.update(output=output, overwrite=overwrite, adapter=adapter)
        return DemoReport(path=output, base_model="org/base", adapter_rank=8, n_parameters=134_500_000, n_bytes=10**8)

    monkeypatch.setattr("abliterate.models.demo.build_demo_model", build)
    return found


def test_the_plain_model_is_built_and_described(call_main, asked, tmp_path):
    result = call_main("demo", tmp_path / "model")
    assert result.exit_code == 0
    assert asked == {"output": tmp_path / "model", "overwrite": False, "adapter": ADAPTER_DIRECTORY}
    described = f"{tmp_path / 'model'}: org/base with a rank-8 adapter merged, 134 M parameters, 100 MB\n"
    assert result.stdout == described


def test_the_hardened_one_and_what_is_replaced(call_main, asked, tmp_path):
    result = call_main("demo", tmp_path / "model", "--hardened", "--overwrite", "--json")
    assert asked["adapter"] == HARDENED_ADAPTER_DIRECTORY != ADAPTER_DIRECTORY
    assert asked["overwrite"] is True
    assert json.loads(result.stdout) == {
        "path": str(tmp_path / "model"),
        "base_model": "org/base",
        "adapter_rank": 8,
        "n_parameters": 134_500_000,
        "n_bytes": 100_000_000,
    }


def test_what_is_there_is_not_replaced_unasked(call_main, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    result = call_main("demo", tmp_path / "model")
    assert (result.exit_code, result.stdout) == (1, "")
    assert str(tmp_path / "model") in result.error_line
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["notes.txt"]
