"""Steps timed against each other within one run."""

import time

from training import devices


def seconds(run, work, *arguments):
    devices.synchronize(run.device)
    begun = time.perf_counter()
    work(*arguments)
    devices.synchronize(run.device)
    return time.perf_counter() - begun


def quickest(run, works, rounds, budget=60):
    """Seconds of the quickest call of each of `works` (functions of the round), taken in turn -> list.

    Two rounds warm up. At most `rounds` are counted, and fewer, but four at least, where they take more than `budget`
    seconds in all. The quickest and not the median: on a shared machine others only ever make a step slower.
    """
    times = [[] for _ in works]
    for i in range(rounds + 2):
        order = list(enumerate(works))
        for place, work in order if i % 2 else reversed(order):
            took = seconds(run, work, i)
            if i >= 2:
                times[place].append(took)
        if i >= 5 and sum(map(sum, times)) > budget:
            break
    return [min(one) for one in times]
