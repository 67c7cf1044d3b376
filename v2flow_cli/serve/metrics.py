"""The metrics that Prometheus reads at /metrics."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from v2flow_cli.serve.errors import CLIENT_CLOSED_REQUEST

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)


class Metrics:
    """A registry with the metrics of the server and the memory and CPU seconds of the process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        common: Any = dict(registry=self.registry, namespace="v2flow")
        self.requests = Counter("requests", "Answered requests.", ["endpoint", "status"], **common)
        self.seconds = Histogram(
            "request_seconds", "From the head of a request to its response.", ["endpoint"], buckets=SECONDS, **common
        )
        self.in_flight = Gauge("requests_in_flight", "Requests in progress.", **common)
        self.body_bytes = Gauge("body_bytes", "Bytes of all request bodies in memory.", **common)
        self.waiting = Gauge("rows_waiting", "Images in the queue.", **common)
        self.running = Gauge("rows_running", "Images in the current batch.", **common)
        self.rows = Counter("rows", "Computed images.", ["task"], **common)
        self.batch_rows = Histogram(
            "batch_rows", "Images in a batch.", ["task"], buckets=(1, 2, 4, 8, 16, 32), **common
        )
        self.batch_seconds = Histogram("batch_seconds", "Duration of a batch.", ["task"], buckets=SECONDS, **common)

    def on_batch(self, task: object, rows: int, seconds: float) -> None:
        """Count a computed batch."""
        name = type(task).__name__.lower()
        self.rows.labels(name).inc(rows)
        self.batch_rows.labels(name).observe(rows)
        self.batch_seconds.labels(name).observe(seconds)


class MetricsMiddleware:
    """ASGI middleware: counts and times every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), CLIENT_CLOSED_REQUEST

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, record_status)
        except Exception:
            status = 500
            raise
        finally:
            self.metrics.in_flight.dec()
            # The route's pattern: paths of arbitrary requests must not be labels.
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(endpoint, status).inc()
            self.metrics.seconds.labels(endpoint).observe(time.perf_counter() - start)
