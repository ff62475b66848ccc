"""The tables of formats in docs/quantisation.md and docs/editing.md are what a tiny model in each of them shows."""

import pytest

from tests.support.format_table import (
    GGUF,
    NAMES,
    PAGE,
    SAFETENSORS,
    SHORT_PAGE,
    FormatRow,
    cells,
    measure,
    short_table,
    written,
)

OFTEN = {"block", "int4 groups with zeros", "gptq", "modelopt fp8", "GGUF Q4_K", "GGUF Q8_0"}
PROOF = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.proof) for name in NAMES]


@pytest.mark.parametrize("name", PROOF)
def test_a_format_is_what_its_row_says(tmp_path, name):
    row = measure(name, tmp_path)
    assert cells(row) in written(PAGE).splitlines(), "run `python -m scripts.format_table`"
    # The limits of what may be left: half a percent at eight bits and more, five percent below.
    assert row.left < (0.005 if row.bits >= 8 else 0.05)
    assert row.left <= row.plain


def test_both_tables_have_all_formats_and_readme_says_what_the_page_says():
    names = [*(label for label, _ in SAFETENSORS.values()), *(f"GGUF {kind}" for kind in GGUF)]
    rows = [row.strip("| ").split(" | ") for row in written(PAGE).splitlines()[2:]]
    assert [row[0] for row in rows] == names
    found = [
        FormatRow(name=name, bits=int(bits), runs=runs == "yes", verified=verified == "yes", left=0.0, plain=0.0)
        for name, bits, _, runs, verified, _ in rows
    ]
    assert short_table(found) == written(SHORT_PAGE)
