"""Prompts out of files and out of datasets on the Hub, as texts with their ids and categories.

Every file becomes a table of columns; one column holds the prompts, and each row has a label (its line, item
or row) by which an error can name it.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.errors import PromptSetError
from abliterate.files import HALF_PAIR, in_one_line

DEFAULT_COLUMNS = (
    *("text", "prompt", "instruction", "goal", "question", "behavior", "forbidden_prompt", "query"),
    "request",
)
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
SPEC_FORMS = "`bundled`, a file (" + ", ".join(SUFFIXES) + ") or a Hub dataset ID[@REVISION][:SPLIT[:COLUMN]]"

# Files that were joined bring the marks that they began with.
_BYTE_ORDER_MARKS = re.compile("(?:^|(?<=[\r\n]))\ufeff+")
_DELIMITERS = ",;\t|"
_FILE_WITH_COLUMN = re.compile(rf"(?i)(.+?(?:{'|'.join(map(re.escape, SUFFIXES))})):(.+)")
# A split may be a slice, `train[:100]`, whose colon separates nothing.
_HUB_SPEC = re.compile(r"([^@:]+)(?:@([^@:]+))?(?::([^:\[]*(?:\[[^\]]*\])?)(?::(.+))?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Texts in their order, each with its id (or else its line or row number) and its category (or "")."""

    texts: tuple[str, ...]
    ids: tuple[str, ...]
    categories: tuple[str, ...]


def read_prompts(spec: str) -> Prompts:
    """Read the file or the dataset that a SPEC names (see `prompt_sets`).

    Raises:
        PromptSetError: It is not there, cannot be read, or has an empty or missing column.
    """
    with_column = None if os.path.isfile(spec) else _FILE_WITH_COLUMN.fullmatch(spec)
    file, column = with_column.groups() if with_column else (spec, None)
    if _looks_like_a_path(file):
        return read_prompt_file(Path(os.path.expanduser(file)), column=column)
    hub_spec = _HUB_SPEC.fullmatch(spec)
    if hub_spec is None:
        raise PromptSetError(f"{spec!r} names no prompt set; give {SPEC_FORMS}")
    repo_id, revision, split, column = hub_spec.groups()
    return _to_prompts(_read_dataset(repo_id, revision=revision, split=split or "train"), column)


def read_prompt_file(path: Path, *, column: str | None = None) -> Prompts:
    """Read a file; without `column` the prompts are in the first of `DEFAULT_COLUMNS`, or the only text column.

    Raises:
        PromptSetError: It is not there, cannot be read, or has an empty or missing column.
    """
    return _to_prompts(_read_table(path), column)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    where: str
    columns: tuple[str, ...]
    text_columns: tuple[str, ...]
    values: Callable[[str], Sequence[object]]
    labels: Sequence[str]


def _to_prompts(table: _Table, column: str | None) -> Prompts:
    if not table.labels:
        raise PromptSetError(f"{table.where}: there are no prompts in it")
    column = _choose_column(table, column)
    texts = []
    for label, value in zip(table.labels, table.values(column), strict=True):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise PromptSetError(
                f"{table.where}, {label}: column {column!r} is empty; {_found(table)}; fill it, take the {label} "
                "out, or name another column as SPEC:COLUMN"
            )
        if not isinstance(value, str):
            raise PromptSetError(
                f"{table.where}, {label}: column {column!r} holds a {type(value).__name__} and no text; {_found(table)}"
            )
        if half := HALF_PAIR.search(value):
            raise PromptSetError(
                f"{table.where}, {label}: column {column!r} holds half of a surrogate pair, {half[0]!a}, which stands "
                "for no character; write the character itself"
            )
        texts.append(value)
    numbers = [label.rpartition(" ")[2] for label in table.labels]
    return Prompts(
        texts=tuple(texts),
        ids=_side_column(table, "id", column, default=numbers),
        categories=_side_column(table, "category", column, default=[""] * len(texts)),
    )


