"""The shape of the code is held: small files, short functions, thin devices."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "federation", "edge_agent", "cloud", "twin", "optimizer", "moe_serving", "simulations",
)  # fmt: skip

FILE_LINES, TEST_FILE_LINES, FUNCTION_LINES = 400, 500, 60


def _sources(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def test_no_source_file_is_longer_than_it_can_be_read() -> None:
    """A module has at most 400 lines, a test module 500."""
    long = {
        str(file.relative_to(ROOT)): lines
        for file in _sources(*PACKAGES, "benchmarks", "tests")
        if (lines := len(file.read_text().splitlines()))
        > (TEST_FILE_LINES if "tests" in file.parts else FILE_LINES)
    }

    assert not long


def test_no_function_is_longer_than_a_screen() -> None:
    """A function has at most 60 lines, its docstring not counted."""
    long = [
        f"{file.relative_to(ROOT)}:{function.lineno} {function.name}: {lines} lines"
        for file in _sources(*PACKAGES, "benchmarks", "tests")
        for function in _functions(file)
        if (lines := _lines(function)) > FUNCTION_LINES
    ]

    assert not long


def test_no_module_has_a_name_that_refuses_nothing() -> None:
    """No module is called after no job: utils, common, helpers, base or manager."""
    shunned = {"util", "utils", "common", "helper", "helpers", "base", "manager", "misc"}

    assert not [file for file in _sources(*PACKAGES) if file.stem in shunned]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("edge_agent.runner", {"torch", "numpy", "sqlalchemy", "rich", "typer", "onnxruntime"}),
        ("edge_agent.inference", {"torch", "sqlalchemy", "rich", "typer"}),
        ("cloud.coordination.coordinator", {"torch", "paho", "sqlalchemy", "fastapi", "pyomo"}),
        ("federation", {"numpy", "msgspec"}),
    ],
)
def test_importing_a_part_loads_only_what_it_needs(module: str, absent: set[str]) -> None:
    """An agent starts without numpy and torch, a predictor without torch, and so on."""
    code = f"import sys, {module}; print(*sorted({absent!r} & sys.modules.keys()))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()

    assert loaded == []


def _functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    docstring = ast.get_docstring(function, clean=False) is not None
    spoken = (first.end_lineno or first.lineno) - first.lineno + 1 if docstring else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - spoken
