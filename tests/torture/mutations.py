"""How many wrong changes of the code do the tests notice? Random single changes, each under the tests that reach it.

python -m tests.torture.mutations --count 200 --seed 0 --minutes 60    prints found, survived and each survivor
python -m tests.torture.mutations --seed 0 --only 17 42 --slow         these changes again, whole programs included
python -m tests.torture.mutations ops losses/multibox.py               only in these folders and files

A change is a comparison, an operator, and for or, a constant plus one, a boolean, a sign or a condition; not in
annotations, decorators, `raise` statements, f-strings, printed text and help. It is written into one token of a copy of
the project, so that line numbers stay. Tests that reach it: those that import the file, directly or not, but `slow`
ones; first the file that mirrors it, then those of the same and of near folders, the fastest first, up to `--seconds`
in all. They must pass on the unchanged copy, which also measures them. Found: a test fails, or hangs. A survivor is a
gap of the tests, or changes nothing that matters: that is for a person to say. Unix only.
"""

import argparse
import ast
import contextlib
import itertools
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torchvision  # noqa: F401  imported once, inherited by the processes that run tests

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("data", "evaluation", "inference", "losses", "models", "ops", "training", "utils")
OPERATORS = {  # as written, and what each becomes
    ast.Lt: ("<", "<=", ">"), ast.LtE: ("<=", "<", ">="), ast.Gt: (">", ">=", "<"), ast.GtE: (">=", ">", "<="),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "/", "*"),
    ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "|"),
}  # fmt: skip
TEXT_CALLS = {"print", "warn", "add_argument", "debug", "info", "warning"}
MEMORY = 6 * 2**30  # bytes that a changed program may ask for
ONE_TEST = 300  # seconds after which a test hangs, also on a busy machine


def changes(path):
    """Every (line, byte in the file, old, new) that the module docstring names, of one file."""
    source = (ROOT / path).read_bytes()
    starts = [0, *(match.end() for match in re.finditer(b"\n", source))]
    found = []

    def place(node, end=False):
        line, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
        return starts[line - 1] + column

    def add(start, old, *news):
        line = source.count(b"\n", 0, start) + 1
        found.extend((line, start, old, new) for new in news)

    def operator(left, kind, right):
        if type(kind) in OPERATORS:
            old, *news = OPERATORS[type(kind)]
            add(source.index(old.encode(), place(left, end=True), place(right)), old, *news)

    def visit(node):
        match node:
            case ast.Raise() | ast.JoinedStr():
                return
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in TEXT_CALLS:
                return
            case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
                return
            case ast.Compare():
                for left, kind, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                    operator(left, kind, right)
            case ast.BoolOp():
                for left, right in zip(node.values, node.values[1:]):
                    operator(left, node.op, right)
            case ast.BinOp():
                operator(node.left, node.op, node.right)
            case ast.AugAssign():
                operator(node.target, node.op, node.value)
            case ast.UnaryOp(op=ast.Not()):
                add(place(node), "not ", "")
            case ast.UnaryOp(op=ast.USub()):
                add(place(node), "-", "")
            case ast.Constant(value=bool()):
                add(place(node), str(node.value), str(not node.value))
            case ast.Constant(value=int() | float()):
                add(place(node), source[place(node) : place(node, end=True)].decode(), repr(node.value + 1))
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                if isinstance(test, ast.Name | ast.Attribute | ast.Call | ast.Subscript):
                    add(place(test), "", "not ")
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child)

    visit(ast.parse(source))
    return found


def tests_that_reach(files):
    """{Python file: the test files that import it, directly or not}."""
    dotted = {file.with_suffix("") if file.stem != "__init__" else file.parent: file for file in files}
    modules, imported = {".".join(name.parts): file for name, file in dotted.items()}, {}
    for file in files:
        names = set()
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):  # of a module, or a module of a package
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        imported[file] = {modules[name] for name in names & modules.keys()}
    tests = {file: set() for file in files}
    for test in (file for file in files if file.name.startswith("test_")):
        queue = [test]
        while queue:
            file = queue.pop()
            if test not in tests[file]:
                tests[file].add(test)
                queue.extend(imported[file])
    return tests


def shared_parts(*paths):
    return len(Path(os.path.commonpath(paths)).parts)


def in_order(file, seconds, limit):
    """The tests of {test: seconds} in the order of the module docstring: the first, and more up to `limit` seconds."""
    folder = Path("tests", file.parent)
    mirrored = folder / f"test_{file.parent.name if file.stem == '__init__' else file.stem}.py"
    tests = sorted(seconds, key=lambda test: (test != mirrored, -shared_parts(test, folder), seconds[test]))
    totals = itertools.accumulate(seconds[test] for test in tests)
    return tests[:1] + [test for test, total in zip(tests, totals) if total <= limit and test != tests[0]]


class TimeLimit:
    """A pytest plugin that ends the process if a test hangs."""

    def pytest_runtest_logstart(self):
        signal.alarm(ONE_TEST)


