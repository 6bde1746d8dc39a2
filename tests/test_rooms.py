"""Who may import whom, where the GPU may be named, and that the project knows nothing of the machine it was made on."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # our packages, and which of ours each may import beside itself
    "utils": set(),
    "ops": {"utils"},
    "training": {"utils"},
    "visualize": {"ops", "utils"},
    "models": {"ops", "utils"},
    "losses": {"ops", "utils"},
    "data": {"ops", "utils"},
    "evaluation": {"ops", "utils"},
    "inference": {"data", "models", "ops", "utils"},
    "synthetic": {"data", "utils"},
}
CALLERS = ("tests", "benchmarks")
SKIPPED = {".venv", ".git", "runs", "__pycache__", ".pytest_cache", ".ruff_cache"}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
TEXT = (".py", ".md", ".toml", ".txt", ".sh", ".yml", "Makefile", "run", ".gitignore")


def files():
    """Every text file of the project."""
    paths = [path for path in ROOT.rglob("*") if path.is_file() and path.name.endswith(TEXT)]
    return [path for path in paths if not SKIPPED & set(path.relative_to(ROOT).parts)]


def room(path):
    """The package a file lies in; "" for a script."""
    return path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""


def imports(path):
    """First part of every name that a file imports, anywhere in it; relative imports are the file's own package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0] if not node.level else room(path))
    return names


PYTHON = [path for path in files() if path.suffix == ".py"]


def test_the_walk_sees_the_project():
    assert {room(path) for path in PYTHON} >= {"", *MAY_IMPORT, *CALLERS}
    assert "train_ssd" in SCRIPTS
    assert imports(ROOT / "data/transforms.py") >= {"torch", "torchvision", "data", "ops"}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_they_may(package):
    ours = {*MAY_IMPORT, *CALLERS, *SCRIPTS}
    for path in (path for path in PYTHON if room(path) == package):
        extra = imports(path) & ours - {package} - MAY_IMPORT[package]
        assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def test_nothing_imports_a_script_but_tests_and_benchmarks():
    for path in PYTHON:
        if room(path) not in CALLERS:
            used = imports(path) & (SCRIPTS | set(CALLERS))
            assert not used, f"{path.relative_to(ROOT)} imports {used}"


def test_the_gpu_is_named_in_two_files():
    naming = {
        str(path.relative_to(ROOT))
        for path in PYTHON
        if room(path) not in CALLERS and any(name in path.read_text() for name in ("torch.cuda", ".cuda("))
    }
    assert naming == {"training/distributed.py", "training/memory.py"}


def test_no_file_names_the_machine_it_was_made_on():
    private = ["/" + "work/", "/tmp" + "/spec", "/tmp" + "/v211", "FIELD" + "_NOTES", "/ro" + "ot/", "/ho" + "me/"]
    for path in files():
        text = path.read_text()
        named = [name for name in private if name in text]
        assert not named, f"{path.relative_to(ROOT)} names {named}"


def test_data_knows_no_anchor_and_no_prior():
    for path in (path for path in PYTHON if room(path) == "data"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not {name for name in names if "anchor" in name.lower() or "prior" in name.lower()}, path
