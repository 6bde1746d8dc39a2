"""One criterion a detector: network outputs, anchors and targets in, a dict of scalars out."""
