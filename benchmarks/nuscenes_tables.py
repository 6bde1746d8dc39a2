"""Opening the tables of a whole nuScenes: seconds, memory, and what each worker adds.

    python -m benchmarks.nuscenes_tables

Draws tables of v1.0-trainval's size, no pictures, into a temporary folder (3 GB; TMPDIR says where): 850 scenes, 34,149
samples, 2,631,083 files of sensors with as many poses, 1,166,187 annotations, all of classes that are detected. A fresh
process then opens them, twice: from the tables, and from the arrays that the first one kept. The files have just been
written, so no disk is measured. Seconds are told by the clock, and of CPU, for a machine with other work to do. Memory
is the process's peak, and what Python and torch had taken before. Goals: 90 seconds and 6 GB, then 3 seconds and 1 GB.
Workers: two loader processes read what the tables say of pictures all over the set, and look before and after at how
much memory they have to themselves, what the garbage collector takes included. Goal: 20 MB more at most. Only Linux
tells.
"""

import argparse
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data import loader, nuscenes_radar, tables
from training import devices

VERSION = "v1.0-trainval"
SCENES, SAMPLES, FRAMES, ANNOTATIONS = 850, 34149, 2631083, 1166187
# sensor -> its files a sample, that of the key frame first
FILES = dict.fromkeys(tables.CAMERAS, 6) | dict(zip(tables.RADARS, (6, 6, 6, 7, 7))) | {"LIDAR_TOP": 9}
THINGS, TRACK = 34, 21  # annotations a sample; samples in a row that show a thing: two sets of things a scene
WORKERS, READS = 2, 20000  # pictures in all
MB, GB = 1e6, 1e9
TOKENS = ("scene", "sample", "sensor", "calibrated_sensor", "sample_data", "category", "attribute", "instance")
TOKENS += ("sample_annotation",)


# ---- drawing


def draw(folder):
    """Writes the tables that data.tables reads into the new `folder`, record by record. Returns their bytes."""
    folder.mkdir()
    encode = json.JSONEncoder(separators=(",\n", ": ")).encode  # a field a line, as in the official tables
    for table, records in (*small_tables().items(), ("sample_data", frames()), ("ego_pose", poses())):
        save(folder / f"{table}.json", records, encode)
    save(folder / "sample_annotation.json", annotations(), encode)
    return sum(path.stat().st_size for path in folder.iterdir())


def save(path, records, encode):
    with open(path, "w") as file:
        for number, record in enumerate(records):
            file.write(",\n" if number else "[\n")
            file.write(encode(record))
        file.write("\n]\n")


def token(table, number):
    """32 hexadecimal digits, far apart for neighbours: times an odd number, so that no two of them are equal."""
    return f"{(number * len(TOKENS) + TOKENS.index(table)) * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128):032x}"


def first_of(sample, total, each):
    """Number of a sample's first record, where all have `each`, the first ones one more, to make `total`."""
    return each * sample + min(sample, total - each * SAMPLES)


def scene_of(sample):
    return sample * SCENES // SAMPLES


def same_scene(sample, other):
    return 0 <= other < SAMPLES and scene_of(sample) == scene_of(other)


def link(table, number):
    return "" if number is None else token(table, number)


def small_tables():
    """{table: its records} for all but the three long ones."""

    def rows(table, count, fields):
        return ({"token": token(table, number), **fields(number)} for number in range(count))

    def calibration(number):
        sensor = number % len(FILES)
        lines = [[1266.4, 0.0, 816.3], [0.0, 1266.4, 491.5], [0.0, 0.0, 1.0]]
        place = {"translation": [1.7, 0.02, 1.51], "rotation": [0.5, -0.5, 0.5, -0.5]}
        return {"sensor_token": token("sensor", sensor), "camera_intrinsic": lines[: 3 * (sensor < 6)], **place}

    def sample(number):
        return {"timestamp": stamp(number), "scene_token": token("scene", scene_of(number))}

    def instance(number):
        return {"category_token": token("category", number % len(tables.CLASS_OF))}

    names = {"sensor": list(FILES), "category": list(tables.CLASS_OF), "attribute": list(tables.ATTRIBUTES)}
    records = {
        "scene": rows("scene", SCENES, lambda i: {"name": f"scene-{i:04}"}),
        "sample": rows("sample", SAMPLES, sample),
        "sensor": rows("sensor", len(FILES), lambda i: {"channel": names["sensor"][i]}),
        "calibrated_sensor": rows("calibrated_sensor", SCENES * len(FILES), calibration),
        "instance": rows("instance", 2 * SCENES * (THINGS + 1), instance),
    }
    for table in ("category", "attribute"):
        records[table] = rows(table, len(names[table]), lambda i, table=table: {"name": names[table][i]})
    return records


def stamp(sample, part=0.0):
    """Microseconds of a sample, and of what comes a part of the way after it."""
    return 1532402927000000 + int(500000 * (sample + part))


def files_of(sample):
    """[range of record numbers] of each sensor's files. What a sample has more than others is a lidar file."""
    first, end = (first_of(at, FRAMES, sum(FILES.values())) for at in (sample, sample + 1))
    starts = [first, *(first + count for count in itertools.accumulate(FILES.values()))]
    return [range(start, stop) for start, stop in zip(starts, (*starts[1:-1], end))]


def frames():
    """Records of sample_data."""
    nothing = [[None]] * len(FILES)
    for sample in range(SAMPLES):
        before, after = (
            files_of(other) if same_scene(sample, other) else nothing for other in (sample - 1, sample + 1)
        )
        for sensor, numbers in enumerate(files_of(sample)):
            chain = [before[sensor][-1], *numbers, after[sensor][0]]
            for place, number in enumerate(numbers):
                links = {"prev": link("sample_data", chain[place]), "next": link("sample_data", chain[place + 2])}
                yield frame(number, sample, sensor, place == 0, place / len(numbers)) | links


