"""Long trials of the whole program, bounded in count and time; not part of `make test`.

python -m tests.torture                        all parts: about an hour on two cores
python -m tests.torture kills --seed 3         one part, with other random choices
python -m tests.torture kills --seed 3 --case 17    one case again, its folder kept
"""

import argparse
import importlib
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tests.torture.one_case import run

PARTS = ("kills", "signals", "damage", "disks", "doubled", "restarts", "fuzz", "hostile")


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m tests.torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices (default: 0)")
    parser.add_argument("--case", type=int, nargs="+", metavar="N", help="only these cases, counted from 0")
    parser.add_argument("--jobs", type=int, default=2, help="cases at the same time (default: 2)")
    parser.add_argument("--minutes", type=float, default=30, help="begin no case of a part later (default: 30)")
    parser.add_argument("--out", default="", metavar="FILE", help="write the table there too")
    args = parser.parse_args(argv)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    start, rows, failed = time.monotonic(), [], 0
    for name in args.parts or PARTS:
        passed, failures, left_out, seconds = run_part(name, args)
        failed += len(failures) + left_out
        total = passed + len(failures) + left_out
        note = ", ".join(f"case {number}" for number in sorted(failures))
        note += f"{', ' if note and left_out else ''}{left_out} not begun in time" if left_out else ""
        rows.append(f"| {name} | {passed} of {total} | {seconds / 60:.1f} | {note} |")
        print(rows[-1], flush=True)
    head = ["| part | passed | minutes | failed |", "| --- | --- | --- | --- |"]
    table = "\n".join([*head, *rows, f"\n{(time.monotonic() - start) / 60:.0f} minutes, seed {args.seed}"])
    print(f"\n{table}")
    if args.out:
        Path(args.out).write_text(f"{table}\n")
    return 1 if failed else 0


def run_part(name, args):
    """(cases passed, {number of a failed case: reason}, cases not begun in time, seconds)"""
    part, start = importlib.import_module(f"tests.torture.{name}"), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"torture_{name}_"))
    (folder / "shared").mkdir()
    if hasattr(part, "prepare"):
        part.prepare(folder / "shared")
    numbers = range(part.CASES) if args.case is None else args.case
    passed, failures, left_out = 0, {}, 0
    deadline = start + 60 * args.minutes
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        options = (args.seed, folder, bool(args.case), deadline)
        running = {pool.submit(run, name, number, *options): number for number in numbers}
        for future in as_completed(running):
            number, reason = running[future], future.result()
            if reason is None:
                left_out += 1
            elif reason:
                failures[number] = reason
                command = f"python -m tests.torture {name} --seed {args.seed} --case {number}"
                print(f"{name} {number} failed; to repeat it: {command}\n{reason}", file=sys.stderr, flush=True)
            else:
                passed += 1
    if args.case:
        print(f"{folder} has the files of these cases")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return passed, failures, left_out, time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
