"""The counts of a server as Prometheus text: requests, examples, seconds."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, float("inf"))
"""Upper ends of the histogram, in seconds."""


class Metrics:
    """Counts of requests, examples and seconds, by model. Used from one thread."""

    def __init__(self, models: Sequence[str]) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._examples: Counter[str] = Counter()
        self._seconds = dict.fromkeys(models, 0.0)
        self._buckets = {model: [0] * len(BUCKETS) for model in models}

    def failed(self, model: str, status: int) -> None:
        """Count a refused request to a model that exists, so that clients cannot make up new series."""
        self._requests[model, status] += 1

    def answered(self, model: str, examples: int, seconds: float) -> None:
        """Count an answered request. Its seconds go from its last byte to its answer."""
        self._requests[model, 200] += 1
        self._examples[model] += examples
        self._seconds[model] += seconds
        self._buckets[model][bisect_left(BUCKETS, seconds)] += 1

    def text(self) -> str:
        """All of it in Prometheus's text format."""
        lines = ["# HELP dgrad_requests_total Inference requests.", "# TYPE dgrad_requests_total counter"]
        for (model, status), count in sorted(self._requests.items()):
            lines.append(f'dgrad_requests_total{{model="{model}",status="{status}"}} {count}')
        lines += ["# HELP dgrad_examples_total Examples in answered requests.", "# TYPE dgrad_examples_total counter"]
        lines += [f'dgrad_examples_total{{model="{model}"}} {self._examples[model]}' for model in self._buckets]
        lines += [
            "# HELP dgrad_request_seconds Seconds from a request's last byte to its answer.",
            "# TYPE dgrad_request_seconds histogram",
        ]
        for model, buckets in self._buckets.items():
            for end, count in zip(BUCKETS, accumulate(buckets), strict=True):
                name = "+Inf" if end == float("inf") else f"{end:g}"
                lines.append(f'dgrad_request_seconds_bucket{{model="{model}",le="{name}"}} {count}')
            lines.append(f'dgrad_request_seconds_sum{{model="{model}"}} {self._seconds[model]:.9g}')
            lines.append(f'dgrad_request_seconds_count{{model="{model}"}} {sum(buckets)}')
        return "\n".join(lines) + "\n"
