"""Inspect pairs of tiny models of which it is known what was done, and write the table of docs/inspection.md.

python -m scripts.inspection_table
"""

import sys
import tempfile
from pathlib import Path

from tests.support.changed_models import BEGIN, CASES, END, PAGE, cells, inspect_case, table


def main() -> None:
    """Inspect all pairs, and write the table."""
    import torch

    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as work:
            rows.append(cells(case, inspect_case(case, Path(work))))
        print(rows[-1], file=sys.stderr)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
