"""The only place that joins networks, schedulers and inputs."""
