import torch
import torchvision

from models.backbones.squeezenet import squeezenet1_1_features


def test_features_are_torchvisions():
    """At 63 pixels each pool divides without a rest, so that rounding up or down is the same."""
    published = torchvision.models.squeezenet1_1(weights=None).features.eval()
    features = squeezenet1_1_features().eval()
    features.load_state_dict(published.state_dict())
    images = torch.randn(2, 3, 63, 63)
    torch.testing.assert_close(features(images), published(images))
    assert features(torch.randn(1, 3, 300, 300)).shape[-2:] == (17, 17)
