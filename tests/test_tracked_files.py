"""What stands in every file of a clone: nothing of one machine, and one version."""

from __future__ import annotations

import re

import pytest
from checkout import ROOT, tracked_files

MACHINE_PATH = re.compile(r"(?<![\w.~}-])/(work|tmp|root|home|farm|opt|mnt|Users)/\w")
REGISTRY = re.compile(
    r"\b(pypi\.org|pypi\.python\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|pypi\.nvidia\.com)\b"
    r"|\b(pkg\.dev|jfrog\.io|[a]rtifactory|[d]evpi)\b"
    r"|--(extra-)?[i]ndex-url|--[f]ind-links|PIP_(EXTRA_)?[I]NDEX_URL|PIP_[F]IND_LINKS"
)


def text_of(name: str) -> str:
    """The text of a file; a file that is not text, such as tensors, has none."""
    try:
        return (ROOT / name).read_text("utf-8")
    except UnicodeDecodeError:
        return ""


def found(pattern: re.Pattern[str], name: str, text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    return [f"{name}:{i}: {hit[0]}" for i, line in lines if (hit := pattern.search(line))]


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine path", "registry host"])
def test_no_file_names_a_machine_path_or_a_registry_host(pattern: re.Pattern[str]) -> None:
    names = tracked_files()
    assert "tests/test_tracked_files.py" in names
    assert [hit for name in names for hit in found(pattern, name, text_of(name))] == []


@pytest.mark.parametrize("folder", ["home", "tmp", "root", "work"])
def test_a_planted_machine_path_is_found(folder: str) -> None:
    path = f"/{folder}/someone"
    for line in (path, f'open("{path}")', f"cd {path}", f"PATH={path}:$PATH"):
        assert found(MACHINE_PATH, "planted", line), line
    for line in (f"https://example.org{path}", f"docs{path}", f"~{path}", f"..{path}", "#!/usr/bin/env bash"):
        assert not found(MACHINE_PATH, "planted", line), line


@pytest.mark.parametrize("host", ["files.pythonhosted" + ".org", "pypi" + ".org/simple", "--extra-index" + "-url x"])
def test_a_planted_registry_host_is_found(host: str) -> None:
    assert found(REGISTRY, "planted", f"pip install --some-option https://{host}") or found(REGISTRY, "planted", host)


def test_every_file_that_names_the_version_names_the_same() -> None:
    spellings = {
        "pyproject.toml": r'^version = "(.+)"$',
        "modeling_xlstm/__init__.py": r'^__version__ = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
    }
    versions = {name: re.findall(line, text_of(name), re.MULTILINE) for name, line in spellings.items()}
    assert len(versions["pyproject.toml"]) == 1
    assert all(found == versions["pyproject.toml"] for found in versions.values()), versions
