"""The `/metrics` page of vLLM 0.32: the names, label sets and buckets a router reads.

Rules:
    1. Gauges are what they were at the end of the last step, never fresher, as in vLLM.
    2. Names and labels are those captured from a running engine; what no router reads is left out.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

from tokenway.simulator.engine.engine import Engine, Rejection

_TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    80.0,
)
_LATENCY_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
_TOKEN_BUCKETS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0)
_ITERATION_BUCKETS = (1.0, *(float(1 << power) for power in range(3, 15)))
_FINISHED_REASONS = ("stop", "length", "abort", "error", "repetition")


class Histogram:
    """Fixed upper bounds, cumulative on the page."""

    def __init__(self, name: str, help_text: str, bounds: tuple[float, ...]) -> None:
        self.name = name
        self.help_text = help_text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value; a value equal to a bound is within it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, labels: str) -> list[str]:
        """Exposition lines, `labels` without braces."""
        bounds = [*(str(bound) for bound in self._bounds), "+Inf"]
        cumulative = list(accumulate(self._counts))
        return [
            f"# HELP {self.name} {self.help_text}",
            f"# TYPE {self.name} histogram",
            *(
                f'{self.name}_bucket{{{labels},le="{bound}"}} {float(count)}'
                for bound, count in zip(bounds, cumulative, strict=True)
            ),
            f"{self.name}_count{{{labels}}} {float(cumulative[-1])}",
            f"{self.name}_sum{{{labels}}} {self._sum}",
        ]


class EngineMetrics:
    """Everything one replica counts. The driver writes the public fields; `render` reads them."""

    def __init__(self, engine: Engine, model: str, engine_id: int) -> None:
        self._engine = engine
        self._model = model
        self._labels = f'engine="{engine_id}",model_name="{model}"'
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self.prompt_tokens = 0
        self.prompt_tokens_cached = 0
        self.generation_tokens = 0
        self.preemptions = 0
        self.successes = dict.fromkeys(_FINISHED_REASONS, 0)
        self.rejections = dict.fromkeys(Rejection, 0)
        self.sleep_level = 0
        self.ttft = Histogram(
            "vllm:time_to_first_token_seconds", "Time to first token in seconds.", _TTFT_BUCKETS_S
        )
        self.inter_token = Histogram(
            "vllm:inter_token_latency_seconds", "Inter-token latency in seconds.", _ITL_BUCKETS_S
        )
        self.per_output_token = Histogram(
            "vllm:request_time_per_output_token_seconds",
            "Time per output token per request in seconds.",
            _ITL_BUCKETS_S,
        )
        self.e2e = Histogram(
            "vllm:e2e_request_latency_seconds", "End-to-end latency in seconds.", _LATENCY_BUCKETS_S
        )
        self.queue_time = Histogram(
            "vllm:request_queue_time_seconds", "Time spent WAITING in seconds.", _LATENCY_BUCKETS_S
        )
        self.prefill_time = Histogram(
            "vllm:request_prefill_time_seconds", "Time spent in PREFILL in seconds.", _LATENCY_BUCKETS_S
        )
        self.decode_time = Histogram(
            "vllm:request_decode_time_seconds", "Time spent in DECODE in seconds.", _LATENCY_BUCKETS_S
        )
        self.inference_time = Histogram(
            "vllm:request_inference_time_seconds", "Time spent RUNNING in seconds.", _LATENCY_BUCKETS_S
        )
        self.request_prompt_tokens = Histogram(
            "vllm:request_prompt_tokens", "Prefill tokens per request.", _TOKEN_BUCKETS
        )
        self.request_generation_tokens = Histogram(
            "vllm:request_generation_tokens", "Generated tokens per request.", _TOKEN_BUCKETS
        )
        self.request_computed_tokens = Histogram(
            "vllm:request_prefill_kv_computed_tokens",
            "Prompt tokens computed per request, cached ones excluded.",
            _TOKEN_BUCKETS,
        )
        self.iteration_tokens = Histogram(
            "vllm:iteration_tokens_total", "Tokens per engine step.", _ITERATION_BUCKETS
        )
        self._running = self._waiting = 0
        self._usage_ratio = 0.0

    def end_step(self) -> None:
        """Take the gauges from the engine."""
        self._running = self._engine.num_running
        self._waiting = self._engine.num_waiting
        self._usage_ratio = self._engine.kv_usage_ratio

    def render(self) -> bytes:
        """The page, as `text/plain; version=1.0.0`."""
        lines = [*self._gauges(), *self._counters(), *self._counters_by_reason()]
        for histogram in (
            *(self.ttft, self.inter_token, self.per_output_token, self.e2e, self.queue_time),
            *(self.prefill_time, self.decode_time, self.inference_time, self.request_prompt_tokens),
            *(self.request_generation_tokens, self.request_computed_tokens, self.iteration_tokens),
        ):
            lines.extend(histogram.lines(self._labels))
        lines.extend(self._cache_config())
        return ("\n".join(lines) + "\n").encode()

    def _family(self, kind: str, name: str, help_text: str, *samples: tuple[str, float]) -> list[str]:
        """Lines of one family; a sample is what its labels have beside those of all, and its value."""
        return [
            f"# HELP {name} {help_text}",
            f"# TYPE {name} {kind}",
            *(f"{name}{{{self._labels}{extra}}} {float(value)}" for extra, value in samples),
        ]

    def _gauges(self) -> list[str]:
        return [
            *self._family(
                "gauge", "vllm:num_requests_running", "Requests in execution batches.", ("", self._running)
            ),
            *self._family(
                "gauge", "vllm:num_requests_waiting", "Requests waiting to be run.", ("", self._waiting)
            ),
            *self._family(
                "gauge",
                "vllm:num_requests_waiting_by_reason",
                "Waiting requests by reason.",
                (',reason="capacity"', self._waiting),
                (',reason="deferred"', 0),
            ),
            *self._family(
                "gauge",
                "vllm:engine_sleep_state",
                "Engine sleep state; awake = 0 means engine is sleeping.",
                (',sleep_state="awake"', self.sleep_level == 0),
                (',sleep_state="weights_offloaded"', self.sleep_level == 1),
                (',sleep_state="discard_all"', self.sleep_level >= 2),
            ),
            *self._family(
                "gauge",
                "vllm:kv_cache_usage_perc",
                "KV-cache usage, 1 is 100 percent.",
                ("", self._usage_ratio),
            ),
        ]

    def _counters(self) -> list[str]:
        counters = (
            (
                "vllm:prefix_cache_queries_total",
                "Prefix cache queries, in tokens.",
                self.prefix_queries_tokens,
            ),
            ("vllm:prefix_cache_hits_total", "Prefix cache hits, in tokens.", self.prefix_hits_tokens),
            ("vllm:external_prefix_cache_queries_total", "External prefix cache queries, in tokens.", 0),
            ("vllm:external_prefix_cache_hits_total", "External prefix cache hits, in tokens.", 0),
            ("vllm:num_preemptions_total", "Preemptions.", self.preemptions),
            ("vllm:prompt_tokens_total", "Prefill tokens processed.", self.prompt_tokens),
            ("vllm:prompt_tokens_cached_total", "Prompt tokens from a cache.", self.prompt_tokens_cached),
            ("vllm:generation_tokens_total", "Generated tokens.", self.generation_tokens),
        )
        return [
            *(
                line
                for name, help_text, value in counters
                for line in self._family("counter", name, help_text, ("", value))
            ),
            *self._family(
                "counter",
                "vllm:prompt_tokens_by_source_total",
                "Prompt tokens by source.",
                (',source="local_compute"', self.prompt_tokens - self.prompt_tokens_cached),
                (',source="local_cache_hit"', self.prompt_tokens_cached),
                (',source="external_kv_transfer"', 0),
            ),
        ]

    def _counters_by_reason(self) -> list[str]:
        """Families whose own label does not stand last, as vLLM has them."""
        engine_label, model_label = self._labels.split(",")
        successes, rejections = "vllm:request_success_total", "vllm:admission_rejections_total"
        return [
            f"# HELP {successes} Successfully processed requests.",
            f"# TYPE {successes} counter",
            *(
                f'{successes}{{{engine_label},finished_reason="{reason}",{model_label}}} {float(count)}'
                for reason, count in self.successes.items()
            ),
            f"# HELP {rejections} Requests rejected at admission.",
            f"# TYPE {rejections} counter",
            *(
                f'{rejections}{{{model_label},reason="{reason}"}} {float(count)}'
                for reason, count in self.rejections.items()
            ),
        ]

    def _cache_config(self) -> list[str]:
        profile = self._engine.profile
        name = "vllm:cache_config_info"
        engine_label = self._labels.split(",")[0]
        return [
            f"# HELP {name} Information of the LLMEngine CacheConfig",
            f"# TYPE {name} gauge",
            f'{name}{{block_size="{profile.block_size}",cache_dtype="auto",enable_prefix_caching="True",'
            f'{engine_label},gpu_memory_utilization="0.92",'
            f'kv_cache_size_tokens="{profile.num_blocks * profile.block_size}",'
            f'num_gpu_blocks="{profile.num_blocks}",prefix_caching_hash_algo="sha256"}} 1.0',
        ]
