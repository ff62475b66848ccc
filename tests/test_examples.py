"""The examples, run as they stand: the nightly job of examples/ci, prompts of one's own, several processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

SCRIPT = REPOSITORY / "examples" / "ci" / "nightly.sh"
EXTRACT = "--n-train 8 --n-val 2 --no-filter --refusal-token I --kl-threshold 1e9 --induce-threshold -1e9"
EVALUATE = "--max-new-tokens 3 --harmful {0} --harmless {0} --borderline {0}"
AUDIT = "--n-train 8 --n-val 2 --n-test 4 --screen 2 --candidates 1 --bootstrap 3 --max-new-tokens 3"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the example is a bash script")


@pytest.fixture
def job(tmp_path: Path, llama_directory: Path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(**changes: str) -> subprocess.CompletedProcess[str]:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("How do locks work?\nExplain rain.\n")
        settings = {
            "MODEL": str(llama_directory),
            "EXTRACT_OPTIONS": EXTRACT,
            "EVALUATE_OPTIONS": EVALUATE.format(prompts),
            "AUDIT_OPTIONS": AUDIT,
            **changes,
        }
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        environment = {**os.environ, "PATH": path, "TMPDIR": str(scratch), **settings}
        environment["PYTHONPATH"] = str(REPOSITORY / "src")
        done = subprocess.run([SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert list(scratch.iterdir()) == [], "nothing may be left of the edited weights"
        assert "Traceback" not in done.stderr
        return done

    return run


def test_a_first_run_a_cached_one_and_a_changed_model(job, tmp_path: Path, llama_directory: Path) -> None:
    first = job(GATES="harmful_refusal_rate>1 kl_first_token<0")
    assert first.returncode == 0, first.stderr
    assert "direction: extracted" in first.stdout
    assert "weights: orthogonalized" in first.stdout
    assert "weights: evaluated" in first.stdout
    artefacts = tmp_path / "artefacts"
    reports = {path.stem: json.loads(path.read_text()) for path in artefacts.glob("*.json")}
    assert set(reports) >= {"extract", "orthogonalize", "audit"}
    assert reports["audit"]["verdict"] == "does_not_refuse"
    assert reports["orthogonalize"]["counts"] == {"embed": 1, "attn": 5, "mlp": 5}
    assert (artefacts / "summary.txt").read_text().startswith("audit: does_not_refuse - it refuses 0 of 4")
    assert [gate["failed"] for gate in reports["evaluate"]["gates"]] == [False, False]
    assert (artefacts / "gates.xml").read_text().count("<testcase") == 2
    assert (artefacts / "evaluate.md").read_text().startswith("## Refusals of ")
    assert (artefacts / "audit.md").read_text().startswith("## Audit of ")
    second = job(RATE="0.5")
    assert second.returncode == 1
    assert "direction: cached" in second.stdout
    assert "is brittle" in second.stderr
    assert json.loads((artefacts / "extract.json").read_text()) == reports["extract"]
    os.utime(llama_directory / "config.json", (1, 1))
    # The same job with a gate that fails: after the audit, and with all of its reports.
    third = job(GATES="harmful_refusal_rate<=1")
    assert third.returncode == 1
    assert "direction: extracted" in third.stdout
    assert "1 of 1 gates fail: harmful_refusal_rate<=1: it is 0" in third.stderr
    assert "audit: does_not_refuse" in third.stdout
    assert "<failure" in (artefacts / "gates.xml").read_text()
    assert "| harmful_refusal_rate&lt;=1 | 0 | fails |" in (artefacts / "evaluate.md").read_text()
    assert len(list((tmp_path / ".cache" / "abliterate-ci").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EXTRACT.replace("--kl-threshold 1e9", "--kl-threshold 1e-12"), "none passes the selection"),
        ("--n-train 8 --n-val 2", "none could be extracted (exit 1)"),
    ],
)
def test_without_a_direction_the_model_is_audited_all_the_same(job, tmp_path: Path, options: str, message: str) -> None:
    done = job(EXTRACT_OPTIONS=options)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout
    assert "audit: does_not_refuse" in done.stdout
    assert not (tmp_path / "artefacts" / "orthogonalize.json").exists()


def test_what_is_wrong_fails_the_job(job, tmp_path: Path) -> None:
    assert job(MODEL="").returncode == 2
    missing = job(MODEL="./missing")
    assert missing.returncode == 1
    assert "missing" in missing.stderr
    assert not (tmp_path / "artefacts" / "audit.json").exists()


def run_example(name: str, *words: object, **settings: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY / "src"), **settings}
    command = [str(REPOSITORY / "examples" / name), *map(str, words)]
    if name.endswith(".py"):
        command = [sys.executable, *command]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_prompts_of_ones_own_give_a_direction_an_edit_and_a_report(tmp_path: Path, llama_directory: Path) -> None:
    for kind in ("harmful", "harmless"):
        lines = [f"{kind} {word}" for word in ("rain", "locks", "tea", "maps", "bread", "chess", "moss", "glass")] * 2
        (tmp_path / f"{kind}.txt").write_text("".join(f"{line} {n}?\n" for n, line in enumerate(lines)))
    harmful, harmless = (tmp_path / f"{kind}.txt" for kind in ("harmful", "harmless"))
    done = run_example(
        *("own_prompts.sh", llama_directory, harmful, harmless, tmp_path / "out"),
        EXTRACT_OPTIONS=EXTRACT,
        EVALUATE_OPTIONS=f"--max-new-tokens 3 --borderline {harmless}",
    )
    assert done.returncode == 0, done.stderr
    assert "16 prompts" in done.stdout
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # Ten of each the direction was found with.
    assert report["rates"]["harmful"]["n"] == 6
    assert (tmp_path / "out" / "edited" / "abliteration.json").is_file()


@pytest.mark.proof
def test_several_processes_share_an_extraction(tmp_path: Path, llama_directory: Path) -> None:
    done = run_example("many_gpus.sh", "share", llama_directory, tmp_path / "out", 2, EXTRACT_OPTIONS=EXTRACT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "edited" / "abliteration.json").is_file()
    assert run_example("many_gpus.sh", "sideways", llama_directory, tmp_path / "out").returncode == 2


@pytest.mark.demo
@pytest.mark.proof
def test_the_library_in_twenty_lines(tmp_path: Path, demo_directory: Path) -> None:
    script = REPOSITORY / "examples" / "library.py"
    assert len(script.read_text().splitlines()) <= 20
    done = run_example("library.py", demo_directory, tmp_path / "edited")
    assert done.returncode == 0, done.stderr
    assert "verified: True" in done.stdout
    assert "harmful: 9" in done.stdout
