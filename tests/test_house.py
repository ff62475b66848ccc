"""The measures of the house: few packages, modules that a reader can hold in mind, and a test for each of them."""

import ast
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY, SOURCES

HOUSE = SOURCES / "abliterate"
TESTS = REPOSITORY / "tests"
PACKAGES = sorted(path.parent for path in HOUSE.glob("*/__init__.py"))
MODULES = [module for package in PACKAGES for module in sorted(package.glob("*.py")) if module.stem != "__init__"]
# Values without behaviour: what they hold is tested where it is made.
PLAIN_VALUES = {"options", "report", "audit_report", "trace_report"}


def name_of(module: Path) -> str:
    return f"{module.parent.name}.{module.stem}"


def imported_by(test: Path) -> set[str]:
    """Return the modules that a test imports, as `package.module`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(test.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("abliterate.") for name in names if name.startswith("abliterate.")}


def test_there_are_at_most_twelve_packages_and_nine_modules_beside_them():
    assert 1 < len(PACKAGES) <= 12
    # `__main__` is a door, not a room.
    assert len([path for path in HOUSE.glob("*.py") if path.stem not in {"__init__", "__main__"}]) <= 9


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_package_has_at_most_sixteen_modules(package):
    assert len([module for module in MODULES if module.parent == package]) <= 16


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_a_module_says_what_it_is_and_is_under_550_lines(module):
    text = module.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{name_of(module)} has no docstring"
    assert len(text.splitlines()) < 550, f"{name_of(module)}: divide it into two concepts"


@pytest.mark.parametrize("module", [module for module in MODULES if module.stem not in PLAIN_VALUES], ids=name_of)
def test_a_module_has_a_test_beside_those_of_its_package(module):
    tests = TESTS / module.parent.name
    if (tests / f"test_{module.stem}.py").is_file():
        return
    named = set().union(*(imported_by(test) for test in sorted(tests.glob("test_*.py"))))
    assert name_of(module) in named, f"write tests/{module.parent.name}/test_{module.stem}.py"
