"""What a model takes is known before it is loaded; one that is spread over memory and disk is extracted as ever."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate.errors import ModelError
from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.run import extract_direction
from abliterate.models import machine
from abliterate.models.chat_model import make_chat_model
from abliterate.models.loading import load_chat_model
from abliterate.models.machine import check_memory, estimate_bytes, free_bytes
from abliterate.models.options import ModelOptions
from tests.support.tiny_models import make_tokenizer, save_chat_model, tiny_llama

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPTIONS = ExtractionOptions(
    n_train=8, n_val=3, filter="none", refusal_tokens=("I",), thresholds=Thresholds(kl=1e9, induce=-1e9)
)


def save(directory: Path, dtype: torch.dtype) -> int:
    """Save a tiny llama and return its number of parameters."""
    model = tiny_llama().to(dtype)
    save_chat_model(directory, model, max_shard_size="60KB")
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_estimate_is_what_the_loaded_weights_take(tmp_path: Path, stored: torch.dtype) -> None:
    n_parameters = save(tmp_path, stored)
    for dtype in ("auto", "float32", "bfloat16"):
        chat = load_chat_model(tmp_path, name="tiny", options=ModelOptions(dtype=dtype, device="cpu"))
        taken = sum(parameter.nbytes for parameter in chat.model.parameters())
        estimate = estimate_bytes(tmp_path, dtype=dtype, device=CPU)
        assert taken == n_parameters * (2 if dtype == "bfloat16" else 4)
        assert taken <= estimate < 1.1 * taken  # headers are counted with the weights
    (tmp_path / "consolidated.safetensors").write_bytes(b"the same again" * 1000)
    on_gpu = estimate_bytes(tmp_path, dtype="auto", device=CUDA)
    assert n_parameters * stored.itemsize <= on_gpu < 1.1 * n_parameters * stored.itemsize


def test_nested_and_quantised_configs(tmp_path: Path) -> None:
    save(tmp_path, torch.bfloat16)
    stored = estimate_bytes(tmp_path, dtype="bfloat16", device=CPU)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] = {"dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert estimate_bytes(tmp_path, dtype="auto", device=CPU) == 2 * stored
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    assert estimate_bytes(tmp_path, dtype="auto", device=CPU) == stored


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, torch.float32)
    monkeypatch.setattr(machine, "free_bytes", lambda _device: 1000)
    with pytest.raises(ModelError, match=r"tiny: its weights take about 0\.0 GB .*--stream-layers.*--device-map auto"):
        load_chat_model(tmp_path, name="tiny", options=ModelOptions(device="cpu"))
    streamed = extract_direction(model=tmp_path, options=OPTIONS, model_options=ModelOptions(stream_layers=True))
    spread = extract_direction(model=tmp_path, options=OPTIONS, model_options=ModelOptions(device_map="auto"))
    assert streamed.report.selected.layer == spread.report.selected.layer
    monkeypatch.setattr(machine, "free_bytes", lambda _device: None)
    check_memory(tmp_path, name="tiny", dtype="auto", device=CPU)


def test_what_is_free_is_less_than_what_there_is() -> None:
    free = free_bytes(CPU)
    assert free is None or 10_000_000 < free < 1e14
    assert free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        ("0::/", {}, 9216),
        ("0::/", {"memory.max": "max", "memory.swap.max": "max"}, 9216),
        ("0::/", {"memory.max": "3000", "memory.current": "1024", "memory.swap.max": "0"}, 1976),
        ("0::/", {"memory.max": "3000", "memory.current": "2024", "memory.stat": "anon 9\ninactive_file 1024"}, 3024),
        ("0::/a/b", {"a/memory.max": "2000", "a/memory.current": "500", "a/b/memory.max": "max"}, 2524),
        ("4:cpu:/x\n3:memory:/y", {"memory/memory.limit_in_bytes": "99", "memory/memory.usage_in_bytes": "9"}, 1114),
        ("0::/", {"memory.max": "10", "memory.current": "20", "memory.swap.max": "0"}, 0),
    ],
)
def test_a_container_has_what_its_control_groups_leave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, files: dict[str, str], expected: int
) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"{group}\n")
    (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\nSwapFree: 1 kB\n")
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine, "_PROC", proc)
    monkeypatch.setattr(machine, "_CGROUPS", groups)
    assert free_bytes(CPU) == expected


def test_a_model_partly_on_disk_gives_the_same_direction(tmp_path: Path) -> None:
    save(tmp_path, torch.float32)
    whole = extract_direction(model=tmp_path, options=OPTIONS)
    places = {f"model.layers.{i}": "disk" if i in {1, 2, 4} else "cpu" for i in range(5)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in model.parameters())
    forwards = [block.forward for block in model.model.layers]
    spread = extract_direction(model=make_chat_model(model, make_tokenizer()), options=OPTIONS)
    one, other = whole.report.selected, spread.report.selected
    assert (one.position, one.layer) == (other.position, other.layer)
    assert torch.allclose(whole.direction.vector, spread.direction.vector, atol=1e-5)
    for name in ("bypass", "induce", "kl"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-4)
    assert [block.forward for block in model.model.layers] == forwards
