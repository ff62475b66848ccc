import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from abliterate import prompt_files
from abliterate.errors import PromptSetError
from abliterate.prompt_files import Prompts, read_prompts
from tests.support.fake_hub import READ_TOKEN, FakeHub
from tests.support.paths import SOURCES


def read(spec: str | Path) -> Prompts:
    return read_prompts(str(spec))


def failure(spec: str | Path) -> str:
    with pytest.raises(PromptSetError) as caught:
        read(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


def make_file(directory: Path, suffix: str, rows: list[dict[str, object]]) -> Path:
    path = directory / f"prompts{suffix}"
    if suffix == ".jsonl":
        write_lines(path, [json.dumps(row) for row in rows])
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(dict.fromkeys(k for row in rows for k in row)))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_tables_give_texts_ids_and_categories(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"id": "a", "category": "x", "note": "n", "text": 'One, "two"\nand three é'},
        {"id": "b", "category": "y", "note": "n", "text": "Four"},
    ]
    path = make_file(tmp_path, suffix, rows)
    prompts = read(path)
    assert prompts.texts == ('One, "two"\nand three é', "Four")
    assert (prompts.ids, prompts.categories) == (("a", "b"), ("x", "y"))
    assert read(f"{path}:note").texts == ("n", "n")
    assert failure(f"{path}:prompts") == f"{path}: no column 'prompts'; columns found: id, category, note, text"


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_the_default_column(tmp_path: Path, suffix: str) -> None:
    path = make_file(tmp_path, suffix, [{"answer": "no", "question": "q?", "goal": "g", "Prompt": "p"}])
    assert read(path).texts == ("p",)
    path = make_file(tmp_path, suffix, [{"Behavior": "b", "tag": "t"}])
    assert read(path).texts == ("b",)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_the_only_text_column_is_taken_and_several_are_not(tmp_path: Path, suffix: str) -> None:
    assert read(make_file(tmp_path, suffix, [{"number": 1, "wish": "A pony."}])).texts == ("A pony.",)
    path = make_file(tmp_path, suffix, [{"wish": "A pony.", "reply": "No."}])
    assert failure(path) == (
        f"{path}: cannot tell which column holds the prompts; columns found: wish, reply; name one as SPEC:COLUMN"
    )


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
@pytest.mark.parametrize("blank", [None, "", "  "])
def test_an_empty_cell_is_named(tmp_path: Path, suffix: str, blank: str | None) -> None:
    path = make_file(tmp_path, suffix, [{"text": "One.", "tag": "a"}, {"text": blank, "tag": "b"}])
    label = {".jsonl": "line 2", ".json": "item 2", ".csv": "line 3", ".parquet": "row 2"}[suffix]
    assert failure(path).startswith(f"{path}, {label}: column 'text' is empty; columns found: text, tag; ")


def test_a_row_without_the_column_and_one_with_a_number(tmp_path: Path) -> None:
    path = Path(write_lines(tmp_path / "a.jsonl", ['{"text": "One."}', "", '{"prompt": "Two."}']))
    assert failure(path).startswith(f"{path}, line 3: column 'text' is empty; columns found: text, prompt")
    write_lines(path, ['{"text": 7}'])
    assert failure(path) == f"{path}, line 1: column 'text' holds a int and no text; columns found: text"


def test_text_files_give_a_prompt_a_line_and_skip_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes("\ufeff One. \r\n\r\n\t\nTwo\u2028still two.\n".encode())
    prompts = read(path)
    assert prompts.texts == ("One.", "Two\u2028still two.")
    assert prompts.ids == ("1", "4")
    assert prompts.categories == ("", "")


