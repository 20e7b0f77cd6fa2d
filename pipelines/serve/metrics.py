"""What the server counts, for Prometheus and for its own log."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_REPLY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)  # s


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.sessions = Gauge("asr_sessions", "Live sessions now.", ["protocol"], registry=registry)
        self.ended = Counter(
            "asr_sessions_ended", "Live sessions by how they ended.", ["protocol", "how"], registry=registry
        )
        self.audio = Counter("asr_audio_seconds", "Seconds of audio recognized.", ["protocol"], registry=registry)
        self.reply = Histogram(
            "asr_reply_seconds", "From a message of audio to its text.", buckets=_REPLY_BUCKETS, registry=registry
        )
        self.dropped = Counter("asr_dropped", "Clients refused or cut off, by reason.", ["reason"], registry=registry)
        self.uploads = Counter("asr_uploads", "Recordings by HTTP status.", ["status"], registry=registry)
        factor = Gauge(
            "asr_real_time_factor",
            "CPU seconds of this process for a second of audio, since its start.",
            registry=registry,
        )
        self._seconds, self._cpu_at_start = 0.0, time.process_time()
        factor.set_function(self._real_time_factor)

    def heard(self, protocol: str, seconds: float) -> None:
        """Count recognized audio."""
        self.audio.labels(protocol).inc(seconds)
        self._seconds += seconds

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def _real_time_factor(self) -> float:
        return (time.process_time() - self._cpu_at_start) / self._seconds if self._seconds else 0.0
