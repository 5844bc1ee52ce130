"""Metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class Metrics:
    """Metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.submitted = Counter(
            "kandinsky22_jobs_submitted", "Jobs that were queued.", ["mode"], registry=self.registry
        )
        self.responses = Counter(
            "kandinsky22_http_responses",
            "Responses by method and status.",
            ["method", "status"],
            registry=self.registry,
        )

    def watch_jobs(self, counts: Callable[[], Mapping[str, int]], restarts: Callable[[], Mapping[str, int]]) -> None:
        """Report the number of jobs by state, and the restarts of workers.

        Args:
            counts: Returns the number of jobs by state.
            restarts: Returns the number of restarts by worker.
        """
        self.registry.register(_JobCollector(counts, restarts))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _JobCollector(Collector):
    def __init__(self, counts: Callable[[], Mapping[str, int]], restarts: Callable[[], Mapping[str, int]]) -> None:
        self._counts, self._restarts = counts, restarts

    def collect(self) -> Iterable[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("kandinsky22_jobs", "Jobs by state.", labels=["state"])
        counts = self._counts()
        for state in ("queued", "running", "done", "failed", "cancelled"):
            jobs.add_metric([state], counts.get(state, 0))
        yield jobs
        restarts = GaugeMetricFamily("kandinsky22_worker_restarts", "Restarts of workers.", labels=["worker"])
        for worker, number in self._restarts().items():
            restarts.add_metric([worker], number)
        yield restarts
