"""Builds the extensions for this machine's device, in place and without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from store import ROOT, fingerprint

Record = dict[str, Any]
SOURCES = ("csrc/**/*.*", "setup.py")
#: Stands in for pybind11, of which setup.py asks where its headers are: torch has them too.
HEADERS = """
import os, torch
def get_include():
    return os.path.join(os.path.dirname(torch.__file__), "include")
"""


def _circumstances(device: str) -> Record:
    import torch

    archs = "none"
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        # Hopper's matrix instructions are in its own feature set alone.
        archs = f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
    return {"sources": fingerprint(SOURCES), "python": sys.version, "archs": archs}


def stale(device: str, out: Path) -> bool:
    """Whether the last build is another's or its module is gone, or there was none."""
    path = out / "build.json"
    if not path.exists():
        return True
    record = json.loads(path.read_text())
    gone = record["status"] == "ok" and not list((ROOT / "pad_kernels").glob("_C*.so"))
    return bool(record["of"] != _circumstances(device) or gone)


def run(device: str, out: Path, seconds: float, fresh: bool) -> Record:
    """Build what is stale; the record, which is on disk too."""
    path, of = out / "build.json", _circumstances(device)
    if not fresh and not stale(device, out):
        record: Record = json.loads(path.read_text())
        return record
    began = time.perf_counter()
    record = _compile(of["archs"], seconds)
    modules = _modules()
    # Installing without an extension is no failure of setup.py, but it is one here.
    wanted = ("cpp", "cuda") if device.startswith("cuda") else ("cpp",)
    lacking = {n: modules[n] for n in wanted if modules.get(n, "available") != "available"}
    if lacking and record["status"] == "ok":
        record |= {"status": "failed", "reason": f"{record['log'][-500:]}\n{lacking}"}
    record |= {"of": of, "seconds": round(time.perf_counter() - began, 1), "modules": modules}
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def _compile(archs: str, seconds: float) -> Record:
    """``setup.py build_ext --inplace``, next to links to the sources.

    Not in the sources' own folder: there setuptools reads pyproject.toml, which one that is older
    than the package's metadata refuses, and an extension needs none of it.
    """
    environment = os.environ | {"PAD_KERNELS_CUDA_ARCHS": archs}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("setup.py", "csrc", "pad_kernels"):
            Path(folder, name).symlink_to(ROOT / name)
        if importlib.util.find_spec("pybind11") is None:
            Path(folder, "headers").mkdir()
            Path(folder, "headers", "pybind11.py").write_text(HEADERS)
            environment["PYTHONPATH"] = os.path.join(folder, "headers")
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        try:
            found = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"status": "timeout", "reason": f"over {seconds:.0f} s"}
    status = "failed" if found.returncode else "ok"
    return {"status": status, "log": found.stdout[-3000:]} | (
        {"reason": found.stdout.strip()[-300:]} if found.returncode else {}
    )


def _modules() -> dict[str, str]:
    """What can be loaded, as a new process sees it, or why it cannot."""
    code = "import json, pad_kernels as pk; print(json.dumps(pk.available_backends()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode:
        return {"error": found.stderr[-500:]}
    modules: dict[str, str] = json.loads(found.stdout.splitlines()[-1])
    return modules
