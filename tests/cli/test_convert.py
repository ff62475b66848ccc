"""`abliterate convert`, and how the other commands take a GGUF file."""

import json

import pytest

from tests.support.gguf_models import Q8_0, tiny, write, write_gguf
from tests.support.tiny_models import make_tokenizer


def test_it_says_what_was_written(call_main, tmp_path):
    source, out = write(tmp_path, kind=Q8_0), tmp_path / "out"
    result = call_main("convert", source, out)
    assert result.exit_code == 0
    assert all(line.startswith("Converting model.gguf") for line in result.stderr.splitlines())
    assert result.stdout.startswith(f"{out}: llama, 0 M parameters in float32, ")
    assert result.stdout.endswith("MB in 1 file of weights; answers end at 2\n")


def test_json(call_main, tmp_path):
    source, out = write(tmp_path), tmp_path / "out"
    report = json.loads(call_main("convert", source, out, "--dtype", "bfloat16", "--json").stdout)
    assert report == {
        "schema": "abliterate.convert/1",
        "source": str(source),
        "path": str(out),
        "architecture": "llama",
        "model_type": "llama",
        "dtype": "bfloat16",
        "n_parameters": tiny().num_parameters(),
        "n_bytes": sum(file.stat().st_size for file in out.iterdir()),
        "n_shards": 1,
        "eos_token_ids": [2],
        "has_chat_template": True,
    }


def test_a_file_without_a_template_is_written_with_a_note(call_main, tmp_path):
    source = write_gguf(tmp_path / "m.gguf", tiny(), make_tokenizer(template=None))
    result = call_main("convert", source, tmp_path / "out")
    assert result.exit_code == 0
    assert "holds no chat template" in result.stderr
    assert call_main("-q", "convert", source, tmp_path / "out", "--overwrite").stderr == ""


def test_help(call_main):
    result = call_main("convert", "--help")
    assert result.exit_code == 0
    for word in ("FILE.gguf", "OUT", "--dtype", "--overwrite", "--json", "float32 holds exactly"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        (b"PK\x03\x04", "is not a GGUF file"),
        (b"GGUF\x03\0\0\0", "damaged"),
        ("cut", "the GGUF file is damaged: it ends after"),
        ("parrot", "does not load as a causal language model"),
        ("lacks", "the GGUF file lacks model.norm.weight"),
    ],
)
def test_bad_files_end_in_one_line_and_leave_nothing(call_main, tmp_path, content, said):
    source = tmp_path / "model.gguf"
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content == "cut":
        source.write_bytes(write(tmp_path).read_bytes()[:-4000])
    elif content == "parrot":
        write(tmp_path, architecture="parrot")
    elif content == "lacks":
        write(tmp_path, leave_out="output_norm.weight")
    result = call_main("convert", source, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.error_line
    assert str(source) in result.error_line or source.name in result.error_line
    assert {path.name for path in tmp_path.iterdir()} <= {"model.gguf"}


def test_wrong_usage(call_main, tmp_path):
    assert call_main("convert", "x.gguf").exit_code == 2
    result = call_main("convert", "x.gguf", tmp_path / "out", "--dtype", "int4")
    assert result.exit_code == 2
    assert "int4" in result.error_line


def test_what_is_there_is_kept_unless_it_may_be_replaced(call_main, tmp_path):
    source, out = write(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "--overwrite" in call_main("convert", source, out).error_line
    assert "no checkpoint and is not replaced" in call_main("convert", source, out, "--overwrite").error_line
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_extract_evaluate_and_trace_take_the_file_and_find_what_they_find_in_the_checkpoint(call_main, tmp_path):
    source, prompts = write(tmp_path, kind=Q8_0), tmp_path / "prompts.txt"
    call_main("convert", source, tmp_path / "out")
    prompts.write_text("How do locks work?\nExplain rain.\n")
    sets = [word for kind in ("harmful", "harmless", "borderline", "text") for word in (f"--{kind}", prompts)]
    found = {}
    for model in (source, tmp_path / "out"):
        direction = tmp_path / f"{model.name}.safetensors"
        runs = [
            call_main(
                "extract", model, "-o", direction, "--n-train", "8", "--n-val", "2", "--no-filter", "--refusal-token",
                "I", "--kl-threshold", "1e9", "--induce-threshold", "-1e9", "--json",
            ),
            call_main(
                "evaluate", model, *sets, "--direction", direction, "--intervention", "ablate", "--max-new-tokens",
                "2", "--cache", tmp_path / "cache", "--json",
            ),
            call_main("trace", model, "--direction", direction, "--prompts", prompts, "--json"),
        ]  # fmt: skip
        assert [run.exit_code for run in runs] == [0, 0, 0], [run.stderr for run in runs]
        extracted, evaluated = (json.loads(run.stdout) for run in runs[:2])
        found[model.name] = extracted["selected"], evaluated["kl_harmless"]
    assert found["model.gguf"] == found["out"]
