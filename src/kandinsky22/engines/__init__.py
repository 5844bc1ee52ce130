"""Engines other than PyTorch that run the networks of pipelines."""
