"""`abliterate evaluate --server`: what it prints, how it ends, and that a killed run asks nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from abliterate.evaluation import chat_server
from tests.support.chat_servers import scripted_server
from tests.support.command_line import CommandLine
from tests.support.tiny_models import save_chat_model, tiny_llama


def answer(messages):
    return "I cannot help with that." if "Steal" in messages[-1]["content"] else "With a brush."


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server, "WAITS", (0.01,))


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    words = []
    for kind, verb in (("harmful", "Steal"), ("harmless", "Paint"), ("borderline", "Kill")):
        path = tmp_path / f"{kind}.txt"
        path.write_text("\n".join(f"{verb} thing {i}." for i in range(4)))
        words += [f"--{kind}", str(path)]
    return [*words, "--max-new-tokens", "8"]


def test_a_report_with_a_page_gates_and_an_earlier_report(call_main: CommandLine, sets, tmp_path):
    with scripted_server(answer=answer) as server:
        first = call_main("evaluate", "--server", server.url, *sets, "-o", tmp_path / "first.json", "--json")
        assert first.exit_code == 0
        report = json.loads(first.stdout)
        assert report["rates"]["harmful"]["refused"] == 4
        assert report["server"]["url"] == server.url
        assert report["arguments"][-2:] == ["--server", server.url]
        again = call_main(
            *("evaluate", "--server", server.url, *sets, "--against", tmp_path / "first.json"),
            *("--fail-if", "harmful_refusal_change!=0", "--report", tmp_path / "page"),
        )
        assert again.exit_code == 0
        gate = call_main("evaluate", "--server", server.url, *sets, "--fail-if", "harmful_refusal_rate>0.5")
        assert (gate.exit_code, "harmful_refusal_rate>0.5: it is 1" in gate.error_line) == (1, True)
    assert f"The model was tiny at {server.url}" in again.stdout
    assert "not measured: cross-entropy" in again.stdout
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Model served by" in page
    assert "Not measured" in page


def test_a_checkpoint_beside_it_gives_its_name(call_main: CommandLine, sets, tmp_path):
    save_chat_model(tmp_path / "edited", tiny_llama())
    with scripted_server(answer=answer) as server:
        outcome = call_main("evaluate", tmp_path / "edited", "--server", server.url, *sets, "--json")
        assert {body["model"] for body in server.bodies} == {"tiny"}
    assert json.loads(outcome.stdout)["model"] == str(tmp_path / "edited")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "MODEL is missing"),
        (["m", "--api-model", "x"], "--api-model is about a server"),
        (["m", "--base-server", "http://h/v1"], "--base-server is about a server"),
        (["--server", "http://h/v1", "--dtype", "float32"], "--dtype is about a model in this process"),
        (["--server", "http://h/v1", "--base", "m"], "--base is about a model in this process"),
        (["--server", "http://h/v1", "--server-requests", "0"], "--server-requests"),
    ],
)
def test_wrong_usage(call_main: CommandLine, words, message):
    outcome = call_main("evaluate", *words)
    assert outcome.exit_code == 2
    assert message in outcome.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--server", "nothing"], "--server nothing: is no URL of a server"),
        (["--server", "http://127.0.0.1:9/v1"], "--server http://127.0.0.1:9/v1: "),
        (["--server", "http://h/v1", "--fail-if", "kl_first_token>1"], "needs the model in this process"),
        (["--server", "http://h/v1", "--text", "x.txt"], "--text: needs the model in this process"),
        (["--server", "http://h/v1", "--server-body", "{"], "--server-body: is no JSON"),
    ],
)
def test_bad_input_is_one_line(call_main: CommandLine, sets, words, message):
    outcome = call_main("evaluate", *words, *sets)
    assert outcome.exit_code == 1
    assert message in outcome.error_line


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_run_that_ends_early_goes_on_and_asks_nothing_twice(sets, tmp_path, how, code):
    with scripted_server(answer=answer, seconds=0.1) as server:
        command = [sys.executable, "-m", "abliterate", "evaluate", "--server", server.url, *sets, "--json"]
        command += ["--cache", str(tmp_path / "kept"), "--server-requests", "1"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while len(server.bodies) < 5:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.kill(process.pid, how)
        said = process.communicate()[1]
        assert process.returncode == code
        assert "Traceback" not in said
        server.seconds = 0.0
        time.sleep(0.2)
        before = [json.dumps(body) for body in server.bodies]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = [json.dumps(body) for body in server.bodies][len(before) :]
    assert json.loads(done.stdout)["rates"]["harmful"]["refused"] == 4
    # Only what was under way when it ended is asked again.
    assert len(set(before) & set(after)) <= 1
    assert len(set(before) | set(after)) == 13
