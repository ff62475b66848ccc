"""The pins of constraints.txt: all of what the project names, exactly, within its bounds, and what the tests run with.

A list of known faults cannot be asked for here, where only the package index is reached. What is held instead: one
exact version each, and lower bounds that keep out the faults that this project would be open to.
"""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.paths import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = {
    re.sub(r"[-_.]+", "-", name).lower(): found
    for name, found in re.findall(r"(?m)^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text())
}
EXTRAS = [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
NAMED = [Requirement(text) for text in [*PROJECT["dependencies"], *EXTRAS]]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_line_is_an_exact_pin():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if line and line[0] != "#" and not re.fullmatch(r"[\w.-]+==\S+", line)] == []


def test_all_that_the_project_names_is_pinned_within_its_bounds():
    for wanted in NAMED:
        assert Version(PINS[plain(wanted.name)]) in wanted.specifier, wanted


def test_what_is_installed_is_what_is_pinned():
    for name, pinned in PINS.items():
        try:
            installed = version(name)
        except PackageNotFoundError:  # of an extra that is not installed
            continue
        assert Version(installed).public == Version(pinned).public, name


def test_lower_bounds_keep_known_faults_out():
    lowest = {plain(each.name): each.specifier for each in NAMED}
    # torch.load(weights_only=True) ran code before 2.6 (CVE-2025-32434). It is not called here; peft and others may.
    assert Version("2.5.1") not in lowest["torch"]
    # Chat templates got out of the sandbox before Jinja2 3.1.6 (CVE-2025-27516); this transformers refuses older ones.
    assert Version(PINS["jinja2"]) >= Version("3.1.6")
    # yaml.load ran code by default before 5.4 (CVE-2020-14343). It is not called here: safe_load is.
    assert Version("5.3") not in lowest["pyyaml"]
