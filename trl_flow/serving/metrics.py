"""What a reward server counts, in Prometheus' text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """
    The counters of one server.

    Args:
        waiting (`Callable`): returns the number of requests that are uploading, waiting or being scored.
    """

    def __init__(self, waiting: Callable[[], int]):
        # Not the process's default registry: a process may have several servers, as tests do
        self._registry = registry = CollectorRegistry()
        status = "Requests for scores by the status of their answers; 499 are those whose clients went away."
        self.requests = Counter("trl_flow_requests", status, ["status"], registry=registry)
        self.images = Counter("trl_flow_images", "Images that were scored.", registry=registry)
        failed = "Calls in which a reward function failed."
        self.errors = Counter("trl_flow_reward_errors", failed, ["reward"], registry=registry)
        self.latency = Histogram(
            "trl_flow_request_seconds",
            "Seconds from a request's headers to its answer with scores.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
            registry=registry,
        )
        spent = "Seconds spent in a reward function."
        self.scoring = Counter("trl_flow_scoring_seconds", spent, ["reward"], registry=registry)
        inside = Gauge("trl_flow_waiting", "Requests that are uploading, waiting or being scored.", registry=registry)
        inside.set_function(waiting)

    def text(self) -> bytes:
        """All of them, in the text format."""
        return generate_latest(self._registry)
