"""Run PEFT's own tests of its methods on ``lors.LorsConfig``: ``python tests/peft_suite.py [--out FILE] [-k ...]``.

``tests/test_custom_models.py`` and ``tests/test_decoder_models.py`` of the source distribution of the installed PEFT,
fetched once with pip and kept in ``~/.cache/lors`` (or ``$XDG_CACHE_HOME/lors``), run offline in a process of their own
with ``peft_plugin``, which says what is run. Prints how many pass, fail and are skipped, and each failure with what is
known of it, and writes the outcome of every test to a JSON file. Exits 1 if a failure is not in ``KNOWN_FAILURES``, or
one of those passes. Further arguments are pytest's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from email.parser import Parser
from fnmatch import fnmatchcase
from pathlib import Path

FILES = ("test_custom_models.py", "test_decoder_models.py")
SUPPORT = ("testing_common.py", "testing_utils.py")

# Pattern of test ids -> why it cannot pass. What says nothing about LoRS is skipped instead: peft_plugin.cannot_apply.
KNOWN_FAILURES: dict[str, str] = {}


class UnavailableError(Exception):
    """PEFT's tests cannot be had; the message says what to do."""


def sources() -> Path:
    """Folder with ``tests/`` of the installed version of PEFT; fetched if it is not there yet.

    Raises:
        UnavailableError: pip cannot fetch the source distribution, or it does not have the tests.
    """
    version = importlib.metadata.version("peft")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lors"
    folder = cache / f"peft-{version}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            unpacked = Path(scratch) / "unpacked"
            unpack(_download(version, Path(scratch)), version, unpacked)
            try:
                unpacked.rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    (folder / "tests" / "__init__.py").touch()  # they import each other as parts of a package
    return folder


def _download(version: str, folder: Path) -> Path:
    """The source distribution; pip compares it with the checksum of the index."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft", "--no-build-isolation"]
    command += ["--retries", "1", "--timeout", "30", "-d", str(folder), f"peft=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    archive = folder / f"peft-{version}.tar.gz"
    if done.returncode or not archive.is_file():
        reason = (done.stderr.strip() or done.stdout.strip() or "no file").splitlines()[-1]
        raise UnavailableError(
            f"pip cannot fetch the source distribution of peft {version} ({reason}): connect to a package index, or "
            f"unpack {archive.name} in {folder.parent}"
        )
    return archive


def unpack(archive: Path, version: str, folder: Path) -> None:
    """Check that an archive is PEFT's source distribution of a version and has the tests; unpack those to ``folder``.

    Raises:
        UnavailableError: It is something else.
    """
    root = f"peft-{version}"
    try:
        with tarfile.open(archive) as content:
            about = Parser().parsestr(content.extractfile(f"{root}/PKG-INFO").read().decode())
            members = [content.getmember(f"{root}/tests/{name}") for name in FILES + SUPPORT]
            if (about["Name"], about["Version"]) != ("peft", version):
                raise UnavailableError(f"{archive.name} is {about['Name']} {about['Version']}, not peft {version}")
            for member in members:
                member.name = member.name.removeprefix(f"{root}/")
                content.extract(member, folder, filter="data")
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise UnavailableError(
            f"{archive.name} is no source distribution with PEFT's tests ({error}): get tests/ of v{version} from "
            f"github.com/huggingface/peft into {folder.parent.parent / root}"
        ) from None


def run(outcomes: Path, *arguments: str) -> dict:
    """Run the tests, with further ``arguments`` for pytest, and write ``outcomes`` (JSON).

    Returns:
        The content of the file: ``passed``, ``failed`` and ``skipped`` (numbers; left out where 0), ``outcomes`` (test
        -> one of these) and ``reasons`` (failed test -> traceback, skipped test -> why).

    Raises:
        UnavailableError: See ``sources``.
    """
    folder = sources()
    here = Path(__file__).parent
    outcomes.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as hub:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": hub,
            "PYTEST_ADDOPTS": "",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]),
        }
        environment.setdefault("OMP_NUM_THREADS", "1")
        write = f"import pathlib, peft_plugin; peft_plugin.write_models(pathlib.Path({hub!r}))"
        subprocess.run([sys.executable, "-c", write], env=environment, check=True, capture_output=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_plugin", "-p", "no:cacheprovider", "-W", "ignore"]
        command += ["-c", os.devnull, "--rootdir", str(folder), "--outcomes", str(outcomes.resolve())]
        done = subprocess.run([*command, *(f"tests/{name}" for name in FILES), *arguments], env=environment, cwd=folder)
    if not outcomes.is_file():
        raise RuntimeError(f"pytest ended with {done.returncode} before it had an outcome")
    return json.loads(outcomes.read_text())


def known_reason(test: str) -> str | None:
    """Why a test is known to fail."""
    return next((reason for pattern, reason in KNOWN_FAILURES.items() if fnmatchcase(test, pattern)), None)


def unexpected(report: dict) -> list[str]:
    """What differs from ``KNOWN_FAILURES``, a line each: other failures, and known ones that pass."""
    failed = [test for test, outcome in report["outcomes"].items() if outcome == "failed"]
    lines = [f"{test}: {report['reasons'][test].splitlines()[-1]}" for test in failed if known_reason(test) is None]
    for pattern in KNOWN_FAILURES:
        if not any(fnmatchcase(test, pattern) for test in failed):
            lines.append(f"{pattern}: passes now; take it from KNOWN_FAILURES")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("peft_suite.json"), help="JSON file for the outcomes")
    options, for_pytest = parser.parse_known_args()
    try:
        report = run(options.out, *for_pytest)
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return 2
    for file in FILES:
        counts = {key: 0 for key in ("passed", "failed", "skipped")}
        for test, outcome in report["outcomes"].items():
            counts[outcome] += file in test
        print(f"{file}: {', '.join(f'{number} {key}' for key, number in counts.items())}")
    for test, outcome in report["outcomes"].items():
        if outcome == "failed":
            print(f"{test}: {known_reason(test) or 'not known'}")
    return int(bool(unexpected(report)))


if __name__ == "__main__":
    sys.exit(main())
