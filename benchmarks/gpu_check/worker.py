"""A process that runs units one after the other, and the handle by which it is driven.

A kernel that hangs cannot be interrupted from within, and one that writes where it must not leaves
nothing usable behind: the handle kills such a process and starts another.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import Any

Record = dict[str, Any]
MARK = "@@ "


class Worker:
    """Runs units of a stage on a device, each within its time."""

    def __init__(self, stage: str, device: str) -> None:
        self._command = [sys.executable, __file__, stage, device]
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def _start(self) -> subprocess.Popen[str]:
        # A session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    lines.put(line[len(MARK) :])
                else:
                    sys.stderr.write(line)
            lines.put(None)

        threading.Thread(target=listen, daemon=True).start()
        self._lines = lines
        return process

    def run(self, unit: str, seconds: float) -> Record:
        """The unit's record; its status is "timeout" or "crashed" where there is no other."""
        process = self._process or self._start()
        self._process, began = process, time.perf_counter()
        try:
            assert process.stdin is not None
            process.stdin.write(unit + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            return {"unit": unit, "status": "timeout", "seconds": seconds}
        except BrokenPipeError:
            line = None
        if line is None:
            code = process.wait()
            self._process = None
            return {"unit": unit, "status": "crashed", "reason": f"exit status {code}"}
        record: Record = json.loads(line)
        if record.get("fatal"):
            self.stop()
        return record | {"seconds": round(time.perf_counter() - began, 2)}

    def stop(self) -> None:
        """End the process and its children."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def _fatal(error: str) -> bool:
    """Whether a CUDA context is beyond use: everything after such an error would fail as well."""
    signs = ("illegal memory access", "device-side assert", "unspecified launch failure")
    return any(sign in error for sign in (*signs, "misaligned address", "illegal instruction"))


def main(stage: str, device: str) -> None:
    """Answer every unit on standard input with a line of JSON."""
    import units

    for line in sys.stdin:
        unit = line.strip()
        try:
            record = units.run(stage, unit, device)
        except Exception as error:  # a unit may fail in any way; the record says how
            traceback.print_exc()
            record = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]}
        text = json.dumps({"unit": unit} | record)
        if _fatal(text):
            text = json.dumps({"unit": unit} | record | {"fatal": True})
        print(MARK + text, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
