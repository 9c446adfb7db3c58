"""What the service counts of itself, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Count requests, refusals, batches and restarts, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        named = {"namespace": "lucidetr", "registry": self.registry}
        self.requests = Counter("requests", "Answers, by route and status", ("route", "status"), **named)
        self.seconds = Histogram(
            "request_seconds", "From a request's head to its answer", ("route",), buckets=SECONDS, **named
        )
        self.waiting = Gauge("waiting", "Pictures that wait for the model", **named)
        self.refused = Counter("refused", "Requests refused because too many waited", **named)
        self.batches = Histogram("batch_jobs", "Jobs handed to the model at once", buckets=SIZES, **named)
        self.restarts = Counter("worker_restarts", "Times that the process that computes was replaced", **named)

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return everything counted so far."""
        return generate_latest(self.registry)
