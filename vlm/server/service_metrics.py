"""The service's figures for Prometheus: requests by route and status, and the time of each stage of a search."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from vlm.server.batcher import BatchCounts
from vlm.server.served_index import ServedIndex
from vlm.service.search import SearchResult

CONTENT_TYPE = CONTENT_TYPE_LATEST

_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class ServiceMetrics:
    """Counters of one service, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "vlm_requests", "Requests by route and status.", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "vlm_request_seconds", "Time of whole requests.", ("route",), buckets=_SECONDS, registry=self._registry
        )
        self._stages = Histogram(
            "vlm_stage_seconds",
            "Time of the stages of a search.",
            ("stage",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "vlm_batch_size", "Queries embedded and searched together.", buckets=_BATCH_SIZES, registry=self._registry
        )
        self._gauges = {
            "rows": Gauge("vlm_index_rows", "Live rows.", ("index",), registry=self._registry),
            "generation": Gauge("vlm_index_generation", "Version that answers.", ("index",), registry=self._registry),
            "stale": Gauge(
                "vlm_index_stale", "1 if the newest version cannot be opened.", ("index",), registry=self._registry
            ),
            "hits": Gauge(
                "vlm_cache_hits", "Texts whose vectors were remembered.", ("index",), registry=self._registry
            ),
            "misses": Gauge("vlm_cache_misses", "Texts that were embedded.", ("index",), registry=self._registry),
        }
        self._refused = Gauge(
            "vlm_requests_refused", "Requests refused because too many waited.", registry=self._registry
        )

    def observe_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        # a client may make up any number of methods, and each would be a series of its own
        method = method if method in _METHODS else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def observe_batch(self, size: int) -> None:
        """Count a batch of queries."""
        self._batches.observe(size)

    def observe_search(self, result: SearchResult) -> None:
        """Count the stages of one search."""
        self._stages.labels("embed").observe(result.embed_milliseconds / 1000)
        self._stages.labels("search").observe(result.search_milliseconds / 1000)
        if result.rerank_milliseconds is not None:
            self._stages.labels("rerank").observe(result.rerank_milliseconds / 1000)

    def exposition(self, indexes: Iterable[ServedIndex], batches: Iterable[BatchCounts]) -> bytes:
        """All figures in Prometheus' text format."""
        for index in indexes:
            self._gauges["rows"].labels(index.name).set(len(index.service.index))
            self._gauges["generation"].labels(index.name).set(index.generation)
            self._gauges["stale"].labels(index.name).set(bool(index.reload_error))
            hits, misses = index.cache_counts()
            self._gauges["hits"].labels(index.name).set(hits)
            self._gauges["misses"].labels(index.name).set(misses)
        self._refused.set(sum(counts.refused for counts in batches))
        return generate_latest(self._registry)
