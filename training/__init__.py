"""What every training loop needs and no loop should contain: flags, devices, checkpoints, log, schedule."""
