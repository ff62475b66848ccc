"""`python -m scripts.fixtures`: plans what a folder of headers describes, and says where that is not as expected."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.fixtures import main

D_MODEL = 8
NAMES = {
    "model.embed_tokens.weight": [11, D_MODEL],
    "model.layers.0.self_attn.o_proj.weight": [D_MODEL, D_MODEL],
    "model.layers.0.mlp.down_proj.weight": [D_MODEL, 16],
    "lm_head.weight": [11, D_MODEL],
}
GROUPS = [
    ["embed", "model.embed_tokens.weight", 1, 1, []],
    ["attn", "model.layers.*.self_attn.o_proj.weight", 1, 0, []],
    ["mlp", "model.layers.*.mlp.down_proj.weight", 1, 0, []],
]
PLANNED = {"outcome": "planned", "error": None, "tied_embeddings": False, "groups": GROUPS}
REFUSED = {
    "outcome": "refused",
    "error": "error: x/config.json: model type 'brand_new' cannot be orthogonalized: it is new",
    "tied_embeddings": None,
    "groups": None,
}


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> int:
    config = {"model_type": "llama", "hidden_size": D_MODEL, "num_hidden_layers": 1, "tie_word_embeddings": False}
    fixture = {
        "expect": "as seen",
        "seen": PLANNED,
        "config": config | changes.pop("config", {}),
        "index_metadata": None,
        "shards": ["model-1.safetensors", "model-2.safetensors"],
        "tensors": [[name, "BF16", shape, index % 2] for index, (name, shape) in enumerate(NAMES.items())],
    } | changes
    (folder / "checkpoints").mkdir()
    with gzip.open(folder / "checkpoints" / "tiny.json.gz", "wt") as file:
        json.dump(fixture, file)
    monkeypatch.setattr(sys, "argv", ["fixtures", str(folder)])
    return main()


AGREEING: dict[str, dict[str, Any]] = {
    "planned": {},
    "refused": {"config": {"model_type": "brand_new"}, "seen": REFUSED},
    "a head that differs": {
        "config": {"tie_word_embeddings": True},
        "expect": "lm_head is stored, differs from the embedding and must not be edited; see there",
        "seen": PLANNED | {"groups": [*GROUPS, ["embed", "lm_head.weight", 1, 1, []]]},
    },
    "a size": {"expect": "should plan: d_model is hidden_size"},
    "a part": {"expect": "should plan model.*; as it is"},
}


@pytest.mark.parametrize("changes", AGREEING.values(), ids=AGREEING.keys())
def test_what_agrees(tmp_path, monkeypatch, capsys, changes):
    assert run(tmp_path, monkeypatch, **changes) == 0
    assert capsys.readouterr().out.endswith("1 of 1 agree\n")


DIFFERING: dict[str, tuple[dict[str, Any], str]] = {
    "planned": ({"seen": REFUSED}, "was to be refused"),
    "refused": ({"config": {"model_type": "brand_new"}}, "refused: tiny/config.json: model type 'brand_new'"),
    "tie": ({"seen": PLANNED | {"tied_embeddings": True}}, "was to be tied"),
    "groups": ({"seen": PLANNED | {"groups": GROUPS[1:]}}, "edits [['embed', "),
    "part": ({"expect": "should plan thinker.*"}, "which is not below thinker."),
    "words": ({"expect": "something else"}, "is not understood: something else"),
}


@pytest.mark.parametrize(("changes", "words"), DIFFERING.values(), ids=DIFFERING.keys())
def test_what_differs(tmp_path, monkeypatch, capsys, changes, words):
    assert run(tmp_path, monkeypatch, **changes) == 1
    out = capsys.readouterr().out
    assert out.startswith("DIFFERS")
    assert words in out
    assert out.endswith("0 of 1 agree\n")


def test_an_empty_folder_does_not_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fixtures", str(tmp_path)])
    assert main() == 1
    monkeypatch.setattr(sys, "argv", ["fixtures"])
    assert main() == 2
