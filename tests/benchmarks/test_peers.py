"""The head to head: what is finished is not run again, what failed is said, and the page says what was measured."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from abliterate.prompt_sets import load_prompt_set
from benchmarks.peers import __main__ as head_to_head
from benchmarks.peers import page, tools
from benchmarks.peers.measuring import ToolFailedError, Usage
from benchmarks.peers.ours import WAYS, Way, commands
from benchmarks.peers.ours import _others as others
from benchmarks.peers.plot import undominated
from benchmarks.peers.prompts import describe, write_prompts
from benchmarks.peers.results import Results, ResultsError, read_results
from benchmarks.peers.tools import Export, Job, Made, Tool, exported, make_environment, variables, without_paths

USAGE = Usage(wall_s=12.3456, cpu_s=20.0, peak_mb=512.0)


def rates(refused: int, degenerate: int = 0) -> dict[str, Any]:
    one = {"n": 100, "refused": refused, "answered": 100 - refused - degenerate, "degenerate": degenerate}
    share = {"rate": refused / 100, "low": max(0.0, refused / 100 - 0.05), "high": min(1.0, refused / 100 + 0.05)}
    return {kind: one | share | {"empty": 0} for kind in ("harmful", "harmless", "borderline")}


def evaluation(refused: int, kl: float, entropy: float) -> dict[str, Any]:
    """A report as `evaluate` writes it, as far as it is read."""
    return {
        "rates": rates(refused, degenerate=1),
        "base_rates": rates(99),
        "divergence": {"first_token": kl / 2, "continuation": kl, "n_tokens": 9, "per_prompt": 3},
        "cross_entropy": {"base": 0.8, "model": entropy, "relative_change": entropy / 0.8 - 1, "n_tokens": 9},
        "text_cross_entropy": {},
        "prompt_sets": {"harmful": {"name": str(Path.cwd() / "test.txt"), "count": 100}},
        "completions": ["a reply"],
    }


class FakeTools:
    """Tools that leave a model at once, or fail, and an `evaluate` that says what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[tuple[str, int, int | None]] = []
        self.broken: dict[str, str] = {}
        self.evaluated: list[list[str]] = []
        monkeypatch.setattr(head_to_head, "PEERS", (self.tool("peer", searches=True),))
        monkeypatch.setattr(head_to_head, "our_tools", lambda _: (self.tool("ours: way", searches=False),))
        monkeypatch.setattr(head_to_head, "own_system_prompt", lambda model: "You are kind")
        monkeypatch.setattr(head_to_head, "make_environment", self.make_environment)
        monkeypatch.setattr(head_to_head, "run_measured", self.evaluate)

    def tool(self, name: str, *, searches: bool) -> Tool:
        def run(job: Job) -> Made:
            self.runs.append((name, job.seed, job.trials))
            if name in self.broken:
                raise ToolFailedError(self.broken[name].format(model=job.model), USAGE)
            model = job.work / "edited"
            model.mkdir()
            (model / "config.json").write_text("{}")
            (model / "model.safetensors").write_text("")
            return Made(exports=(Export(name="best", model=model, claims={"kl": 0.1}),), usage=USAGE, settings="--x 1")

        return Tool(name=name, requirement="peer==1.0" if searches else None, searches=searches, run=run)

    def make_environment(self, directory: Path, requirement: str) -> Path:
        if "install" in self.broken:
            raise ToolFailedError(self.broken["install"])
        return directory / "bin"

    def evaluate(self, command: list[str], *, log: Path, env: dict[str, str], limit_s: float) -> Usage:
        self.evaluated.append(command)
        if "evaluate" in self.broken:
            raise ToolFailedError(self.broken["evaluate"])
        peer = "peer" in str(log)
        report = evaluation(20, 0.2, 0.9) if peer else evaluation(10, 0.1, 0.85)
        Path(command[command.index("--output") + 1]).write_text(json.dumps(report))
        return USAGE


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTools:
    return FakeTools(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"dtype": "float32"}')
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


@pytest.fixture
def call(model: Path, tmp_path: Path, fake: FakeTools):
    def call(*options: str) -> dict[str, Any]:
        arguments = [str(model), "--output", str(tmp_path / "out"), "--tools", "peer,ours", "--trials", "6,20"]
        assert head_to_head.main([*arguments, "--seeds", "1,2", *options]) == 0
        return read_results(tmp_path / "out" / "results.json")

    return call


EVERY = [(name, seed, trials) for seed in (1, 2) for name, trials in (("peer", 6), ("peer", 20), ("ours: way", None))]


