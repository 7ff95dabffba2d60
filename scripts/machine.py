"""What a measurement ran on: machine, versions, commit, command and date, the same for every script that measures."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# Instructions that decide how fast matrix products are, as Linux names them.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "bf16", "sve")
PACKAGES = ("torch", "transformers", "xlstm-transformers")


def describe_machine(*packages: str) -> dict[str, Any]:
    """Machine, versions, commit, command and date of the running script.

    Args:
        packages: distributions to name beside torch, transformers and this one; None where one is not installed.

    Returns:
        about: plain values that JSON takes; no path of this machine is among them.
    """
    processor = _processor()
    present = processor.get("flags", processor.get("Features", "")).split()
    return {
        "cpu": processor.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in present],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in (*PACKAGES, *packages)}},
        "commit": _commit(),
        "command": command(),
        "date": datetime.date.today().isoformat(),
    }


def machine_in_words(about: dict[str, Any]) -> str:
    """The same as one line of text."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    cpu = f"{about['cores']} {about['architecture']} CPU cores ({', '.join([about['cpu'], *about['flags']])})"
    place = about["gpu"] or cpu
    return f"{about['date']}, commit {about['commit'] or 'unknown'}, {place}, {about['threads']} threads; {versions}"


def command() -> str:
    """The line that started this script; of absolute paths only the last part."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *(f'"{w}"' if " " in w else w for w in words)])


def _processor() -> dict[str, str]:
    """What Linux says of the first core; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").split("\n\n")[0].splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the clone this script lies in, marked if files were changed; None where it is no clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        done = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
