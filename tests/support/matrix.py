"""The document docs/architectures.md: a row for each model type, exact with its writers, or refused and why."""

from tests.support.paths import DOCS

MATRIX = DOCS / "architectures.md"

HEADER = """\
# Which architectures can be orthogonalized

Made by `python -m scripts.architecture_matrix`; do not edit. *Exact* means: a tiny random model of this type
(norms and biases random, float64, saved in shards by transformers {version}) is edited by `abliterate
orthogonalize` and loaded again, and then max |r.h|/|h| is below 1e-6 at the input of every block and of the
final norm, where it was above 1e-3; and each group of edited tensors is needed, that is, restoring it alone
brings the direction back. `*` stands for a number, *through* for norms that stand between the writer and the
residual stream, and `[axis n]` for a residual axis other than 0. For models with images or sound this holds
for text: what their towers put in the place of token embeddings is left as it is.

| model type | | residual writers, or why it is refused |
|---|---|---|
"""


def exact_row(name: str, writers: str) -> str:
    """Return the row of a type (or a variant of one) that was found exact."""
    return f"| {name} | exact | {writers} |"


def refused_row(name: str, reason: str) -> str:
    """Return the row of a type that is refused."""
    return f"| {name} | refused | {reason} |"


def written_rows() -> list[str]:
    """Return the rows of the document as it stands."""
    return [line for line in MATRIX.read_text().splitlines() if " | exact | " in line or " | refused | " in line]
