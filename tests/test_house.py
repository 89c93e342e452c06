"""The floor plan: what a module may import, and how long a file or function may be."""

import ast
import functools
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "optaxclip"
# The folders and modules on each floor; a module imports from its own folder and from
# lower floors only. `xla` stands on `numerics`, and below `norms`. `ring`, which
# detectors and recorders share, needs `norms` and lies below `recording`. The guides
# `trainers` and `tracking` need nothing.
FLOORS = [
    ["checks", "numerics", "tracking", "trainers"],
    ["xla", "extras"],
    ["norms", "packing"],
    ["limits", "ring"],
    ["clipping", "recording"],
    ["explosions"],
    ["reporting"],
]
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)
MODULES += sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")
ALL = [*MODULES, PACKAGE / "__init__.py"]


def part_of(path: Path) -> str:
    """The folder, or the module outside of folders, to which a file belongs."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imported_by(path: Path) -> set[str]:
    """The folders and modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {parts[1] for parts in names if parts[0] == "optaxclip"}
        elif isinstance(node, ast.ImportFrom) and node.module == "optaxclip":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            package, *parts = node.module.split(".")
            if package == "optaxclip":
                found.add(parts[0])
    return found


def test_folders_of_the_tests_are_those_of_the_package():
    of_tests = {path.parent.name for path in PACKAGE.parent.glob("tests/*/test_*.py")}
    of_package = {path.parent.name for path in MODULES if path.parent != PACKAGE}
    # Laws run over the registry, and examples have tests too.
    assert of_tests - {"laws", "examples"} == of_package


def test_every_module_has_a_floor():
    assert {part_of(path) for path in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_from_its_folder_and_from_lower_floors(path):
    own = part_of(path)
    for other in imported_by(path) - {own}:
        assert FLOOR_OF[other] < FLOOR_OF[own], f"{name_of(path)} imports {other}"


def test_there_are_no_more_floors_than_needed():
    """Above the lowest floor, each folder or module needs one on the floor below."""
    for floor, names in enumerate(FLOORS[1:]):
        for name in names:
            files = [path for path in MODULES if part_of(path) == name]
            others = set().union(*map(imported_by, files)) - {name}
            assert max(FLOOR_OF[other] for other in others) == floor, name


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_no_file_has_more_than_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


@functools.cache
def lines_of_code(path: Path) -> set[int]:
    """The lines that hold something other than a comment or a docstring."""
    source = path.read_text()
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= lines_of(node)
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT}
    nothing |= {tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def lines_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or 0) + 1))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_no_function_has_more_than_60_lines_of_code(path):
    """Without those of the functions defined in it, as `init` and `update` are."""
    code = lines_of_code(path)
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            lines = lines_of(function) & code
            for node in ast.walk(function):
                if isinstance(node, ast.FunctionDef) and node is not function:
                    lines -= lines_of(node)
            assert len(lines) <= 60, function.name


def density_of_comments(paths: list[Path]) -> float:
    """Comments per line of code."""
    num_comments = sum(
        token.type == tokenize.COMMENT
        for path in paths
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    )
    return num_comments / sum(len(lines_of_code(path)) for path in paths)


@pytest.mark.parametrize("folder", sorted({path.parent for path in ALL}), ids=name_of)
def test_there_are_comments_in_each_folder(folder):
    """At least one on twenty lines of code; in `reporting` still one on 25."""
    least = 0.04 if folder.name == "reporting" else 0.05
    assert density_of_comments([x for x in ALL if x.parent == folder]) >= least


def test_there_are_comments():
    assert density_of_comments(ALL) >= 0.05
