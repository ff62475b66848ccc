"""The pages are typed as they stand: each block of commands runs, or says why not, and prints what the page shows."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import abliterate
from tests.support.chat_servers import scripted_server
from tests.support.command_line import CommandLine
from tests.support.documents import (
    COMMANDS,
    NotKnownError,
    Reader,
    blocks_of,
    commands_outside_blocks,
    missing,
    shape,
    words_of,
)
from tests.support.paths import REPOSITORY

PAGES = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "prompts/*.md", "benchmarks/**/*.md")
    for path in sorted(REPOSITORY.glob(pattern))
}
RUN = [
    name
    for name, text in PAGES.items()
    if any(block.language in COMMANDS and block.reason is None for block in blocks_of(text))
]
# Written from the commands and the errors themselves by `scripts.pages`; tests/test_pages.py holds them to those.
MADE = {"docs/cli.md", "docs/troubleshooting.md"}
N_PROMPTS = 6


def with_servers(reader: Reader, stack: ExitStack) -> None:
    """Give docs/servers.md the servers, the edited model and the earlier report that it takes for granted."""
    here = reader.directory
    extraction = abliterate.extract_direction(model=here / "model")
    extraction.direction.save(here / "refusal.safetensors")
    abliterate.orthogonalize_checkpoint(source=here / "model", direction=extraction.direction, output=here / "edited")
    (here / "examples").symlink_to(REPOSITORY / "examples")
    reader.options["evaluate"] = "--harmful harmful.jsonl --harmless harmless.jsonl --borderline borderline.jsonl"
    for kind in ("harmful", "harmless", "borderline"):
        lines = (REPOSITORY / "prompts" / kind / "test.jsonl").read_text(encoding="utf-8").splitlines()
        (here / f"{kind}.jsonl").write_text("\n".join(lines[:: len(lines) // N_PROMPTS]), encoding="utf-8")

    def serve(*models: str, says: str = "I cannot help with that.") -> str:
        return stack.enter_context(scripted_server(answer=lambda _messages: says, models=models)).url

    reader.names |= {
        "http://127.0.0.1:8000/v1": serve("edited"),
        "URL": serve("edited", "base"),
        "ONE": serve("edited"),
        "OTHER": serve("base"),
        "JUDGE": serve("judge", says="no"),
    }
    small = reader.options["evaluate"].split()
    reader.call_main("evaluate", "--server", serve("edited"), "-o", here / "base.json", *small)


PREPARED: dict[str, Callable[[Reader, ExitStack], None]] = {"docs/servers.md": with_servers}


@contextmanager
def reader_of(name: str, *, directory: Path, model: Path, call_main: CommandLine) -> Iterator[Reader]:
    """Somebody in a directory with `model` and with what the page takes for granted beside it."""
    (directory / "model").symlink_to(model)
    reader = Reader(call_main, directory, names={"MODEL": "model", "path/to/model": "model"})
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        PREPARED.get(name, lambda *_: None)(reader, stack)
        yield reader


@pytest.mark.parametrize("name", RUN)
def test_a_page_can_be_typed_from_the_first_block_to_the_last(name, tmp_path, small_demo_directory, call_main):
    with reader_of(name, directory=tmp_path, model=small_demo_directory, call_main=call_main) as reader:
        faults = reader.read(PAGES[name])
    assert not faults, f"{name}, " + "\n".join(faults)


@pytest.mark.demo
@pytest.mark.proof
def test_the_guide_is_true_of_the_demo_model_at_full_size(tmp_path, demo_directory, call_main):
    with reader_of("docs/guide.md", directory=tmp_path, model=demo_directory, call_main=call_main) as reader:
        faults = reader.read(PAGES["docs/guide.md"])
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", PAGES)
def test_commands_stand_in_blocks_of_a_known_language(name):
    assert {block.language for block in blocks_of(PAGES[name])} <= {*COMMANDS, "text"}
    assert len(blocks_of(PAGES[name])) * 2 == sum(line.startswith("```") for line in PAGES[name].splitlines())
    assert commands_outside_blocks(PAGES[name]) == []


def test_no_page_shows_an_output_without_its_command():
    shows = {name for name, text in PAGES.items() if any(block.language == "text" for block in blocks_of(text))}
    assert shows - set(RUN) == MADE


TABLE = """\
┏━━━━━━┳━━━━━━━┓
┃ role ┃ count ┃
┡━━━━━━╇━━━━━━━┩
│ mlp  │    30 │
└──────┴───────┘
written to out, 3.5 MB
"""


@pytest.mark.parametrize(
    ("shown", "same"),
    [
        (TABLE, True),
        (TABLE.replace("30", "4").replace("━", "━━").replace("3.5", "-2.1e-08"), True),
        (TABLE.replace("mlp ", "attn"), False),
        (TABLE.replace("count", "n"), False),
        (TABLE.replace("written to", "wrote"), False),
        (TABLE.replace("│ mlp  │    30 │\n", "..."), False),
        (TABLE.replace("│ mlp  │    30 │", "..."), True),
        (TABLE.replace("│ mlp  │    30 │", "...\n│ attn │ 1 │"), False),
        (TABLE.splitlines()[1], False),
        ("...\n" + TABLE.splitlines()[1], False),
        ("...\n" + TABLE.splitlines()[1] + "\n...", True),
        ("...\n" + TABLE.splitlines()[-1], True),
        ("...\nwritten to out, 3.5 MB\nmore", False),
        (TABLE + "more", False),
    ],
)
def test_an_output_is_compared_by_its_shape(shown, same):
    assert (missing(shown, TABLE) is None) is same


def test_some_lines_are_found_in_their_order():
    assert missing("role\ncount", "a\nrole\nb\ncount\nc", some_lines=True) is None
    assert missing("count\nrole", "a\nrole\nb\ncount\nc", some_lines=True) == "shown: role; printed: c"
    assert shape("12 at layer 3\n\n at final norm") == ["# at PLACE", "at PLACE"]


def test_a_reader_types_what_stands_there_and_says_what_is_wrong(tmp_path, call_main):
    reader = Reader(call_main, tmp_path, names={"N": "2"}, options={"prompts": "--json"})
    page = "a\n```python\nx = N\nprint('a', x)\n```\n\n```text\na 5\n```\n<!-- not run: hours -->\n```sh\nmake\n```\n"
    assert reader.read(page) == []
    assert reader.read(page.replace("a 5", "b 5")) == ["line 8: shown: b #; printed: a #"]
    assert reader.read("a\n```python\nassert x == 2\n```\n") == []
    assert "no command was run" in reader.read("a\n```text\n5\n```\n")[0]
    not_run = page.replace("a\n```python", "<!-- not run: hours -->\n```python")
    assert "no command was run" in reader.read(not_run)[0]
    assert "mark the block" in reader.read("a\n```sh\nmake demo\n```\n")[0]
    assert "ends with 2" in reader.read("a\n```sh\nabliterate plan --nonsense\n```\n")[0]
    assert reader.read("a\n```sh\nabliterate prompts \\\n  --json  # all\n```\n") == []


@pytest.mark.parametrize("line", ["a | b", "a && b", "a > b", "a $(b)", "a; b"])
def test_more_than_one_command_in_a_line_is_not_run_as_one(line):
    with pytest.raises(NotKnownError):
        words_of(line)
    assert list(words_of("a 'x<1' # b | c")) == ["a", "x<1"]


def test_marks_stand_before_their_block():
    text = "a\n<!-- not run: hours -->\n```sh\nmake\n```\n\n```text\nx\n```\nb: <!-- some lines -->\n```text\ny\n```\n"
    found = blocks_of(text)
    assert [block.reason for block in found] == ["hours", None, None]
    assert [block.some_lines for block in found] == [False, False, True]
    assert [text.splitlines()[block.line - 1] for block in found] == ["make", "x", "y"]
    assert commands_outside_blocks("a\n\n    make demo\n    X=1 run.sh a\n    words\n") == [
        "    make demo",
        "    X=1 run.sh a",
    ]