def start(folder, tests, marks):
    """The process id of a child that runs test files in `folder`, one after the other, up to the first failure.

    It is forked from this process, which has imported torch and pytest but nothing of the project but this file. What
    the tests print is in the file FOLDER.log.
    """
    sys.stdout.flush()
    if child := os.fork():
        return child
    try:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"  # none of a changed file stays
        sys.path[0] = str(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]  # this file's package, which is not the one in `folder`
        for test in tests:
            signal.alarm(ONE_TEST)
            words = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}.pytest", "-m", marks, str(test)]
            code = pytest.main(words, plugins=[TimeLimit()])
            if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                os._exit(1)
        os._exit(0)
    finally:
        os._exit(1)


def run_all(jobs, folders, begin, end, deadline=math.inf):
    """begin(job, folder) -> process id; end(job, folder, status, CPU seconds) when it has ended. One job a folder."""
    jobs, free, running = list(jobs)[::-1], list(folders), {}
    while True:
        while jobs and free and time.monotonic() < deadline:
            job, folder = jobs.pop(), free.pop()
            running[begin(job, folder)] = job, folder
        if not running:
            return
        child, status, usage = os.wait4(-1, 0)
        job, folder = running.pop(child)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests have started and left
        free.append(folder)
        end(job, folder, status, usage.ru_utime + usage.ru_stime)


def copy_project(files, work, number):
    """Copies of the project's `files`, compiled, in the folder `work`: the original, and `number` that are changed."""
    original = work / "original"
    for file in files:
        (original / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, original / file)
    subprocess.run([sys.executable, "-m", "compileall", "-q", original], check=True)
    return original, [shutil.copytree(original, work / f"copy{job}") for job in range(number)]


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m tests.torture.mutations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", default=ROOMS, help=f"folders and files; default: {', '.join(ROOMS)}")
    parser.add_argument("--count", type=int, default=200, help="number of changes (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their choice (default: 0)")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="of these, the changes with these numbers")
    parser.add_argument("--slow", action="store_true", help="run the slow tests too, which train networks")
    parser.add_argument("--seconds", type=float, default=60, help="CPU time of the tests for one change (default: 60)")
    parser.add_argument("--minutes", type=float, default=60, help="begin no change later (default: 60)")
    parser.add_argument("--jobs", type=int, default=2, help="changes at the same time (default: 2)")
    args = parser.parse_args(argv)
    begun, marks = time.monotonic(), "not gpu and not realdata" + ("" if args.slow else " and not slow")
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, text=True)
    files = [Path(name) for name in names.split("\0") if name and (ROOT / name).is_file()]
    python = sorted(file for file in files if file.suffix == ".py")
    possible = [
        (file, *change) for file in python if any(map(file.is_relative_to, args.paths)) for change in changes(file)
    ]
    sample = random.Random(args.seed).sample(possible, min(args.count, len(possible)))
    chosen = {number: sample[number] for number in (range(len(sample)) if args.only is None else args.only)}
    reached_by, seconds, outcomes = tests_that_reach(python), {}, {"found": [], "hangs": [], "survived": []}

    def measured(test, folder, status, used):
        if status == 0:
            seconds[test] = used
        else:
            print(f"left out, fails without a change: {test}\n{Path(f'{folder}.log').read_text()[-1500:]}", flush=True)

    def change(number, folder):
        file, _, position, old, new = chosen[number]
        source = (original / file).read_bytes()
        (folder / file).write_bytes(source[:position] + new.encode() + source[position + len(old) :])
        tests = {test: seconds[test] for test in reached_by[file] & seconds.keys()}
        return start(folder, in_order(file, tests, args.seconds), marks)

    def changed(number, folder, status, used):
        file, line, _, old, new = chosen[number]
        shutil.copy2(original / file, folder / file)
        text = f"{number:4}  {file}:{line}  {old.strip() or 'condition'} -> {new.strip() or 'nothing'}"
        outcome = "survived" if status == 0 else "hangs" if os.WIFSIGNALED(status) else "found"
        outcomes[outcome].append(text)
        print(f"{outcome:8} {used:4.0f} s {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutations_", ignore_cleanup_errors=True) as work:
        original, folders = copy_project(files, Path(work), args.jobs)
        tests = sorted(set().union(*(reached_by[file] for file, *_ in chosen.values())))
        run_all(tests, folders, lambda test, folder: start(folder, [test], marks), measured)
        total = f"{len(seconds)} test files of {sum(seconds.values()):.0f} s"
        print(f"{total}, {len(chosen)} of {len(possible)} possible changes", flush=True)
        run_all(chosen, folders, change, changed, begun + 60 * args.minutes)
    print("\nsurvived:", *sorted(outcomes["survived"]), sep="\n")
    counts = {name: len(texts) for name, texts in outcomes.items()}
    untried = len(chosen) - sum(counts.values())
    print(f"\nseed {args.seed}: {', '.join(f'{n} {name}' for name, n in counts.items())}, {untried} not tried in time")


if __name__ == "__main__":
    main()