def test_each_run_is_done_once_and_measured_alike(call, fake, tmp_path, capsys):
    document = call()
    assert fake.runs == EVERY
    assert len({tuple(command[5:]) for command in fake.evaluated}) == len(EVERY)  # the report's place differs
    assert len({tuple(command[2:4] + command[5:9]) for command in fake.evaluated}) == 1
    first = document["runs"][0]
    assert first["usage"] == {"wall_s": 12.35, "cpu_s": 20.0, "peak_mb": 512.0}
    assert first["results"][0]["evaluation"]["rates"]["harmful"]["refused"] == 20
    assert document["base"]["rates"]["harmful"]["refused"] == 99
    assert document["base"]["prompt_sets"] == {"harmful": {"count": 100}}
    assert str(Path.cwd()) not in json.dumps(document)
    assert "reply" not in json.dumps(document)
    assert str(tmp_path) not in json.dumps(document)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["prompts", "results.json"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == told[-1] == head_to_head.NOTE
    assert "comparable within one run" in told[0]
    assert "peer, seed 1, 6 trials: best: 20 of 100 harmful refused (12 s)" in told


def test_what_is_finished_is_not_run_again(call, fake, capsys):
    before = call()
    fake.runs.clear()
    assert call() == before
    assert fake.runs == []
    assert "peer, seed 2, 20 trials: done before" in capsys.readouterr().err
    call("--seeds", "3")
    assert fake.runs == [(name, 3, trials) for name, _, trials in EVERY[:3]]


def test_a_run_that_was_interrupted_is_run_again_and_those_before_it_are_not(call, fake, model, tmp_path, monkeypatch):
    evaluate = fake.evaluate

    def interrupt(*arguments: Any, **named: Any) -> Usage:
        if len(fake.evaluated) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments, **named)

    monkeypatch.setattr(head_to_head, "run_measured", interrupt)
    arguments = [str(model), "--output", str(tmp_path / "out"), "--tools", "peer,ours", "--trials", "6,20"]
    assert head_to_head.main([*arguments, "--seeds", "1,2"]) == 130
    assert fake.runs == EVERY[:3]
    fake.runs.clear()
    monkeypatch.setattr(head_to_head, "run_measured", evaluate)
    call()
    assert fake.runs == EVERY[2:]


@pytest.mark.parametrize(
    ("where", "error", "told"),
    [
        ("peer", "ValueError: {model} has no norm", "ValueError: MODEL has no norm"),
        ("install", "not installed: ERROR: no torch", "not installed: ERROR: no torch"),
        ("evaluate", "error: no tokenizer", "evaluate: error: no tokenizer"),
    ],
)
def test_what_failed_is_recorded_said_and_tried_again_when_asked(call, fake, capsys, where, error, told):
    fake.broken[where] = error
    document = call()
    errors = [run["error"] or (run["results"] and run["results"][0]["error"]) for run in document["runs"]]
    assert errors[0] == told
    assert f"peer, seed 1, 6 trials: failed: {told}" in capsys.readouterr().err
    assert f"- peer 1.0, seed 1, 6 trials{', best' if where == 'evaluate' else ''}: `{told}`" in page.block(
        document, "x"
    )
    if where == "peer":
        assert document["runs"][0]["usage"]["wall_s"] == 12.35
        assert [run["error"] for run in document["runs"] if run["tool"] == "ours: way"] == [None, None]
    fake.broken.clear()
    fake.runs.clear()
    assert call() == document
    again = call("--retry-failed")
    assert len(again["runs"]) == len(EVERY)
    assert fake.runs == [key for key in EVERY if where == "evaluate" or key[0] == "peer"]
    assert "Nothing failed to run." in page.block(again, "x")


