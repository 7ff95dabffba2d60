"""README.md tells the truth: its set-up lines, its map of the house, its snippets.

The map is the fenced block under the heading "Map". The first column of each line, up to two spaces, is a path from
the root, or several with commas between them; a folder ends in `/`. The root, and every folder of which the map names
an entry, is listed in full; entries whose name starts with a dot may be left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from checkout import ROOT, tracked_files

SETUP_LINES = ['pip install -e ".[test]" && pytest', "pip install -e . && python scripts/quickstart.py"]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a snippet runs under: a process that cannot open a connection.
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise OSError("README snippets run without a network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


def map_of(text: str) -> list[str]:
    """The paths of the map."""
    section = re.search(r"^#+ Map$(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    fence = FENCE.search(section[1]) if section else None
    assert fence, 'README.md has no fenced block under a heading "Map"'
    columns = [re.split(r"\s{2,}", line.strip())[0] for line in fence[2].splitlines() if line.strip()]
    return [path.strip() for column in columns for path in column.split(",")]


def map_faults(paths: list[str], files: list[str]) -> list[str]:
    """How a map and a list of files disagree."""
    folders = {f"{folder}/" for file in files for folder in PurePosixPath(file).parents if folder.name}
    tree = {*files, *folders}
    parent = {entry: entry.rstrip("/").rpartition("/")[0] for entry in tree}
    opened = {"", *(parent[path] for path in paths if path in tree)}
    wanted = {entry for entry in tree if parent[entry] in opened and not PurePosixPath(entry).name.startswith(".")}
    twice = sorted({path for path in paths if paths.count(path) > 1})
    return [
        *(f"not in the tree: {path}" for path in paths if path not in tree),
        *(f"not in the map: {entry}" for entry in sorted(wanted - set(paths))),
        *(f"twice in the map: {path}" for path in twice),
    ]


def run_snippets(snippets: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the snippets one after the other in one fresh, offline process with an empty working folder."""
    script = "\n".join([NO_NETWORK, *snippets])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("line", SETUP_LINES)
def test_the_readme_holds_the_setup_line(line: str) -> None:
    assert line in readme().splitlines()


def test_the_map_in_the_readme_is_the_tree() -> None:
    faults = map_faults(map_of(readme()), tracked_files())
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("page", ["README.md", "docs/cells.md", "docs/sequences.md"])
def test_the_python_on_a_page_runs_offline(page: str, tmp_path: Path) -> None:
    snippets = [code for language, code in FENCE.findall((ROOT / page).read_text("utf-8")) if language == "python"]
    assert snippets, f"{page} shows no python"
    done = run_snippets(snippets, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_wrong_map_is_found() -> None:
    text = "# A\n## Map\n```\nREADME.md, LICENSE   text\npkg/   code\npkg/a.py   a\n```\n## Next\n```\nno map\n```\n"
    files = ["LICENSE", "README.md", "pkg/a.py", ".ci/run", ".gitignore", "docs/deep/b.md"]
    assert map_of(text) == ["README.md", "LICENSE", "pkg/", "pkg/a.py"]
    assert map_faults(map_of(text), files) == ["not in the map: docs/"]
    right = [*map_of(text), "docs/"]
    assert map_faults(right, files) == []
    assert map_faults(right, [*files, "pkg/b.py"]) == ["not in the map: pkg/b.py"]
    assert map_faults([*right, "pkg/gone.py"], files) == ["not in the tree: pkg/gone.py"]
    assert map_faults([*right, "LICENSE"], files) == ["twice in the map: LICENSE"]


def test_a_broken_or_online_snippet_is_found(tmp_path: Path) -> None:
    online = "import urllib.request\nurllib.request.urlopen('http://example.org')"
    assert run_snippets(["x = 1", "assert x == 1"], tmp_path).returncode == 0
    assert run_snippets(["x = 1", "assert x == 2"], tmp_path).returncode == 1
    assert "without a network" in run_snippets([online], tmp_path).stderr
