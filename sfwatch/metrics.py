"""The status and the tally in Prometheus' text form, for the textfile collector of node_exporter.

Names and units follow Prometheus' conventions: seconds and bytes, moments instead of ages (`time() - …` makes
the age, and a file that is not written anew does not lie). Every series that can be counted is there from the
start, at zero, since a counter that appears at one looks as if it had never grown.

Imported only where `metrics_file` is set: prometheus_client is an extra, `sfwatch[metrics]`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sfwatch.record import NEXT_STEPS
from sfwatch.status import REASONS, Status
from sfwatch.tally import BUCKETS_S, InboxTally, Tally, cumulated


def render(status: Status, tally: Tally) -> bytes:
    """Return the text of all metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected([*_counted(status, tally), *_gauged(status)]))
    return generate_latest(registry)


class _Collected(Collector):
    """What prometheus_client asks for metrics."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _counted(status: Status, tally: Tally) -> Iterator[Metric]:
    """What only grows, until the next start."""
    files = CounterMetricFamily(
        "sfwatch_files",
        "Files that came to their end, by result and reason.",
        labels=["inbox", "result", "reason"],
    )
    sent = CounterMetricFamily("sfwatch_done_bytes", "Bytes of the files that are done.", labels=["inbox"])
    last = GaugeMetricFamily(
        "sfwatch_last_success_timestamp_seconds", "When a file was done last; 0 if none was.", labels=["inbox"]
    )
    durations = HistogramMetricFamily(
        "sfwatch_file_duration_seconds", "From the first sight of a file until it is done.", labels=["inbox"]
    )
    for name in dict.fromkeys([*(inbox.name for inbox in status.inboxes), *tally.inboxes]):
        inbox = tally.inboxes.get(name) or InboxTally()
        files.add_metric([name, "done", ""], inbox.done)
        for reason in dict.fromkeys([*NEXT_STEPS, *inbox.failed]):
            files.add_metric([name, "failed", reason], inbox.failed[reason])
        sent.add_metric([name], inbox.sent_bytes)
        last.add_metric([name], inbox.last_done_at or 0)
        bounds = [*map(str, BUCKETS_S), "+Inf"]
        buckets = list(zip(bounds, map(float, cumulated(inbox.durations)), strict=True))
        durations.add_metric([name], buckets, inbox.seconds)
    yield from (files, sent, durations, last)


def _gauged(status: Status) -> Iterator[Metric]:
    """What is so now."""
    yield _gauge("sfwatch_build_info", "1, with the version.", ["version"], {(status.version,): 1})
    up = float(status.state != "stopped")
    yield _gauge("sfwatch_up", "1 while it runs, 0 after an orderly end.", [], {(): up})
    started = status.started_at.timestamp()
    yield _gauge("sfwatch_start_timestamp_seconds", "When it was started.", [], {(): started})
    waiting = {(inbox.name, reason): 0.0 for inbox in status.inboxes for reason in REASONS}
    oldest: dict[tuple[str, ...], float] = {}
    for group in status.waiting:
        waiting[group.inbox, group.reason] = group.files
        since = min(file.since.timestamp() for file in group.oldest)
        oldest[group.inbox,] = min(since, oldest.get((group.inbox,), since))
    yield _gauge("sfwatch_waiting_files", "Files that wait, by reason.", ["inbox", "reason"], waiting)
    what = "When the file that waits longest was first seen; no sample if none waits."
    yield _gauge("sfwatch_oldest_waiting_timestamp_seconds", what, ["inbox"], oldest)
    under_way = {(inbox.name,): inbox.under_way for inbox in status.inboxes}
    yield _gauge("sfwatch_under_way_files", "Files that are being worked on.", ["inbox"], under_way)
    lost = {(inbox.name,): inbox.lost is not None for inbox in status.inboxes}
    yield _gauge("sfwatch_inbox_lost", "1 while an inbox is not there.", ["inbox"], lost)
    held = {(target.name,): target.reason is not None for target in status.targets}
    yield _gauge("sfwatch_target_held", "1 while a target takes no files.", ["target"], held)
    folders = {(folder.path,): 1 for folder in status.folders}
    yield _gauge("sfwatch_folder_held", "1 for each folder that takes no files.", ["path"], folders)


def _gauge(name: str, what: str, labels: list[str], samples: Mapping[Any, float]) -> Metric:
    gauge = GaugeMetricFamily(name, what, labels=labels)
    for values, sample in samples.items():
        gauge.add_metric(list(values), float(sample))
    return gauge
