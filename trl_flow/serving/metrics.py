"""What a reward server counts, in Prometheus' text format."""

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


_INSIDE = "Requests that are uploading, waiting or being scored."
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server, of which `waiting` returns the number of requests inside."""

    def __init__(self, waiting: Callable[[], int]):
        # Not the process's default registry: a process may have several servers, as tests do
        registry = CollectorRegistry()
        counter = partial(Counter, registry=registry)
        status = "Requests for scores by the status of their answers; 499 are those whose clients went away."
        self.requests = counter("trl_flow_requests", status, ["status"])
        self.images = counter("trl_flow_images", "Images that were scored.")
        self.errors = counter("trl_flow_reward_errors", "Calls in which a reward function failed.", ["reward"])
        self.scoring = counter("trl_flow_scoring_seconds", "Seconds spent in a reward function.", ["reward"])
        latency = "Seconds from a request's headers to its answer with scores."
        self.latency = Histogram("trl_flow_request_seconds", latency, buckets=_SECONDS, registry=registry)
        Gauge("trl_flow_waiting", _INSIDE, registry=registry).set_function(waiting)
        self.text = partial(generate_latest, registry)
