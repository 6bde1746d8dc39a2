"""Two runs for one folder: the second is refused before it writes anything, and the first ends as if it were alone."""

import random
import signal
import time

from tests.torture import trainings
from tests.torture.trainings import check_equal, files, stop_after, train

SECOND = [[], ["--overwrite"], ["--resume", "auto"], ["--overwrite"], ["--resume", "auto"], ["--overwrite"]]
CASES = 10


def prepare(folder):
    trainings.prepare(folder)
    train(folder, folder / "reference_2", folder / "reference_2.log", processes=2).succeeds()


def case(number, seed, folder):
    shared, lines = folder.parent / "shared", random.Random(f"{seed} {number}").randint(1, 25)
    if number < len(SECOND):
        refused(shared, folder, lines, SECOND[number], number)
    else:
        (killed, at_the_same_moment, readers, restarted)[number - len(SECOND)](shared, folder, lines)


def refused(shared, folder, lines, words, number):
    """Cases 3 and 4: the second and the first have two processes; case 5: the folder has another name."""
    out, other_name = folder / "run", folder / "link"
    other_name.symlink_to(out)
    first = train(shared, out, folder / "first.log", processes=2 * (number == 4))
    stop_after(first, out, lines)
    before = files(out)
    second = train(
        shared, other_name if number == 5 else out, folder / "second.log", *words, processes=2 * (number == 3)
    )
    if number == 3:  # torchrun's own exit code, and its report
        assert second.wait() == 1
        assert second.text.count("error: ") == 1 and "trains there; wait for its end or stop it" in second.text
    else:
        second.fails_with("run: process " if number != 5 else "link: process ", "trains there; wait for its end")
    assert files(out) == before, "the second run has changed the folder"
    first.send(signal.SIGCONT)
    first.succeeds()
    check_equal(out, shared / ("reference_2" if number == 4 else "reference"))
    assert not (out / "run.lock").exists()


def killed(shared, folder, lines):
    """A lock does not outlive its process."""
    out = folder / "run"
    first = train(shared, out, folder / "first.log")
    stop_after(first, out, lines)
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert (out / "run.lock").exists()
    train(shared, out, folder / "second.log", "--resume", "auto").succeeds()
    check_equal(out, shared / "reference")


def at_the_same_moment(shared, folder, lines):
    """Of four that start together, one runs."""
    out = folder / "run"
    runs = [train(shared, out, folder / f"{number}.log") for number in range(4)]
    codes = [run.wait() for run in runs]
    assert sorted(codes) == [0, 2, 2, 2], codes
    for run in runs:
        if run.process.returncode:
            run.fails_with(f"{out}: ")
    check_equal(out, shared / "reference")


def readers(shared, folder, lines):
    """What writes no checkpoints works beside a training, and changes nothing of its run."""
    out = folder / "run"
    first = train(shared, out, folder / "first.log", "--log-level", "warning")
    stop_after(first, out, 10 + lines)  # after the first checkpoint
    before = files(out)
    for words in (["--eval-only", "--resume", "auto"], ["--check-data"], ["--preflight"]):
        train(shared, out, folder / f"{words[0]}.log", *words).succeeds()
    after = files(out)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"evaluation", "data_errors.json"}
    first.send(signal.SIGCONT)  # it saves every five steps while two processes read
    train(shared, out, folder / "evaluation.log", "--eval-only", "--resume", "auto", processes=2).succeeds()
    first.succeeds()
    check_equal(out, shared / "reference")


def restarted(shared, folder, lines):
    """A restarted job waits for the process before it to end."""
    out = folder / "run"
    first = train(shared, out, folder / "first.log")
    stop_after(first, out, lines)
    second = train(shared, out, folder / "second.log", "--resume", "auto", TORCHELASTIC_RESTART_COUNT="1")
    time.sleep(12)
    assert second.process.poll() is None, second.text
    first.send(signal.SIGKILL)
    first.wait()
    second.succeeds()
    check_equal(out, shared / "reference")
