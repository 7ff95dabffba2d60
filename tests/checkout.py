"""What a clone of the project holds, for the tests that guard the house."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_xlstm"
_LEFT_BY_TOOLS = {".git", ".venv", "__pycache__", "build", "dist", "out", "xlstm-quickstart"}


def tracked_files() -> list[str]:
    """Paths, relative to the root, of every file git tracks or would add; of every file where git is absent."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        found = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        return sorted(name for name in found if name and (ROOT / name).is_file())
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return sorted(p.as_posix() for p in paths if not _left_by_tools(p))


def _left_by_tools(path: Path) -> bool:
    return any(part in _LEFT_BY_TOOLS or part.endswith((".egg-info", "_cache")) for part in path.parts)
