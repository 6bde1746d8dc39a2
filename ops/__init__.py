"""Pure functions on tensors: boxes, matching, NMS, heatmaps, camera geometry, radar. No network, loss or file."""
