"""Training: configuration, pictures, data sets, the doctor, losses, checkpoints and the loop."""
