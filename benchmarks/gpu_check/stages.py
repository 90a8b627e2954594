"""Runs a stage: its units one after the other or a few beside each other, within its time."""

from __future__ import annotations

import argparse
import collections
import sys
import threading
import time
from typing import Any

import units
from store import Store, circumstances
from worker import Worker

import build

Record = dict[str, Any]
#: A unit that has less time left than this does not start; seconds.
LEAST = 20.0
#: Units with this in their name need much of the device's memory: one at a time.
LARGE = "over 2^31"


def run(name: str, args: argparse.Namespace) -> bool:
    """Run a stage and say what became of it; whether nothing failed."""
    began = time.perf_counter()
    _say(f"== {name}")
    if name == "build":
        record = build.run(args.device, args.out, args.seconds, args.fresh)
        _say(f"   {_line('extensions', record)}")
        return record["status"] == "ok"
    if build.stale(args.device, args.out):
        build.run(args.device, args.out, args.seconds, args.fresh)
    wanted = {u: s for u, s in getattr(units, name)(args.device).items() if args.only in u}
    store = Store(args.out / f"{name}.jsonl", circumstances(args.device), args.fresh)
    # What ran out of its time finds compiled kernels the next time.
    rest = {u: s for u, s in wanted.items() if _status(store, u) in ("", "timeout")}
    _say(f"   {len(wanted)} units, {len(wanted) - len(rest)} of them done before")
    jobs = 1 if name == "bench" else args.jobs
    _work(name, args.device, rest, store, jobs, began + args.seconds)
    bad = [u for u in wanted if _status(store, u) in ("failed", "crashed", "timeout")]
    left = [u for u in wanted if u not in store.done]
    _say(f"   {len(wanted) - len(left)} done, {len(bad)} failed, {len(left)} left for the next run")
    return not bad


def _status(store: Store, unit: str) -> str:
    """What became of a unit; nothing if it has not run."""
    return str(store.done.get(unit, {}).get("status", ""))


def _work(
    stage: str, device: str, rest: dict[str, float], store: Store, jobs: int, end: float
) -> None:
    """Hand the units to as many workers; one of them has the large ones."""
    large = collections.deque(u for u in rest if LARGE in u)
    small = collections.deque(u for u in rest if LARGE not in u)
    workers = [Worker(stage, device) for _ in range(jobs)]

    def serve(worker: Worker, queues: list[collections.deque[str]]) -> None:
        try:
            while queues and (left := end - time.perf_counter()) > LEAST:
                try:
                    unit = queues[0].popleft()
                except IndexError:
                    queues = queues[1:]
                    continue
                record = worker.run(unit, min(rest[unit], left))
                # What the stage's end has cut off is for the next run, not a result.
                if record["status"] != "timeout" or left >= rest[unit]:
                    store.add(record)
                _say(f"   {_line(unit, record)}")
        finally:
            worker.stop()

    threads = [
        threading.Thread(target=serve, args=(w, [small] if i else [large, small]))
        for i, w in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        small.clear()
        large.clear()
        for worker in workers:
            worker.stop()
        raise


def _line(unit: str, record: Record) -> str:
    text = f"{unit:<44} {record['status']:<9} {record.get('seconds', 0):6.1f} s"
    if "passed" in record:
        text += f"  {record['passed']} passed, {sum(record['refused'].values())} refused"
    for name, reason in list(record.get("failed", {}).items())[:3]:
        text += f"\n      {name}: {reason}"
    return text + (f"  {record['reason'][-300:]}" if record.get("reason") else "")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
