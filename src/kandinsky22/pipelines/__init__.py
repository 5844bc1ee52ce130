"""The ten pipelines: the only place that joins networks, schedulers, inputs and checkpoints."""