def _choose_column(table: _Table, asked: str | None) -> str:
    if asked is not None:
        if asked not in table.columns:
            raise PromptSetError(f"{table.where}: no column {asked!r}; {_found(table)}")
        return asked
    by_name = {name.casefold(): name for name in reversed(table.columns)}
    for name in DEFAULT_COLUMNS:
        if name in by_name:
            return by_name[name]
    if len(table.text_columns) == 1:
        return table.text_columns[0]
    raise PromptSetError(
        f"{table.where}: cannot tell which column holds the prompts; {_found(table)}; name one as SPEC:COLUMN"
    )


def _found(table: _Table) -> str:
    # A file can have any number of them, of any length.
    shown = [" ".join(name.split())[:60] for name in table.columns[:20]]
    return "columns found: " + (", ".join(shown) or "none")


def _side_column(table: _Table, name: str, column: str, *, default: list[str]) -> tuple[str, ...]:
    if name not in table.columns or name == column:
        return tuple(default)
    pairs = zip(table.values(name), default, strict=True)
    return tuple(other if value is None else str(value) for value, other in pairs)


def _looks_like_a_path(name: str) -> bool:
    return (
        not name.strip()
        or name[0] in "./~"
        or name.endswith("/")
        or name.count("/") > 1
        or "\\" in name
        or name.lower().endswith(SUFFIXES)
        or os.path.exists(name)
    )


def _read_table(path: Path) -> _Table:
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            raise PromptSetError(f"{path}: this is a directory; give {SPEC_FORMS}")
        if not path.is_file():
            raise PromptSetError(f"{path}: no such file; check the path, or give {SPEC_FORMS}")
        if suffix == ".parquet":
            return _read_parquet(path)
        if suffix not in SUFFIXES:
            raise PromptSetError(f"{path}: cannot read {suffix or 'a file without extension'}; give {SPEC_FORMS}")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            text = _BYTE_ORDER_MARKS.sub("", stream.read())
    except UnicodeDecodeError as error:
        raise PromptSetError(f"{path}: not UTF-8 (byte {error.start}); convert it, as with `iconv -t UTF-8`") from error
    except OSError as error:
        raise PromptSetError(f"{path}: cannot be read: {error.strerror or in_one_line(error)}") from error
    if suffix == ".csv":
        return _read_csv(path, text)
    if suffix == ".json":
        return _read_json(path, text)
    lines = [(f"line {n}", line.strip()) for n, line in enumerate(re.split("\r\n?|\n", text), 1) if line.strip()]
    if suffix == ".txt":
        return _table_of(str(path), lines)
    return _table_of(str(path), [(label, _parse_json(path, label, line)) for label, line in lines])


