"""Prompt sets: the bundled ones, files, and Hub datasets, named by one string, the SPEC.

    bundled                              the sets that come with abliterate (prompts/README.md)
    bundled:harmful/test                 one part of them, as a list of its own
    PATH[:COLUMN]                        .txt (a prompt a line), .jsonl, .json, .csv or .parquet
    ID[@REVISION][:SPLIT[:COLUMN]]       a dataset on the Hub; SPLIT is `train` unless named

Without COLUMN it is the first of `DEFAULT_COLUMNS` that exists, or else the only column of text.
"""

import csv
import hashlib
import io
import json
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from abliterate.errors import PromptSetError

Part = Literal["train", "validation", "test"]
Kind = Literal["harmful", "harmless", "borderline"]

BUNDLED = "bundled"
MINIMUM_COUNTS: dict[Part, int] = {"train": 256, "validation": 64, "test": 128}
MINIMUM_BORDERLINE = 100
MINIMUM_CATEGORIES = 10
DEFAULT_COLUMNS = (
    *("text", "prompt", "instruction", "goal", "question", "behavior", "forbidden_prompt", "query"),
    "request",
)
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")

_BUNDLED_SETS: tuple[tuple[Kind, Part], ...] = (
    *(("harmful", part) for part in get_args(Part)),
    *(("harmless", part) for part in get_args(Part)),
    ("borderline", "test"),
)
_FILE_WITH_COLUMN = re.compile(rf"(?i)(.+?(?:{'|'.join(map(re.escape, SUFFIXES))})):(.+)")
# A split may be a slice, `train[:100]`, whose colon separates nothing.
_HUB_SPEC = re.compile(r"([^@:]+)(?:@([^@:]+))?(?::([^:\[]*(?:\[[^\]]*\])?)(?::(.+))?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts in their order, and where they come from.

    Attributes:
        name: The SPEC as given; for a bundled set its part too, as in `bundled:harmful/test`.
        texts: The prompts.
        ids: Each prompt's id; its line or row number where the source has no `id` column.
        categories: Each prompt's category; empty where the source has none.
    """

    name: str
    texts: tuple[str, ...]
    ids: tuple[str, ...]
    categories: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """SHA-256 of the JSON list of the texts in UTF-8, which identifies the prompts and their order."""
        return hashlib.sha256(json.dumps(list(self.texts), ensure_ascii=False).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.texts)

    def _select(self, indices: Iterable[int]) -> "PromptSet":
        chosen = list(indices)
        return PromptSet(
            name=self.name,
            texts=tuple(self.texts[i] for i in chosen),
            ids=tuple(self.ids[i] for i in chosen),
            categories=tuple(self.categories[i] for i in chosen),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSetInfo:
    """What there is to say about a prompt set. `kind` and `part` are None for one that is not bundled."""

    name: str
    kind: Kind | None
    part: Part | None
    count: int
    categories: tuple[str, ...]
    mean_words: float
    duplicates: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionPrompts:
    """The prompts of one extraction; `notes` says what was left out and why."""

    harmful_train: PromptSet
    harmless_train: PromptSet
    harmful_validation: PromptSet
    harmless_validation: PromptSet
    notes: tuple[str, ...] = ()


def fold(text: str) -> str:
    """Return `text` without case, punctuation and extra space: prompts with equal folds are duplicates."""
    text = re.sub("['\u2019\u02bc]", "", unicodedata.normalize("NFKC", text).casefold())
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in text).split())


# ---------------------------------------------------------------------------------------- loading and drawing


def load_prompt_set(spec: str, *, kind: Kind, part: Part) -> PromptSet:
    """Load the prompts that SPEC names.

    Args:
        spec: What to load; see the module's docstring.
        kind: Which of the bundled sets; no matter for a file or a dataset.
        part: Which part of the bundled set; a file or a dataset is taken as a whole.

    Raises:
        PromptSetError: It is not there, cannot be read, or has an empty or missing column.
    """
    if spec == BUNDLED:
        return _load_bundled(kind, part)
    for bundled_kind, bundled_part in _BUNDLED_SETS:
        if spec == f"{BUNDLED}:{bundled_kind}/{bundled_part}":
            return _load_bundled(bundled_kind, bundled_part)
    with_column = None if os.path.isfile(spec) else _FILE_WITH_COLUMN.fullmatch(spec)
    file, column = with_column.groups() if with_column else (spec, None)
    if _looks_like_a_path(file):
        return _to_prompt_set(spec, _read_file(Path(os.path.expanduser(file))), column)
    hub_spec = _HUB_SPEC.fullmatch(spec)
    if hub_spec is None:
        raise PromptSetError(f"{spec!r} names no prompt set; give {_FORMS}")
    repo_id, revision, split, column = hub_spec.groups()
    table = _read_dataset(repo_id, revision=revision, split=split or "train")
    return _to_prompt_set(spec, table, column)


def sample_prompts(prompts: PromptSet, n: int, *, rng: random.Random) -> PromptSet:
    """Draw `n` prompts without replacement, in the order `rng.sample` gives them.

    Raises:
        PromptSetError: There are fewer than `n`.
    """
    if not 0 < n <= len(prompts):
        raise PromptSetError(
            f"{prompts.name} has {len(prompts)} prompts and {n} are needed; give a set that has more, or ask for "
            f"between 1 and {len(prompts)}"
        )
    return prompts._select(rng.sample(range(len(prompts)), n))


def split_for_extraction(
    spec_harmful: str, spec_harmless: str, *, n_train: int, n_val: int, seed: int
) -> ExtractionPrompts:
    """Draw the training and validation prompts of both kinds, in the order of the paper's code.

    Bundled sets have a file for each part. From any other set duplicates are dropped first, then the training
    prompts are drawn, and the validation prompts from those that are left.

    Raises:
        PromptSetError: A set cannot be loaded or has too few prompts, or the two kinds share a prompt.
    """
    harmful = _load_pool(spec_harmful, "harmful", n_train=n_train, n_val=n_val)
    harmless = _load_pool(spec_harmless, "harmless", n_train=n_train, n_val=n_val)
    rng = random.Random(seed)
    harmful_train = sample_prompts(harmful.train, n_train, rng=rng)
    harmless_train = sample_prompts(harmless.train, n_train, rng=rng)
    harmful_validation = sample_prompts(harmful.left_after(harmful_train), n_val, rng=rng)
    harmless_validation = sample_prompts(harmless.left_after(harmless_train), n_val, rng=rng)
    harmless_folds = {fold(text) for text in harmless_train.texts + harmless_validation.texts}
    shared = [t for t in harmful_train.texts + harmful_validation.texts if fold(t) in harmless_folds]
    if shared:
        raise PromptSetError(
            f"{spec_harmful} and {spec_harmless} share {len(shared)} of the prompts drawn, as {shared[0]!r}; "
            "a prompt cannot be harmful and harmless at once: take it out of one of them"
        )
    return ExtractionPrompts(
        harmful_train=harmful_train,
        harmless_train=harmless_train,
        harmful_validation=harmful_validation,
        harmless_validation=harmless_validation,
        notes=harmful.notes + harmless.notes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    train: PromptSet
    validation: PromptSet | None = None
    notes: tuple[str, ...] = ()

    def left_after(self, drawn: PromptSet) -> PromptSet:
        if self.validation is not None:
            return self.validation
        texts = set(drawn.texts)
        return self.train._select(i for i, text in enumerate(self.train.texts) if text not in texts)


def _load_pool(spec: str, kind: Kind, *, n_train: int, n_val: int) -> _Pool:
    if spec == BUNDLED:
        return _Pool(train=_load_bundled(kind, "train"), validation=_load_bundled(kind, "validation"))
    everything = load_prompt_set(spec, kind=kind, part="train")
    first = {fold(text): i for i, text in reversed(list(enumerate(everything.texts)))}
    different = everything._select(sorted(first.values()))
    dropped = len(everything) - len(different)
    note = f"{spec}: {dropped} of {len(everything)} prompts dropped: they repeat another one"
    if len(different) < n_train + n_val:
        raise PromptSetError(
            f"{spec} has {len(different)} different prompts and {n_train + n_val} are needed ({n_train} to train, "
            f"{n_val} to validate); give a set that has more, or lower --n-train or --n-val"
        )
    return _Pool(train=different, notes=(note,) if dropped else ())


# ---------------------------------------------------------------------------------------- the bundled sets


def bundled_prompts_directory() -> Path:
    """Return where the bundled sets lie: inside the installed package, or in the source checkout.

    Raises:
        PromptSetError: They are in neither place.
    """
    package = Path(__file__).resolve().parent
    places = (package / "prompts", package.parents[1] / "prompts")
    for place in places:
        if (place / "harmful" / "train.jsonl").is_file():
            return place
    raise PromptSetError(
        f"the bundled prompts are neither in {places[0]} nor in {places[1]}; reinstall abliterate, or give {_FORMS}"
    )


def bundled_prompt_sets() -> tuple[PromptSetInfo, ...]:
    """Describe every part of the bundled sets."""
    return tuple(describe_prompt_set(_load_bundled(kind, part)) for kind, part in _BUNDLED_SETS)


def find_bundled_problems() -> tuple[str, ...]:
    """Check the bundled sets: counts, categories in every part, repeated ids and duplicates across all parts."""
    problems = []
    first_by_fold: dict[str, str] = {}
    seen_ids: set[str] = set()
    for kind, part in _BUNDLED_SETS:
        prompts = _load_bundled(kind, part)
        problems += _find_part_problems(prompts, kind, part)
        for prompt_id, text in zip(prompts.ids, prompts.texts, strict=True):
            first = first_by_fold.setdefault(fold(text), prompt_id)
            if prompt_id in seen_ids:
                problems.append(f"{prompts.name}: the id {prompt_id} is used twice")
            elif first != prompt_id:
                problems.append(f"{prompts.name}: {prompt_id} repeats {first}: {text!r}")
            seen_ids.add(prompt_id)
    return tuple(problems)


def _find_part_problems(prompts: PromptSet, kind: Kind, part: Part) -> list[str]:
    problems = []
    needed = MINIMUM_BORDERLINE if kind == "borderline" else MINIMUM_COUNTS[part]
    if len(prompts) < needed:
        problems.append(f"{prompts.name}: {len(prompts)} prompts, and at least {needed} are needed")
    categories = set(prompts.categories)
    if len(categories) < MINIMUM_CATEGORIES:
        problems.append(f"{prompts.name}: {len(categories)} categories, at least {MINIMUM_CATEGORIES} are needed")
    if kind != "borderline":
        expected = set(_load_bundled("harmful", "train").categories)
        if categories != expected:
            difference = ", ".join(sorted(categories ^ expected))
            problems.append(f"{prompts.name}: other categories than bundled:harmful/train: {difference}")
    return problems


def describe_prompt_set(prompts: PromptSet) -> PromptSetInfo:
    """Count a set's prompts, words, categories and duplicates."""
    bundled = {f"{BUNDLED}:{kind}/{part}": (kind, part) for kind, part in _BUNDLED_SETS}
    kind, part = bundled.get(prompts.name, (None, None))
    return PromptSetInfo(
        name=prompts.name,
        kind=kind,
        part=part,
        count=len(prompts),
        categories=tuple(sorted(set(prompts.categories) - {""})),
        mean_words=sum(len(text.split()) for text in prompts.texts) / len(prompts),
        duplicates=sum(n - 1 for n in Counter(map(fold, prompts.texts)).values()),
        sha256=prompts.sha256,
    )


def _load_bundled(kind: Kind, part: Part) -> PromptSet:
    if (kind, part) not in _BUNDLED_SETS:
        raise PromptSetError(f"the bundled {kind} set has no {part} part, only a test part")
    table = _read_file(bundled_prompts_directory() / kind / f"{part}.jsonl")
    return _to_prompt_set(f"{BUNDLED}:{kind}/{part}", table, "text")


# ---------------------------------------------------------------------------------------- files and datasets

_FORMS = "`bundled`, a file (" + ", ".join(SUFFIXES) + ") or a Hub dataset ID[@REVISION][:SPLIT[:COLUMN]]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    where: str
    columns: tuple[str, ...]
    text_columns: tuple[str, ...]
    values: Callable[[str], Sequence[object]]
    labels: Sequence[str] = field(default=())


def _to_prompt_set(name: str, table: _Table, column: str | None) -> PromptSet:
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
        texts.append(value)
    numbers = [label.rpartition(" ")[2] for label in table.labels]
    return PromptSet(
        name=name,
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
    return "columns found: " + (", ".join(table.columns) or "none")


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


def _read_file(path: Path) -> _Table:
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            raise PromptSetError(f"{path}: this is a directory; give {_FORMS}")
        if not path.is_file():
            raise PromptSetError(f"{path}: no such file; check the path, or give {_FORMS}")
        if suffix == ".parquet":
            return _read_parquet(path)
        if suffix not in SUFFIXES:
            raise PromptSetError(f"{path}: cannot read {suffix or 'a file without extension'}; give {_FORMS}")
        with path.open(encoding="utf-8-sig", newline="") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise PromptSetError(f"{path}: not UTF-8 (byte {error.start}); convert it, as with `iconv -t UTF-8`") from error
    except OSError as error:
        raise PromptSetError(f"{path}: cannot be read: {error.strerror or error}") from error
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
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[str, object]] = []
    try:
        for row in reader:
            if None in row:
                raise PromptSetError(
                    f"{path}, line {reader.line_num}: more cells than the header names; quote cells that hold commas"
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
    except pyarrow.ArrowException as error:
        raise PromptSetError(f"{path}: not a readable Parquet file ({_one_line(error)})") from error
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
        values=lambda column: list(dataset[column]),
        labels=[f"row {n}" for n in range(1, len(dataset) + 1)],
    )


def _explain(error: Exception, *, repo_id: str, split: str) -> str:
    said = _one_line(error)
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]
