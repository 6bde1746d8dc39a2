"""Tables of nuScenes as large as v1.0-trainval's, without images, and what it takes to open them.

python -m benchmarks.nuscenes_tables ROOT CACHE     open them, print seconds and peak memory as JSON
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import synthetic
from data.nuscenes import tables
from training import memory

VERSION = "v1.0-mini"
SAMPLES = 8  # of the drawn set, in 2 scenes: 320 sensor files, 235 annotations
TOKEN = re.compile(r'"[0-9a-f]{6}([0-9a-f]{26})"')


def draw(root: Path, copies: int) -> None:
    """Write the tables of a drawn set `copies` times into ROOT/v1.0-mini, each time with other tokens.

    8,000 copies have as many sensor files as v1.0-trainval, 2.6 million, and almost twice its samples and annotations.
    """
    drawn = synthetic.draw("nuscenes", root / "drawn", images=6 * SAMPLES, size=(64, 64))
    (root / VERSION).mkdir()
    for path in (drawn / VERSION).glob("*.json"):
        records = path.read_text().strip().strip("[]")
        with open(root / VERSION / path.name, "w") as file:
            for copy in range(copies):
                file.write("," if copy else "[")
                file.write(TOKEN.sub(rf'"{copy:06x}\1"', records))
            file.write("]")


def open_in_new_process(root: Path, cache: str) -> dict[str, float]:
    """Open the tables, whose arrays are kept in the folder `cache`: {"seconds", "memory" (the peak in bytes)}."""
    command = [sys.executable, "-m", "benchmarks.nuscenes_tables", str(root), cache]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    start = time.perf_counter()
    tables.load(sys.argv[1], VERSION, cache=sys.argv[2])
    print(json.dumps({"seconds": time.perf_counter() - start, "memory": memory.peak_ram()}))
