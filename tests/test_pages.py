"""The pages: made ones are what they are made from, links lead somewhere, and commands that are shown can be typed."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import abliterate
from abliterate import errors
from abliterate.cli.app import app
from scripts import pages, site
from tests.support.paths import DOCS, REPOSITORY, SOURCES

WRITTEN = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/schemas/*.md", "examples/**/*.md", "prompts/*.md", "benchmarks/*.md")
    for path in REPOSITORY.glob(pattern)
)
GROUP: Any = typer.main.get_command(app)


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("name", ["cli.md", "troubleshooting.md"])
def test_a_page_is_what_it_is_made_from(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    assert text == pages.pages()[name], f"docs/{name} is stale: run `python -m scripts.pages`"


def test_every_command_and_option_is_on_the_page_of_commands():
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name, command in GROUP.commands.items():
        section = page.split(f"## abliterate {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            if not getattr(parameter, "hidden", False) and parameter.opts[-1] not in pages._OF_ALL:
                assert parameter.metavar is None or parameter.metavar.replace("|", "\\|") in section
                assert all(f"`{flag}`" in section for flag in parameter.opts if flag.startswith("-")), parameter.opts


@pytest.mark.parametrize("kind", pages.error_classes(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_message_that_the_code_can_write_a_cause_and_a_remedy(kind):
    sections = pages.sections_of(kind)
    assert sections.keys() >= {"Message", "Cause", "Remedy"}
    # Some words of the message in a row stand so in the code, where a literal may go on in the next line.
    code = " ".join(re.sub(r'"\s*f?"', "", path.read_text()) for path in SOURCES.rglob("*.py") if path.stem != "errors")
    words = sections["Message"].split()
    runs = [" ".join(words[i : i + 4]) for i in range(len(words) - 3)]
    assert any(run in code for run in runs), sections["Message"]


def test_no_error_is_outside_the_page():
    found = set()
    for path in SOURCES.rglob("*.py"):
        found |= set(re.findall(r"(?m)^class (\w+)\((?:\w*Error|AbliterateError)\):", path.read_text()))
    named = set(re.findall(r"\w+Error", (DOCS / "troubleshooting.md").read_text()))
    of_others = {"EncodingError", "NotHandedOnError", "AbliterateError"}  # caught where they are raised
    assert {name for name in found if not name.startswith("_")} - of_others <= named
    assert issubclass(errors.AbliterateError, Exception)


def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8")))
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"[`*]|\]\([^)]*\)", "", title).lower()).replace(" ", "-") for title in titles
    }


@pytest.mark.parametrize("path", WRITTEN, ids=name_of)
def test_every_link_inside_the_repository_leads_somewhere(path):
    text = re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r"(?m)^\[[^\]]+\]: (\S+)", text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), link
        if anchor:
            assert anchor in anchors_of(there), link


def commands_in(path: Path) -> list[str]:
    """Return the `abliterate` commands in a page's blocks of shell, each in one line."""
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```$", path.read_text(encoding="utf-8"))
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("abliterate ")]


SHOWN = [(path, line) for path in WRITTEN for line in commands_in(path)]


@pytest.mark.parametrize(("path", "line"), SHOWN, ids=[f"{name_of(path)}: {line[:60]}" for path, line in SHOWN])
def test_a_command_that_is_shown_can_be_typed(path, line):
    _, name, *words = shlex.split(line, comments=True)
    if name.startswith("-"):
        return
    command = GROUP.commands[name]
    # Parsed, checked and not run: an unknown option, a missing one or a value of the wrong kind raises.
    with command.make_context(name, [word for word in words if word != "..."]) as context:
        assert context.params


def test_readme_is_one_look_long():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 100


def test_the_reference_names_every_function_of_the_package_and_only_what_is_there():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    named = re.findall(r"(?m)^::: (\S+)$", text)
    for name in named:
        module, _, what = name.rpartition(".")
        path = SOURCES / f"{name.replace('.', '/')}.py"
        if not path.is_file():
            source = (SOURCES / f"{module.replace('.', '/')}.py").read_text()
            assert re.search(rf"(?m)^(def|class) {what}\b", source), name
    for name in set(abliterate.__all__) - {"__version__"}:
        home = abliterate._HOMES[name]
        assert {home, f"{home}.{name}"} & set(named), name


def test_the_site_holds_every_page_and_links_are_turned_to_where_they_lie():
    config = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
    nav = set(re.findall(r": (\S+\.md)$", config, flags=re.MULTILINE))
    pages_of_docs = {path.relative_to(DOCS).as_posix() for path in WRITTEN if path.is_relative_to(DOCS)}
    assert nav == pages_of_docs | set(site.OUTSIDE.values())
    assert all((REPOSITORY / path).is_file() for path in site.OUTSIDE)
    turned = site.with_links_of_the_site
    assert (
        turned("[a](docs/cli.md#x) ![p](docs/pictures/demo.svg)", "index.md") == "[a](cli.md#x) ![p](pictures/demo.svg)"
    )
    assert turned("[map](../ARCHITECTURE.md)", "design.md") == "[map](project/architecture.md)"
    assert turned("[d](docs/design.md)", "project/architecture.md") == "[d](../design.md)"
    assert turned("[code](../src/abliterate/files.py)", "replies.md") == "code"
    assert turned("[web](https://example.org) [here](#x)", "guide.md") == "[web](https://example.org) [here](#x)"
    assert turned("```\n[a](docs/cli.md)\n```\n", "index.md") == "```\n[a](docs/cli.md)\n```\n"


def test_the_citation_and_the_hooks_can_be_read():
    from abliterate import __version__

    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "authors", "message"} <= citation.keys()
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert all({"id", "name", "entry", "language"} <= hook.keys() for hook in hooks)
