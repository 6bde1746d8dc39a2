"""One criterion per detector: network outputs and matched targets in, a dict of scalars out."""