def frame(number, sample, sensor, key, part):
    """A record of sample_data without its links."""
    name, time = list(FILES)[sensor], stamp(sample, part)
    camera, kind = sensor < len(tables.CAMERAS), "jpg" if sensor < len(tables.CAMERAS) else "pcd"
    return {
        "token": token("sample_data", number),
        "sample_token": token("sample", sample),
        "ego_pose_token": token("sample_data", number),  # as in the official tables
        "calibrated_sensor_token": token("calibrated_sensor", scene_of(sample) * len(FILES) + sensor),
        "timestamp": time,
        "fileformat": kind,
        "is_key_frame": key,
        "height": 900 * camera,
        "width": 1600 * camera,
        "filename": f"{'samples' if key else 'sweeps'}/{name}/n015-2018-07-24-11-22-45+0800__{name}__{time}.{kind}",
    }


def poses():
    """Records of ego_pose."""
    places = np.random.default_rng(0).normal(1000, 400, (1000, 7)).tolist()
    for number in range(FRAMES):
        place = places[number % len(places)]
        values = {"timestamp": stamp(0, number / 77), "rotation": place[:4], "translation": place[4:]}
        yield {"token": token("sample_data", number), **values}


def annotations():
    """Records of sample_annotation."""
    places = np.random.default_rng(1).normal(20, 9, (1000, 10)).tolist()
    begin = 0  # first sample of the scene
    for sample in range(SAMPLES):
        begin = begin if same_scene(sample, begin) else sample
        part = (sample - begin) // TRACK
        at = [first_of(sample + step, ANNOTATIONS, THINGS) for step in (-1, 0, 1, 2)]
        for thing in range(at[2] - at[1]):
            lone = thing >= THINGS  # what only the first samples have: seen once
            earlier = None if lone or (sample - begin) % TRACK == 0 else at[0] + thing
            later = same_scene(sample, sample + 1) and (sample + 1 - begin) % TRACK and not lone
            place = places[(at[1] + thing) % len(places)]
            yield {
                "token": token("sample_annotation", at[1] + thing),
                "sample_token": token("sample", sample),
                "instance_token": token("instance", (2 * scene_of(sample) + part) * (THINGS + 1) + thing),
                "visibility_token": str(1 + thing % 4),
                "attribute_tokens": [token("attribute", thing % len(tables.ATTRIBUTES))],
                "translation": place[:3],
                "size": place[3:6],
                "rotation": place[6:],
                "prev": link("sample_annotation", earlier),
                "next": link("sample_annotation", at[2] + thing if later else None),
                "num_lidar_pts": thing,
                "num_radar_pts": 0,
            }


# ---- measuring


class Watched(Dataset):
    """Reads what the tables say of READS pictures; tells a worker's own memory before its first and after its last."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __len__(self):
        return READS  # divisible by WORKERS

    def __getitem__(self, number):
        before = own_memory() if number < WORKERS else 0
        self.pictures.annotation(number * (len(self.pictures) // READS))
        if number < READS - WORKERS:
            return before
        gc.collect()  # copies every page with an object that is not frozen
        return own_memory()


def own_memory():
    """Bytes that this process shares with no other; 0 where the system does not tell."""
    file = Path("/proc/self/smaps_rollup")
    lines = file.read_text().splitlines() if file.exists() else []
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def open_tables(root):
    """Opens the tables in this process. Figures by name: seconds; bytes of this process, and of the worst worker."""
    clocks = time.perf_counter, time.process_time
    before, begun = devices.peak_ram(), [clock() for clock in clocks]
    content = tables.load(root, VERSION)
    seconds, cpu = (clock() - begin for clock, begin in zip(clocks, begun))
    figures = {"seconds": seconds, "cpu": cpu, "before": before, "peak": devices.peak_ram()}
    frames = np.flatnonzero(content.frame_key & (content.frame_channel < len(tables.CAMERAS)))
    nothing = np.zeros((SAMPLES, len(tables.RADARS), 0), np.int32)
    pictures = nuscenes_radar.RadarDataset(root, content, np.arange(SAMPLES), frames, nothing, 60.0, 0.0)
    settings = {"num_workers": WORKERS, "worker_init_fn": loader.spare_memory, "multiprocessing_context": "fork"}
    memory = list(DataLoader(Watched(pictures), None, **settings))  # the workers read in turn
    growth = max(memory[i - WORKERS] - memory[i] for i in range(WORKERS))
    return figures | {"growth": growth, "own": max(memory[:WORKERS])}


def in_fresh_process(root):
    command = [sys.executable, "-m", "benchmarks.nuscenes_tables", "--open", str(root)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def measure():
    """Draws, opens twice, prints."""
    with tempfile.TemporaryDirectory() as root:
        size = draw(Path(root) / VERSION)
        print(f"tables of {SAMPLES} samples, {FRAMES} files, {ANNOTATIONS} annotations: {size / GB:.1f} GB", flush=True)
        for name in ("first time", "from the cache"):
            found = in_fresh_process(root)
            took = f"{found['seconds']:.1f} s, of CPU {found['cpu']:.1f}"
            memory = f"peak memory {found['peak'] / GB:.2f} GB, before {found['before'] / GB:.2f}"
            worker = f"growth a worker {found['growth'] / MB:.0f} MB, before {found['own'] / MB:.0f}"
            print(f"{name}: {took}; {memory}; {worker}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--open", metavar="ROOT", help="only open the tables in ROOT and print what it took as JSON")
    args = parser.parse_args(argv)
    if args.open:
        print(json.dumps(open_tables(args.open)))
    else:
        measure()


if __name__ == "__main__":
    main()
