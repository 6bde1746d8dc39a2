"""The world of `data.world` as a mirror shows it: left is right, for the road, all things and the car with its sensors.

The mirror turns the global y axis round. The car's camera on its left then stands where the one on its right was, a
bit otherwise, since a car's sides are not quite the same; so channels change their names, and each keeps its moment.
This is what a flip of a sample (data.nuscenes_transforms) claims to make; here it is drawn, tables, pictures and all.
"""

import dataclasses

import numpy as np

from data.world import Camera

MIRROR = np.array([1.0, -1.0])  # of x, y in the global frame and the car's, and of (s, d) on the road
OTHER = {"LEFT": "RIGHT", "RIGHT": "LEFT"}


def mirror(world):
    """The mirrored World, with its own cameras and radars; of that one again, the same as `world`."""
    light = world.light | {"sun": -world.light["sun"]}
    s, d, rate = world.ego
    return dataclasses.replace(
        world, origin=world.origin * MIRROR, heading=-world.heading, bend=-world.bend, ego=(s, -d, rate), light=light,
        start=world.start * MIRROR, rate=world.rate * MIRROR, turn=-world.turn, scatter=world.scatter * MIRROR,
        cameras=opposite(world.cameras), radars=opposite(world.radars), hand=-world.hand,
    )  # fmt: skip


def opposite(sensors):
    """{channel: Camera or Radar} of the mirrored car, in the order of those they are images of."""
    return {other_side(name): image_of(sensor) for name, sensor in sensors.items()}


def other_side(channel):
    """CAM_FRONT_LEFT -> CAM_FRONT_RIGHT and back; CAM_FRONT stays."""
    return "_".join(OTHER.get(part, part) for part in channel.split("_"))


def image_of(sensor):
    x, y, z = sensor.place
    seen = dataclasses.replace(sensor, place=(x, -y, z), turn=-sensor.turn)
    if isinstance(sensor, Camera):
        seen = dataclasses.replace(seen, middle=(1600 - sensor.middle[0], sensor.middle[1]))
    return seen
