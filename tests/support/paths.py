"""Where the repository lies, and what of it the tests read."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SOURCES = REPOSITORY / "src"
DOCS = REPOSITORY / "docs"
GOLDEN = REPOSITORY / "tests" / "golden"
TRAINING = REPOSITORY / "training"