def _parse_json(path: Path, label: str, line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptSetError(f"{path}, {label}: broken JSON ({error}); each line is one object or string") from error


def _read_json(path: Path, text: str) -> _Table:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; name it .jsonl if it has an object a line" if error.msg == "Extra data" else ""
        raise PromptSetError(f"{path}, line {error.lineno}: broken JSON ({error.msg}){hint}") from error
    except (ValueError, RecursionError) as error:
        raise PromptSetError(f"{path}: broken JSON ({error})") from error
    if not isinstance(rows, list):
        raise PromptSetError(f"{path}: a list of strings or objects is needed, found a {type(rows).__name__}")
    return _table_of(str(path), [(f"item {n}", row) for n, row in enumerate(rows, 1)])


def _read_csv(path: Path, text: str) -> _Table:
    delimiter = _delimiter_of(text)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    rows: list[tuple[str, object]] = []
    try:
        for row in reader:
            if None in row:
                raise PromptSetError(
                    f"{path}, line {reader.line_num}: more cells than the header names; quote cells that hold "
                    f"{delimiter!r}"
                )
            rows.append((f"line {reader.line_num}", row))
        columns = tuple(reader.fieldnames or ())
    except csv.Error as error:
        raise PromptSetError(f"{path}, line {reader.reader.line_num}: broken CSV ({error})") from error
    if len(columns) == 1 and " " in columns[0].strip():
        raise PromptSetError(
            f"{path}: the first line, {columns[0]!r}, seems to be a prompt and not a column's name; "
            "add a first line `text`, or name the file .txt"
        )
    return _table_of(str(path), rows)


def _delimiter_of(text: str) -> str:
    """Return what stands between the cells: a comma, unless another divides the header into names of columns."""
    header = re.split("[\r\n]", text, maxsplit=1)[0]
    for delimiter in _DELIMITERS:
        names = [name.strip().strip('"') for name in header.split(delimiter)]
        if len(names) > 1 and all(name and " " not in name for name in names):
            return delimiter
    return ","


def _table_of(where: str, rows: Sequence[tuple[str, object]]) -> _Table:
    """Make a table of strings and objects; a string is an object that has a `text`."""
    objects: list[dict[str, object]] = []
    for label, row in rows:
        if not isinstance(row, (str, dict)):
            raise PromptSetError(f"{where}, {label}: a string or an object is needed, found a {type(row).__name__}")
        objects.append({"text": row} if isinstance(row, str) else row)
    columns = tuple(dict.fromkeys(name for row in objects for name in row))
    return _Table(
        where=where,
        columns=columns,
        text_columns=tuple(c for c in columns if any(isinstance(row.get(c), str) for row in objects)),
        values=lambda column: [row.get(column) for row in objects],
        labels=[label for label, _ in rows],
    )


def _read_parquet(path: Path) -> _Table:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(path)
        # Among other things, that its strings are text.
        table.validate(full=True)
    # Broken ones make it raise its own errors, OSError, ValueError and others.
    except Exception as error:
        raise PromptSetError(f"{path}: not a readable Parquet file ({in_one_line(error)})") from error
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string)
    return _Table(
        where=str(path),
        columns=tuple(table.column_names),
        text_columns=tuple(f.name for f in table.schema if any(test(f.type) for test in is_text)),
        values=lambda column: table.column(column).to_pylist(),
        labels=[f"row {n}" for n in range(1, table.num_rows + 1)],
    )


def _read_dataset(repo_id: str, *, revision: str | None, split: str) -> _Table:
    import datasets
    import httpx2

    try:
        dataset = datasets.load_dataset(repo_id, revision=revision, split=split)
    # The Hub client raises errors of HTTP and ValueError, the builders of `datasets` RuntimeError and their own.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, httpx2.HTTPError) as error:
        raise PromptSetError(f"{repo_id}: {_explain(error, repo_id=repo_id, split=split)}") from error
    return _Table(
        where=f"{repo_id}, split {split}",
        columns=tuple(dataset.column_names),
        text_columns=tuple(
            name for name, f in dataset.features.items() if getattr(f, "dtype", "") in {"string", "large_string"}
        ),
        values=lambda column: _column_of(dataset, column, repo_id=repo_id),
        labels=[f"row {n}" for n in range(1, len(dataset) + 1)],
    )


def _column_of(dataset: Any, column: str, *, repo_id: str) -> list[object]:
    try:
        return list(dataset[column])
    except (OSError, ValueError) as error:  # a file of it that is damaged, or strings in it that are no text
        raise PromptSetError(f"{repo_id}: the column {column} cannot be read ({in_one_line(error)})") from error


def _explain(error: Exception, *, repo_id: str, split: str) -> str:
    said = in_one_line(error)
    if splits := re.search(r"Unknown split .*Should be one of \[(.*)\]", said):
        return f"no split {split!r}; splits found: {splits[1]}; name one as {repo_id}:SPLIT"
    if configs := re.search(r"available configs: (\[.*?\])", said):
        return f"it has several configurations, {configs[1]}, and a SPEC cannot name one; save one as a file"
    if "gated" in said:
        return "this dataset is gated; accept its conditions on its Hub page, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, FileNotFoundError):
        return f"no such file here, and on the Hub: {said}; check the spelling; a private one needs `hf auth login`"
    if isinstance(error, ConnectionError):
        return f"{said}; check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a file"
    return f"`datasets` cannot load it ({type(error).__name__}): {said}"
