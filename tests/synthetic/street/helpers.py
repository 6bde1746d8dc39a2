"""Street scenes for the tests of several files."""

import dataclasses
import functools

import numpy as np

from synthetic.street import simulation

SIZE = (320, 180)
build_scene = functools.cache(simulation.build_scene)


def one_object(label, s=20.0, d=-1.75, yaw=0.0, rate=(0.0, 0.0), attribute=""):
    """A Scene with a single object on an almost straight road; the vehicle stands at s = 0."""
    return dataclasses.replace(
        build_scene(0, 0, 4),
        curvature=1e-5,
        ego_path=(0.0, -1.75, 0.0),
        labels=np.array([label]),
        categories=[""],
        attributes=[attribute],
        sizes=np.array([simulation.SIZES[label]]),
        starts=np.array([[s, d]]),
        rates=np.array([rate]),
        yaws=np.array([yaw]),
        reflectors=build_scene(0, 0, 4).reflectors[:1],
    )


def valid_returns(scene, name, time, seed, index=0):
    """The valid radar returns of one object."""
    points, source = simulation.radar_returns(scene, name, time, np.random.default_rng(seed))
    return points[(source == index) & (points["invalid_state"] == 0) & (points["ambig_state"] == 3)]