def test_strings_in_json_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('["One.", {"text": "Two.", "id": 5}]')
    assert read(tmp_path / "a.json").texts == ("One.", "Two.")
    assert read(tmp_path / "a.json").ids == ("1", "5")
    write_lines(tmp_path / "a.jsonl", ['"One\u2028line."', '"Two."'])
    assert read(tmp_path / "a.jsonl").texts == ("One\u2028line.", "Two.")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_an_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text({".json": "[]", ".csv": "text\n"}.get(suffix, "\n \n"))
    assert failure(path) == f"{path}: there are no prompts in it"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_cells_stand_between_what_divides_the_header(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(delimiter.join(["prompt", "category"]) + f'\n"One{delimiter} two."{delimiter}x\n')
    assert read_prompts(str(path)) == Prompts(texts=(f"One{delimiter} two.",), ids=("2",), categories=("x",))
    path.write_text("text\nOne; two | three.\n")
    assert read_prompts(str(path)).texts == ("One; two | three.",)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_the_marks_of_files_that_were_joined_are_no_part_of_a_prompt(tmp_path: Path, suffix: str) -> None:
    lines = {
        ".txt": ["One.", "Two."],
        ".jsonl": ['{"text": "One."}', '{"text": "Two."}'],
        ".csv": ["text", "One.", "Two."],
    }
    path = tmp_path / f"a{suffix}"
    path.write_text("\ufeff" + "\n\ufeff".join(lines[suffix]), encoding="utf-8")
    assert read_prompts(str(path)).texts == ("One.", "Two.")


@pytest.mark.parametrize(("name", "where"), [("a.jsonl", "line 2"), ("a.json", "item 2")])
def test_half_a_surrogate_pair_is_named_with_its_line(tmp_path: Path, name: str, where: str) -> None:
    lines = ['{"text": "One."}', '{"text": "Two \\ud83d"}']
    (tmp_path / name).write_text("\n".join(lines) if name == "a.jsonl" else f"[{','.join(lines)}]")
    assert failure(tmp_path / name).startswith(
        f"{tmp_path / name}, {where}: column 'text' holds half of a surrogate pair"
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "One."}\n{"text": \n', ", line 2: broken JSON (Expecting value"),
        ("a.jsonl", b"[1]\n", ", line 1: a string or an object is needed, found a list"),
        ("a.json", b'[\n"One.",\n}', ", line 3: broken JSON (Expecting value)"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "broken JSON (Extra data); name it .jsonl if it has an object"),
        ("a.json", b"[" * 200_000, ": broken JSON (maximum recursion depth"),
        ("a.json", b'{"text": ["One."]}', ": a list of strings or objects is needed, found a dict"),
        ("a.json", b'["One.", 2]', ", item 2: a string or an object is needed, found a int"),
        ("a.csv", b"text,tag\nOne, two,a\n", ", line 2: more cells than the header names; quote cells that hold"),
        ("a.csv", b'text\n"One" two\n', ", line 2: broken CSV ("),
        ("a.csv", b"Tell me a story.\nSing a song.\n", ": the first line, 'Tell me a story.', seems to be a prompt"),
        ("a.txt", "Café".encode("latin-1"), ": not UTF-8 (byte 3); convert it"),
        ("a.csv", "text\nCafé\n".encode("utf-16"), ": not UTF-8 (byte 0); convert it"),
        ("a.parquet", b"PAR1 and no more", ": not a readable Parquet file ("),
        ("a.md", b"One.", ": cannot read .md; give `bundled`, a file (.txt, .jsonl, .json, .csv, .parquet) or"),
        ("prompts", b"One.", ": cannot read a file without extension; give `bundled`"),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = failure(tmp_path / name)
    assert message.startswith(str(tmp_path / name))
    assert expected in message


def test_a_directory_and_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert failure(tmp_path).startswith(f"{tmp_path}: this is a directory; give `bundled`, a file")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    path = write_lines(tmp_path / "a.txt", ["One."])
    monkeypatch.setattr(Path, "open", refuse)
    assert failure(path) == f"{path}: cannot be read: Permission denied"


@pytest.mark.parametrize(
    "spec", ["./x.txt", "x.csv", "x.csv:goal", "/no/such/x.parquet", "../x", "~/no-such-x", "a/b/c", "org/"]
)
def test_a_path_that_is_not_there_is_not_sought_on_the_hub(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "_read_dataset", lambda *_, **__: pytest.fail("went to the Hub"))
    message = failure(spec)
    assert "no such file; check the path, or give `bundled`, a file" in message


@pytest.mark.parametrize("spec", ["", "  ", ":train", "org/name:train[:1", "a@b@c:", "x" * 5000 + ".txt"])
def test_a_spec_that_names_nothing(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "_read_dataset", lambda repo_id, **_: pytest.fail(f"went to the Hub: {repo_id}"))
    assert failure(spec)


# ------------------------------------------------------------------------------------ datasets on the Hub

LOADER = """
import json, sys, time
time.sleep = lambda seconds: None  # between the client's retries
from abliterate.errors import PromptSetError
from abliterate.prompt_files import read_prompts
for spec in sys.argv[1:]:
    try:
        prompts = read_prompts(spec)
        result = {"texts": prompts.texts, "ids": prompts.ids}
    except PromptSetError as error:
        result = str(error)
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        files = {"train.csv": b"id,goal,reply\n7,One?,no\n8,Two?,no\n", "test.csv": b"id,goal,reply\n9,Three?,no\n"}
        older = {"v1": {"train.csv": b"id,goal\n1,First?\n"}}
        server.add_repo("org/goals", files, repo_type="dataset", revisions=older)
        server.add_repo("org/pairs", {"train.csv": b"wish,reply\na,b\n"}, repo_type="dataset")
        server.add_repo("org/gated", {"train.csv": b"goal\nOne?\n"}, repo_type="dataset", gated=True)
        server.add_repo("org/broken", {"train.json": b"{no json"}, repo_type="dataset")
        server.add_repo("org/none", {"README.md": b"nothing"}, repo_type="dataset")
        card = b"---\nconfigs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv\n---\n"
        configs = {"README.md": card, "a.csv": b"text\nA\n", "b.csv": b"text\nB\n"}
        server.add_repo("org/configs", configs, repo_type="dataset")
        yield server


def run_loader(variables: dict[str, str], directory: Path, *specs: str) -> list[dict[str, list[str]] | str]:
    """Load in a process of its own: `datasets` reads HF_ENDPOINT when it is imported."""
    path = os.pathsep.join([str(SOURCES), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *specs],
        env={**os.environ, **variables, "PYTHONPATH": path, "HF_DATASETS_CACHE": str(directory / "datasets")},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_datasets_by_id_revision_split_and_column(hub: FakeHub, tmp_path: Path) -> None:
    specs = ("org/goals", "org/goals:test", "org/goals@v1", "org/goals@main:train[:1]:reply")
    found = run_loader(hub.environment(tmp_path, token=READ_TOKEN), tmp_path, *specs)
    assert [result["texts"] for result in found] == [["One?", "Two?"], ["Three?"], ["First?"], ["no"]]
    assert [result["ids"] for result in found] == [["7", "8"], ["9"], ["1"], ["7"]]


def test_datasets_that_cannot_be_used(hub: FakeHub, tmp_path: Path) -> None:
    expected = {
        "org/goals:dev": "org/goals: no split 'dev'; splits found: 'train', 'test'; name one as org/goals:SPLIT",
        "org/goals:test:prompt": "org/goals, split test: no column 'prompt'; columns found: id, goal, reply",
        "org/goals@v9": "org/goals: no such file here, and on the Hub: Revision 'v9' doesn't exist",
        "org/absent": "org/absent: no such file here, and on the Hub: Dataset 'org/absent' doesn't exist",
        "org/pairs": "org/pairs, split train: cannot tell which column holds the prompts; columns found: wish, reply",
        "org/gated": "org/gated: this dataset is gated; accept its conditions on its Hub page, then run `hf auth",
        "org/configs": "org/configs: it has several configurations, ['a', 'b'], and a SPEC cannot name one",
        "org/none": "org/none: no such file here, and on the Hub: The directory at hf://datasets/org/none@",
        "org/broken": "org/broken: `datasets` cannot load it (DatasetGenerationError): An error occurred while",
        "a b": "a b: `datasets` cannot load it (HFValidationError): Repo id must use alphanumeric chars",
    }
    found = run_loader(hub.environment(tmp_path, token=READ_TOKEN), tmp_path, *expected)
    for message, start in zip(found, expected.values(), strict=True):
        assert isinstance(message, str)
        assert message.startswith(start)
        assert "\n" not in message


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_hub_that_cannot_be_reached(hub: FakeHub, tmp_path: Path, variables: dict[str, str]) -> None:
    [message] = run_loader(hub.environment(tmp_path) | variables, tmp_path, "org/goals")
    assert message.startswith("org/goals: Couldn't reach 'org/goals' on the Hub (")
    assert message.endswith("); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or give a file")


def strings_that_are_no_text():
    """A column of Arrow's strings, one of which is not UTF-8."""
    import pyarrow

    data = pyarrow.py_buffer(b"How do locks work?\x87\xff")
    offsets = pyarrow.py_buffer(np.array([0, 18, 20], dtype=np.int32).tobytes())
    return pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, data])})


def test_strings_that_are_no_text_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow.parquet

    table = strings_that_are_no_text()
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(PromptSetError, match=r"a\.parquet: not a readable Parquet file \(.*[Uu][Tt][Ff]-?8"):
        read_prompts(str(path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_a, **_o: datasets.Dataset(table))
    with pytest.raises(PromptSetError, match="org/name: the column text cannot be read"):
        read_prompts("org/name")
