"""What every package may import: errors for the user, files written atomically, the names of nuScenes."""
