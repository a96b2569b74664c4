"""The house rules that a reader relies on, held by reading the source."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "relora": set(),
    "parallel": {"relora"},
    "continual": {"relora"},
    "launch": {"relora", "parallel", "continual"},
}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
TOP_LEVEL = {"benchmarks", "conf", "continual", "docs", "launch", "parallel", "relora", "tests"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imported(path)} & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[package] | {package}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_come_from_this_tree(package):
    assert Path(importlib.import_module(package).__file__).is_relative_to(ROOT)


def test_deepspeed_is_imported_in_one_place():
    users = [path.name for path in SOURCES if any(name.split(".")[0] == "deepspeed" for name in imported(path))]
    assert users == ["engine.py"]


def test_the_loop_and_most_functions_are_short_and_files_hold_one_idea():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                most = 120 if any("jit" in ast.unparse(one) for one in node.decorator_list) else 60  # a kernel
                assert node.end_lineno - node.lineno < most, f"{path}: {node.name}"


def test_no_module_hides_another_library_or_is_a_drawer_for_everything():
    for path in SOURCES:
        assert path.stem not in {"utils", "helpers", "common", "logging", "deepspeed", "wandb", "random", "types"}


def test_the_top_level_stays_as_it_was_agreed():
    visible = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))}
    assert visible - {"runs", "outputs", "wandb", "build", "dist", "accrete.egg-info"} == TOP_LEVEL


def test_tests_never_shadow_the_packages_they_test():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not {path.name for path in (ROOT / "tests").iterdir()} & set(MAY_IMPORT)