def test_results_of_something_else_are_not_added_to(call, model, tmp_path, capsys):
    call()
    (model / "model.safetensors").write_bytes(b"others")
    assert head_to_head.main([str(model), "--output", str(tmp_path / "out"), "--tools", "peer"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "another model_sha256" in last
    (tmp_path / "out" / "results.json").write_text("[]")
    with pytest.raises(ResultsError, match="no results of format 1; remove it"):
        Results(tmp_path / "out" / "results.json", {})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tools", "peer,nobody"], "nobody: choose from peer, ours"),
        (["--tools", ","], "no tool: choose from"),
        (["--trials", "6,x"], "'6,x' is no list of whole numbers"),
        (["--seeds", "0"], "0 is below 1"),
        (["--front", "0"], "0 is below 1"),
    ],
)
def test_bad_input_is_told_in_one_line(fake, model, tmp_path, capsys, options, told):
    with pytest.raises(SystemExit) as ended:
        head_to_head.main([str(model), "--output", str(tmp_path / "out"), *options])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_model_is_refused(fake, tmp_path, capsys):
    with pytest.raises(SystemExit):
        head_to_head.main([str(tmp_path), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().err.splitlines()[-1].endswith("is no directory of a model: it has no config.json")


def test_the_table_holds_intervals_and_the_base(call):
    document = call("--seeds", "1", "--trials", "6")
    lines = page.results_table(document)
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| none", "| ours: way", "| peer 1.0"]
    assert lines[4] == (
        "| peer 1.0 | 1 | 6 | best | 20.0 % [15.0, 25.0] | 20.0 % [15.0, 25.0] | 20.0 % [15.0, 25.0] | 0.100 | 0.200 "
        "| 0.900 (+12.5 %) | 3 of 300 | 12 | 20 | 512 |"
    )
    assert len({line.count("|") for line in lines}) == 1


def test_the_page_says_where_ours_is_gentler_and_where_not(call):
    document = call("--seeds", "1", "--trials", "6")
    assert page.comparison(document)[2].endswith("| ours: way, seed 1, best: 10.0 % | 0.100, +6.2 % | yes |")
    ours = next(run for run in document["runs"] if run["tool"] == "ours: way")["results"][0]["evaluation"]
    ours["cross_entropy"]["relative_change"] = 0.5
    assert page.comparison(document)[2].endswith("| no |")
    ours["rates"]["harmful"]["rate"] = 0.3
    assert page.comparison(document)[2].endswith("| none |  | no |")
    document["runs"] = [run for run in document["runs"] if run["tool"] == "peer"]
    assert page.comparison(document) == []


def test_the_page_says_whether_times_are_comparable(call):
    document = call("--seeds", "1", "--trials", "6")
    for run in document["runs"]:
        run |= {"load": 0.2, "nice": 0, "session": "one"}
    assert "Wall times are comparable with each other" in page.condition_text(document)
    document["runs"][0]["nice"] = 10
    assert "**not comparable**" in page.condition_text(document)


def test_new_results_are_taken_and_their_section_is_replaced(call, tmp_path, monkeypatch, capsys):
    document = call("--seeds", "1", "--trials", "6")
    docs = tmp_path / "docs"
    docs.mkdir()
    monkeypatch.setattr(page, "DOCS", docs)
    assert page.main(["--take", str(tmp_path / "out" / "results.json"), "--name", "small"]) == 0
    written = (docs / "peers.md").read_text()
    (docs / "peers.md").write_text(f"prose\n{written}more prose\n")
    assert page.main([]) == 0
    assert (docs / "peers.md").read_text() == f"prose\n{written}more prose\n"
    assert page.block(document, "small") in written
    assert "](peers/small.svg)" in written
    assert read_results(docs / "peers" / "small.json") == document
    (docs / "peers" / "small.json").write_text("{}")
    assert page.main([]) == 1
    assert "no results of format" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        page.main(["--name", "small"])
    with pytest.raises(SystemExit):
        page.main(["--take", "x", "--name", "../x"])


def test_the_figure_is_whole_and_has_a_point_for_each_model_in_each_panel(call):
    figure = ElementTree.fromstring(page.figure(call("--seeds", "1", "--trials", "6")))
    shown = [title.text for title in figure.iter("{http://www.w3.org/2000/svg}title")]
    assert shown[0] == "Effect against damage: model"
    assert [text for text in shown if text and text.startswith("peer")] == [
        "peer, seed 1, 6 trials, best: 20.0% refused, 0.2", "peer, seed 1, 6 trials, best: 20.0% refused, 12.5",
    ]  # fmt: skip
    assert len(shown) == 5


def test_what_another_point_beats_is_not_on_the_front():
    assert undominated([(0.5, 1.0), (0.2, 2.0), (0.6, 1.0), (0.1, 5.0), (0.3, 2.0)]) == [(0.1, 5), (0.2, 2), (0.5, 1)]
    assert undominated([]) == []


def test_the_committed_page_says_what_was_measured():
    for path, text in page.documents(page.DOCS).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run `python -m benchmarks.peers.page`"


def test_all_tools_get_the_first_prompts_of_each_part(tmp_path):
    prompts = write_prompts(tmp_path)
    for kind in ("harmful", "harmless"):
        train = prompts.part(kind, "train").read_text().splitlines()
        validation = prompts.part(kind, "validation").read_text().splitlines()
        assert train == list(load_prompt_set("bundled", kind=kind, part="train").texts[:128])
        assert validation == list(load_prompt_set("bundled", kind=kind, part="validation").texts[:32])
        assert prompts.all(kind).read_text().splitlines() == train + validation
        tests = set(load_prompt_set("bundled", kind=kind, part="test").texts)
        assert not tests & {*train, *validation}
    assert {name: one["count"] for name, one in describe(prompts).items()} == {
        "harmful/train": 128, "harmful/validation": 32, "harmless/train": 128, "harmless/validation": 32,
    }  # fmt: skip


def test_fewer_test_prompts_are_measured_on_when_asked(call, fake, tmp_path):
    document = call("--seeds", "1", "--trials", "6", "--every", "3")
    for kind, n in (("harmful", 48), ("harmless", 48), ("borderline", 67)):
        file = tmp_path / "out" / "prompts" / kind / "test.txt"
        assert fake.evaluated[0][fake.evaluated[0].index(f"--{kind}") + 1] == str(file)
        assert file.read_text().splitlines() == list(
            load_prompt_set("bundled", kind=kind, part="test").texts[::3]  # type: ignore[arg-type]
        )
        assert len(file.read_text().splitlines()) == n
    assert "Measured on one of 3 test prompts." in page.condition_text(document)


def test_our_ways_are_commands_of_ours(tmp_path):
    job = Job(
        model=tmp_path, prompts=write_prompts(tmp_path), work=tmp_path, programs=tmp_path, env={}, seed=7, trials=None,
        n_front=1, max_new_tokens=8, system_prompt=None, limit_s=1.0,
    )  # fmt: skip
    assert [way.name for way in WAYS] == ["paper", "attn,mlp --tied skip", "refine"]
    way = Way(name="x", extract=("--rank", "2"), orthogonalize=("--strength", "0.5"))
    extract, (edit,) = commands(way, job, tmp_path / "d", tmp_path / "o")
    assert extract[0] == "extract"
    assert extract[-6:] == ["--seed", "7", "--n-train", "128", "--rank", "2"]
    assert edit[0] == "orthogonalize"
    assert edit[-2:] == ["--strength", "0.5"]
    way = Way(name="y", refine=("--steps", "8"))
    _, (refine, edit) = commands(way, job, tmp_path / "d", tmp_path / "o")
    assert refine[0] == "refine"
    assert refine[-4:] == ["--seed", "7", "--steps", "8"]
    assert edit[-2:] == ["--strengths", refine[refine.index("--output") + 1]]


def test_the_points_of_a_frontier_that_are_measured_besides(tmp_path):
    points = [
        {"pressure": 3.0, "unanswered": 0, "kl": 0.5},
        {"pressure": 0.3, "unanswered": 0, "kl": 0.2},
        {"pressure": 0.1, "unanswered": 1, "kl": 0.1},
        {"pressure": 0.03, "unanswered": 4, "kl": 0.05},
    ]
    (tmp_path / "s.json").write_text(json.dumps({"frontier": points, "chosen": points[2]}))
    assert others(tmp_path / "s.json", 2) == [0.3, 0.03]
    assert others(tmp_path / "s.json", 1) == [0.3]
    assert others(tmp_path / "s.json", 0) == []


def test_the_environment_is_offline_and_holds_no_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "here")
    env = variables(home=tmp_path, threads=3)
    assert "HF_TOKEN" not in env
    assert "PYTHONPATH" not in env
    assert (env["HF_HUB_OFFLINE"], env["OMP_NUM_THREADS"], env["CUDA_VISIBLE_DEVICES"]) == ("1", "3", "")


def test_an_environment_is_made_with_the_pinned_torch_and_only_once(monkeypatch, tmp_path):
    called: list[list[str]] = []

    def run(command: list[str], **named: Any) -> Any:
        called.append(command)
        (tmp_path / "env").mkdir(exist_ok=True)
        return tools.subprocess.CompletedProcess(command, returncode=0, stdout="", stderr="")

    monkeypatch.setattr(tools.subprocess, "run", run)
    assert make_environment(tmp_path / "env", "peer==1.0") == tmp_path / "env" / "bin"
    assert [command[-1] for command in called[1:]] == [tools.TORCH, "peer==1.0"]
    assert "--constraint" in called[2]
    assert (tmp_path / "env" / "constraints.txt").read_text() == f"{tools.TORCH}\n"
    make_environment(tmp_path / "env", "peer==1.0")
    assert len(called) == 3
    make_environment(tmp_path / "env", "peer==2.0")
    assert len(called) == 6


def test_a_tool_that_ends_well_without_a_model_has_failed(tmp_path):
    (tmp_path / "log").write_text("nothing passed the gate\n")
    with pytest.raises(ToolFailedError, match="it ended without a model: nothing passed the gate"):
        exported(tmp_path, tmp_path / "log")


def test_paths_of_the_machine_are_not_recorded(tmp_path):
    text = f"{tmp_path}/out/x and {tmp_path} in /usr/lib/python3/site-packages/torch"
    assert without_paths(text, {"HOME": tmp_path, "DIR": tmp_path / "out"}) == "DIR/x and HOME in site-packages/torch"
