"""What a user installs, in empty environments: the wheel and the sdist, with the lowest and the newest dependencies.

    nox                                what follows, for each Python that is there
    nox -s wheel                       the built wheel and sdist install, are small, and start fast
    nox -s lowest -- tests/cli         tests with the lowest versions that pyproject.toml allows
    nox -s newest                      tests with the newest versions that the package index has

Needs `pip install nox uv` and a package index. torch is the one that is named in TORCH (default: the pinned one), since
not every machine can have every build of it.
"""

import os
import re
import tempfile
from pathlib import Path

import nox

REPOSITORY = Path(__file__).parent
PYTHONS = ["3.11", "3.12", "3.13"]
TORCH = os.environ.get("TORCH", "2.13.0")
LARGEST_WHEEL = 6_000_000
TESTS = ["-m", "not proof and not demo", "tests/cli", "tests/checkpoints", "tests/editing", "tests/release"]
TOOLS = ["pytest", "hypothesis", "filelock", "jsonschema", "jaxtyping", "scipy", "compressed-tensors"]
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Install what is built, and start it."""
    with tempfile.TemporaryDirectory() as folder:
        session.install("build")
        session.run("python", "-m", "build", "--outdir", folder, str(REPOSITORY), silent=True)
        (built,), (source,) = sorted(Path(folder).glob("*.whl")), sorted(Path(folder).glob("*.tar.gz"))
        if built.stat().st_size > LARGEST_WHEEL:
            session.error(f"{built.name} has {built.stat().st_size} bytes, more than {LARGEST_WHEEL}")
        for package in (built, source):
            session.install("--reinstall-package", "abliterate", f"torch=={TORCH}", str(package))
            session.run("abliterate", "--version")
            session.run("abliterate", "prompts", "--json", silent=True)


@nox.session(python=PYTHONS)
def lowest(session: nox.Session) -> None:
    """Test with the lowest versions that are allowed of what the project names."""
    _test(session, "lowest-direct")


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """Test with the newest versions that can be had."""
    _test(session, "highest")


def _test(session: nox.Session, resolution: str) -> None:
    # What only tests need is pinned: it is the project's own dependencies that vary.
    pinned = dict(re.findall(r"^(\S+)(==.*)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.M))
    tools = [f"{name}{pinned.get(name, '')}" for name in TOOLS]
    session.install("--resolution", resolution, f"torch=={TORCH}", f"{REPOSITORY}[gguf]")
    session.install(*tools)
    session.run("python", "-m", "pytest", "-q", *(session.posargs or TESTS), env={"OMP_NUM_THREADS": "1"})
