"""Metrics of a run as OpenTelemetry gauges, over OTLP/HTTP.

    report.sink={path: otel_sink:OtelSink, arguments: {endpoint: "http://127.0.0.1:4318/v1/metrics"}}

Needs opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http, which vLLM brings along.
"""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader


class OtelSink:
    """A gauge per metric; an endpoint that is away loses rows and stops nothing."""

    def __init__(self, endpoint: str) -> None:
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=endpoint, timeout=5))
        self._provider = MeterProvider(metric_readers=[reader])
        self._meter = self._provider.get_meter("tapo_train")
        self._step = self._meter.create_gauge("step")

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step.set(step)
        for name, value in metrics.items():
            self._meter.create_gauge(name).set(value)
        self._provider.force_flush()

    def close(self) -> None:
        self._provider.shutdown()
