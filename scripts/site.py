"""What mkdocs asks while it builds the pages (`hooks` of mkdocs.yml): pages outside docs, and where links lead.

README, CONTRIBUTING and the like are pages of the site, too, and so is the notebook; their links are those of the
repository. A link to such a page is turned to where it lies in the site; one to a file that is no page becomes text.
"""

import base64
import html
import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

REPOSITORY = Path(__file__).parents[1]
OUTSIDE: Mapping[str, str] = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "CODE_OF_USE.md": "project/code-of-use.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "project/benchmarks.md",
    "examples/README.md": "project/examples.md",
    "examples/ci/README.md": "project/examples-ci.md",
    "examples/trace.ipynb": "project/trace.md",
    "prompts/README.md": "project/prompts.md",
}
"""The pages outside docs, each with its place in the site."""
_LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_PICTURE = re.compile(r'(<img[^>]* src=")([^"]+)(")')


def on_files(files: "Files", config: Any) -> "Files":
    """Add the pages outside docs."""
    from mkdocs.structure.files import File

    for source, place in OUTSIDE.items():
        path = REPOSITORY / source
        if path.suffix == ".ipynb":
            page = notebook_page(json.loads(path.read_text(encoding="utf-8")))
            files.append(File.generated(config, place, content=page))
        else:
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def notebook_page(notebook: Mapping[str, Any]) -> str:
    """Return an executed notebook as a page in Markdown, with its outputs: figures as pictures, all else as text."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        else:
            parts += [f"```python\n{text}\n```", *map(_output, cell["outputs"])]
    return "\n\n".join(parts) + "\n"


def _output(output: Mapping[str, Any]) -> str:
    data = output.get("data", {})
    if "image/svg+xml" not in data:
        text = "".join(output.get("text") or data["text/plain"])
        return f"```text\n{text.rstrip()}\n```"
    svg = "".join(data["image/svg+xml"])
    title = re.search(r"<title>([^<]*)</title>", svg)
    words = "" if title is None else html.escape(html.unescape(title[1]))
    encoded = base64.b64encode(svg.encode()).decode()
    return f'<p><img alt="{words}" src="data:image/svg+xml;base64,{encoded}"></p>'


def on_page_markdown(markdown: str, *, page: Any, **_more: Any) -> str:
    """Turn the links of a page to where they lead in the site."""
    return with_links_of_the_site(markdown, page.file.src_uri)


def with_links_of_the_site(text: str, place: str) -> str:
    """Return a page with its links as they are in the site.

    Args:
        text: The page, in Markdown.
        place: Where the page is in the site.
    """
    source = next((path for path, each in OUTSIDE.items() if each == place), f"docs/{place}")

    def turned(link: str) -> str | None:
        path, mark, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        inside = OUTSIDE.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if inside is None or not (
            (REPOSITORY / target).is_file() and Path(target).suffix in {".md", ".json", ".svg", ".ipynb"}
        ):
            return None
        return posixpath.relpath(inside, posixpath.dirname(place) or ".") + mark + anchor

    def link(found: re.Match[str]) -> str:
        mark, words, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        there = turned(target)
        return words if there is None else f"{mark}[{words}]({there})"

    def picture(found: re.Match[str]) -> str:
        return f"{found[1]}{turned(found[2]) or found[2]}{found[3]}"

    return _PICTURE.sub(picture, _outside_code(text, link))


def _outside_code(text: str, link: Any) -> str:
    """Replace links, but not in blocks of code."""
    parts = re.split(r"(?ms)(^```.*?^```$)", text)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)
