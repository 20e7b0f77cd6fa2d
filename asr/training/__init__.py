"""Training: data, losses, the step, checkpoints. Needs no ray, soundfile or soxr, so it runs on a bare GPU machine."""
