"""What `--help` shows: few options to a reader, each with what it takes; and what every command takes."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperOption

from abliterate.cli.app import app
from abliterate.cli.options import ADVANCED, PANELS, SHOWN, did_you_mean, expand_home
from tests.support.paths import SOURCES

GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)  # type: ignore[attr-defined]


def options_of(command):
    found = GROUP.commands[command]  # type: ignore[attr-defined]
    with found.make_context(command, [], resilient_parsing=True) as context:
        parameters = found.get_params(context)
    return [each for each in parameters if isinstance(each, TyperOption) and not each.hidden]


def flags_of(command):
    return {flag for option in options_of(command) for flag in (*option.opts, *option.secondary_opts)}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_meets_at_most_twelve_options_before_the_advanced_ones(command):
    shown = [option.opts for option in options_of(command) if option.rich_help_panel != ADVANCED]
    assert 1 < len(shown) <= 12, shown
    assert {option.rich_help_panel for option in options_of(command)} <= {*PANELS, ADVANCED}


def test_the_tables_of_panels_name_only_what_is_there_and_each_once():
    flags = [flag for known in PANELS.values() for flag in known]
    assert len(set(flags)) == len(flags)
    assert set(flags) <= {flag for command in COMMANDS for flag in flags_of(command)}
    for command, shown in SHOWN.items():
        assert set(shown) <= flags_of(command), command
        # What is shown has a panel of its own.
        assert set(shown) <= set(flags), command


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_says_what_it_takes_in_a_word_of_the_house(command):
    for option in options_of(command):
        if option.metavar is None:
            assert option.type_descriptor.is_choice, option.opts
        else:
            assert option.metavar != "" or option.is_flag, option.opts
        assert option.help or option.opts == ["--help"], option.opts


@pytest.mark.parametrize("command", COMMANDS)
def test_output_and_report_mean_one_thing(command):
    for option in options_of(command):
        if "-o" in option.opts:
            assert option.opts == ["-o", "--output"]
            assert "to write" in option.help, option.help
        if "--report" in option.opts:
            assert option.metavar == "DIR"
            assert option.help.startswith("Also write a report into this directory: ")


def test_brackets_of_the_help_are_no_styles(call_main):
    assert "abliterate[gguf]" in call_main("convert", "--help").stdout
    assert "[:split[:column]]" in call_main("extract", "--help").stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_what_every_command_takes(command):
    assert {"-q", "--quiet", "-v", "--verbose", "--json", "--progress-interval"} <= flags_of(command)


@pytest.mark.parametrize("words", [("-q", "prompts"), ("prompts", "-q"), ("prompts", "--quiet")])
def test_quiet_stands_before_or_behind(call_main, monkeypatch, words):
    monkeypatch.setattr("abliterate.prompt_sets.find_bundled_problems", lambda: ())
    from abliterate.cli.output import Output

    seen = []
    monkeypatch.setattr(Output, "report", lambda self, *_args, **_more: seen.append((self.quiet, self.json_output)))
    assert call_main(*words).exit_code == 0
    assert seen == [(True, False)]


@pytest.mark.parametrize(
    "words", [("--json", "prompts", "--kind", "harmful"), ("prompts", "--kind", "harmful", "--json")]
)
def test_json_stands_before_or_behind(call_main, words):
    done = call_main(*words)
    assert json.loads(done.stdout)["schema"] == "abliterate.prompts/1"


@pytest.mark.parametrize("words", [("-v", "plan", "./nowhere"), ("plan", "./nowhere", "-v")])
def test_verbose_stands_before_or_behind(call_main, words):
    assert "Traceback" in call_main(*words).stderr


@pytest.mark.parametrize(
    ("words", "error", "code"),
    [
        (("--json", "plan", "./nowhere"), "InputError", 1),
        (("plan", "./nowhere", "--json", "-q"), "InputError", 1),
        (("plan", "--json"), "UsageError", 2),
        (("plam", "--json"), "UsageError", 2),
        (("extract", "x", "-o", "y", "--bogus", "--json"), "UsageError", 2),
        (("prompts", "./nowhere.txt", "--json"), "PromptSetError", 1),
    ],
)
def test_an_error_is_a_document_too(call_main, words, error, code):
    done = call_main(*words)
    document = json.loads(done.stdout)
    assert (done.exit_code, document["exit_code"], document["error"]) == (code, code, error)
    assert document["schema"] == "abliterate.error/1"
    assert done.error_line == f"error: {document['message']}"


@pytest.mark.parametrize(
    ("raised", "error", "code"),
    [(KeyboardInterrupt(), "Interrupted", 130), (ZeroDivisionError("by zero"), "UnexpectedError", 1)],
)
def test_what_nobody_asked_for_is_a_document_too(call_main, monkeypatch, tmp_path, raised, error, code):
    def fail(**_options):
        raise raised

    monkeypatch.setattr("abliterate.models.demo.build_demo_model", fail)
    done = call_main("demo", tmp_path / "x", "--json")
    assert (done.exit_code, json.loads(done.stdout)["error"]) == (code, error)
    assert call_main("demo", tmp_path / "x").stdout == ""


def test_a_misspelled_word_is_answered_with_the_likeliest(call_main):
    assert "did you mean mlp?" in call_main("plan", "x", "--components", "attn,mpl").error_line
    assert "--kl-threshold" in call_main("extract", "x", "-o", "y", "--kl-treshold", "1").error_line
    assert "'orthogonalize'" in call_main("ortogonalize", "x").error_line
    assert did_you_mean("Embed", ("embed", "mlp")) == "; did you mean embed?"
    assert did_you_mean("zzz", ("embed", "mlp")) == ""


def test_the_home_directory_is_known_in_texts_that_may_be_paths_and_in_no_others(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home([Path("~/x")]) == [Path("/home/me/x")]
    assert expand_home("~/x", may_be_path=True) == "/home/me/x"
    assert expand_home(["~/x", "bundled"], may_be_path=True) == ["/home/me/x", "bundled"]
    assert expand_home("~/x") == "~/x"
    assert expand_home(None, may_be_path=True) is None


def test_every_text_that_may_be_a_path_reaches_its_command_expanded(call_main, monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for words in (
        ("evaluate", "~/model"),
        ("prompts", "~/prompts.txt"),
        ("plan", "~/model"),
        ("revert", "~/out", "-o", "~/back"),
    ):
        assert str(home) in call_main(*words).error_line, words


@pytest.mark.parametrize("command", ["demo", "convert"])
def test_what_a_command_makes_can_be_said_by_o_or_as_an_argument_and_only_once(call_main, tmp_path, command):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    words = (command, *([file] if command == "convert" else []))
    assert call_main(*words).exit_code == 2
    twice = call_main(*words, tmp_path / "a", "-o", tmp_path / "b")
    assert twice.exit_code == 2
    assert "once" in twice.error_line


def test_the_bars_of_libraries_are_off_in_a_log_and_where_it_is_quiet(call_main, monkeypatch):
    names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    seen = []
    # The environment is put back when the command has ended.
    monkeypatch.setattr(
        "abliterate.prompt_sets.find_bundled_problems", lambda: seen.extend(os.environ.get(name) for name in names)
    )
    assert call_main("prompts", "--kind", "harmful").exit_code == 0
    assert seen == ["1", "1"]


def test_completion_stays_on(call_main):
    assert "--install-completion" in call_main("--help").stdout
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['abliterate']; from abliterate.cli.app import main; main()"],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(SOURCES),
            "_ABLITERATE_COMPLETE": "complete_bash",
            "COMP_WORDS": "abliterate orth",
            "COMP_CWORD": "1",
        },
    )
    assert done.stdout.split() == ["orthogonalize"], done.stderr


def test_a_command_still_says_where_it_is_written():
    # Typer asks the wrapper; a reader of the docs asks the function.
    for command in app.registered_commands:
        assert inspect.unwrap(command.callback).__module__.startswith("abliterate.cli.")  # type: ignore[arg-type]
