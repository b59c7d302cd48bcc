"""PEFT's own tests of its methods pass on ``lors.LorsConfig``; ``peft_plugin`` says which are run, and how.

They come from the source distribution of the installed PEFT, fetched with pip, and run offline in a process apart.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest

# How many tests of each file apply to LoRS, at the least.
LEAST = {"test_custom_models": 450, "test_decoder_models": 400}


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The source distribution of the installed version of PEFT, unpacked."""
    name = f"peft-{importlib.metadata.version('peft')}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft", "--no-build-isolation"]
    command += ["--retries", "1", "--timeout", "30", "-d", str(tmp_path), name.replace("-", "==")]
    done = subprocess.run(command, capture_output=True, text=True)
    archive = tmp_path / f"{name}.tar.gz"
    if done.returncode or not archive.is_file():
        pytest.skip(f"pip cannot fetch the source distribution of {name}: {done.stderr.strip()[-500:]}")
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, filter="data")
    (tmp_path / name / "tests" / "__init__.py").touch()  # they import each other as parts of a package
    return tmp_path / name


@pytest.mark.slow
def test_the_tests_of_peft_pass(sources: Path, tmp_path: Path) -> None:
    here = Path(__file__).parent
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "PYTEST_ADDOPTS": "",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]),
    }
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_plugin", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-c", os.devnull, "--rootdir", str(sources), f"--junitxml={report}", "--tb=short"]
    command += [f"tests/{name}.py" for name in LEAST]
    done = subprocess.run(command, env=environment, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    cases = ET.parse(report).getroot().iter("testcase")
    passed = Counter(case.get("classname").split(".")[1] for case in cases if case.find("skipped") is None)
    assert all(passed[name] >= least for name, least in LEAST.items()), passed
