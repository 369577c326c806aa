"""Frameworks' own tests: an environment for them, their source distributions, and which of the tests pass."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

__all__ = ["ROOT", "SUITES", "fetched_source", "make_environment", "outcomes"]

SUITES = Path(__file__).resolve().parent
ROOT = SUITES.parents[1]


def _run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command; show its output only if it fails. Tests that fail are none of its failures."""
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, check=False, **options)
    if done.returncode > 1:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-5000:]}{done.stderr[-5000:]}")
    return done


def make_environment(folder: Path, *requirements: str) -> Path:
    """Make an environment with these packages; return its interpreter."""
    _run(sys.executable, "-m", "venv", folder)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    _run(python, "-m", "pip", "install", "--quiet", *requirements)
    return python


def fetched_source(python: Path, folder: Path, distribution: str) -> tuple[str, Path]:
    """Fetch the source distribution of the installed release; return the version and the folder of the source."""
    code = f"import importlib.metadata as metadata; print(metadata.version({distribution!r}))"
    version = _run(python, "-c", code).stdout.strip()
    pip = (python, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", folder)
    _run(*pip, f"{distribution}=={version}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return version, source


def outcomes(python: Path, source: Path, *arguments: str, **variables: str) -> dict[str, bool]:
    """Run tests, without the options of the framework; return whether each passed, except for skipped ones.

    Args:
        python: the interpreter of their environment.
        source: where they are run.
        arguments: which ones, and further options of pytest.
        variables: variables of the environment.

    """
    report = source / "report.xml"
    pytest = (python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junit-xml={report}")
    _run(*pytest, *arguments, cwd=source, env={**os.environ, **variables})
    return {
        f"{case.get('classname')}::{case.get('name')}": case.find("failure") is None and case.find("error") is None
        for case in ElementTree.parse(report).iter("testcase")
        if case.find("skipped") is None
    }
