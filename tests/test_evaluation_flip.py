"""The flip test: what a network says of a mirrored picture, brought back and averaged."""

from data.nuscenes_transforms import mirrored
from evaluation import nuscenes
from losses import centerfusion
from ops.heatmap import gather
from tests.test_data_nuscenes_transforms import scene
from tests.test_evaluation_nuscenes import heads_that_say


def test_heads_that_are_right_of_both_stay_as_they_are():
    """Ideal heads of a picture and of its mirrored world: their mean says the same at every object."""
    width = 800
    target = scene(objects=6, seed=4)[1]
    target["velocity"] = target["velocity"].nan_to_num(2.0)
    targets, size = [target], (113, width // 4)
    outputs, turned = heads_that_say(targets, size), heads_that_say([mirrored(target, width)], size)
    means = nuscenes.flip_averaged(outputs, turned)
    outputs["hm"], means["hm"] = outputs["hm"].sigmoid(), means["hm"].sigmoid()
    goals = centerfusion.assign(targets, "cpu", size=size)
    said = {name: (gather(outputs[name], goals["index"]), gather(means[name], goals["index"])) for name in means}
    apart = {name: float((one - two)[goals["mask"]].abs().max()) for name, (one, two) in said.items()}
    assert len(apart) == len(outputs) and max(apart.values()) < 1e-3, apart
