"""Batches: every row of a file drawn exactly once, on one machine or on a cluster."""
