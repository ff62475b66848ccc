"""Edit a tiny model in each quantised format and write the tables of docs/quantisation.md and docs/editing.md.

python -m scripts.format_table
"""

import sys
import tempfile
from pathlib import Path

from tests.support.format_table import NAMES, PAGE, SHORT_PAGE, measure, short_table, table, with_table


def main() -> None:
    """Measure all formats, and write the tables."""
    import torch

    torch.set_num_threads(1)
    rows = []
    for name in NAMES:
        with tempfile.TemporaryDirectory() as work:
            rows.append(measure(name, Path(work)))
        print(rows[-1], file=sys.stderr)
    for path, made in ((PAGE, table(rows)), (SHORT_PAGE, short_table(rows))):
        path.write_text(with_table(path.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
