"""The docs: links resolve, commands parse, and the README stays short."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import synthetic
from benchmarks import __main__ as benchmarks

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "configs").glob("*.toml"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(
    r"(?:python|torchrun [^`]*?) ((?:train_\w+|predict|export)\.py [^`\n]*|-m (?:synthetic|benchmarks)[^`\n]*)"
)
SCRIPTS = sorted(ROOT.glob("*.py"))
PARSERS = {"synthetic": synthetic.parse_args, "benchmarks": benchmarks.parse_all}


def lines_of(text):
    """The lines of a text, those that end with a backslash joined with the next."""
    return re.sub(r"\\\n\s*", "", text).splitlines()


def commands(text):
    """Command lines of this project in a text; not those with placeholders, and not those of other programs."""
    lines = [line.removeprefix("$").lstrip("# ").strip() for line in lines_of(text.replace(".venv/bin/", ""))]
    return [words for line in lines for words in COMMAND.findall(line) if "..." not in words and "LAYOUT" not in words]


def anchors(page):
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_resolve(page):
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", [*PAGES, *RECIPES, *SCRIPTS, ROOT / "Makefile"], ids=lambda page: page.name)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named relative to it
    text = page.read_text().replace("$(BIN)/", "")
    if page in SCRIPTS:
        text = ast.get_docstring(ast.parse(text))
        assert commands(text)
    for words in commands(text):
        script, *argv = shlex.split(words.removeprefix("-m "), comments=True)
        parse = PARSERS.get(script) or importlib.import_module(script.removesuffix(".py")).parse_args
        if argv not in ([], ["--help"]):
            parse(argv)


def test_the_commands_are_seen():
    readme = commands((ROOT / "README.md").read_text())
    scripts = {words.removeprefix("-m ").split()[0] for words in readme}
    assert scripts >= {"train_backbone.py", "train_retinanet.py", "train_ssd.py", "train_maskrcnn.py", "predict.py"}
    assert scripts >= {"train_centerfusion.py", "synthetic"}


def test_commands_for_several_machines_are_seen():
    assert commands('srun torchrun --rdzv-id "$ID" \\\n    train_ssd.py --data d \\\n  --lr 1\nls') == [
        "train_ssd.py --data d --lr 1"
    ]
    assert commands("docker run --rm image \\\n  python train_ssd.py --lr 1") == ["train_ssd.py --lr 1"]
    lines = lines_of((ROOT / "docs" / "training.md").read_text())
    for start in ("srun torchrun ", "torchrun --nnodes ", "docker run "):
        found = [words for line in lines if line.startswith(start) for words in commands(line)]
        assert found and all("--resume auto" in words for words in found), start


@pytest.mark.parametrize("page", [*PAGES, *RECIPES, *SCRIPTS], ids=lambda page: page.name)
def test_torchrun_accepts_its_flags(page):
    for line in lines_of(page.read_text()):
        for words in re.findall(r"torchrun (--[^`]*?train_\w+\.py)", line):
            args = get_args_parser().parse_args(shlex.split(words))  # an unknown flag ends the test
            assert (ROOT / args.training_script).is_file()


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is not installed")
def test_shell_scripts_have_no_syntax_errors():
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_images_are_small():
    images = list((ROOT / "docs" / "images").iterdir())
    assert images
    assert sum(image.stat().st_size for image in images) < 1.5e6
