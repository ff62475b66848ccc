"""Run examples/trace.ipynb from its first cell to its last, without Jupyter, and write its outputs into it.

    python -m scripts.notebook                   runs it on what `make demo` has left in build/demo
    python -m scripts.notebook --demo DIRECTORY  on another folder with `model` and `refusal.safetensors`

Cells run in one namespace, in the notebook's folder. What a cell prints is its output, and so is the value of its last
line: a figure as SVG, all else as text. A cell that fails ends the run, and nothing is written.
"""

import argparse
import ast
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "examples" / "trace.ipynb"
SETTING = "ABLITERATE_DEMO"


def executed(notebook: dict[str, Any], *, folder: Path, demo: Path) -> dict[str, Any]:
    """Return a notebook with the outputs of a run.

    Args:
        notebook: The notebook, in format 4.
        folder: Where it runs.
        demo: Folder with `model` and `refusal.safetensors`.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    with _in_folder(folder, demo=demo.absolute()):
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                cells.append(cell)
                continue
            count += 1
            outputs = _run("".join(cell["source"]), namespace, count)
            cells.append({**cell, "execution_count": count, "outputs": outputs})
    return {**notebook, "cells": cells}


def _run(source: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value, name = StringIO(), None, f"cell {count}"
    with redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    if value is not None:
        svg = getattr(value, "_repr_svg_", None)
        shown = {"text/plain": _lines(repr(value))} if svg is None else {"image/svg+xml": _lines(svg())}
        outputs.append({"data": shown, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return outputs


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


@contextmanager
def _in_folder(folder: Path, *, demo: Path) -> Iterator[None]:
    here, setting = Path.cwd(), os.environ.get(SETTING)
    os.chdir(folder)
    os.environ[SETTING] = str(demo)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.pop(SETTING)
        if setting is not None:
            os.environ[SETTING] = setting


def written(notebook: dict[str, Any]) -> str:
    """Return a notebook as the text of its file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Run the notebook and write its outputs into it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("build/demo"), help="folder with model and direction")
    arguments = parser.parse_args()
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    done = executed(notebook, folder=NOTEBOOK.parent, demo=arguments.demo)
    NOTEBOOK.write_text(written(done), encoding="utf-8")
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
