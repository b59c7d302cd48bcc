"""PEFT's own tests pass on LoRS; see ``peft_suite`` and ``peft_plugin``."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from peft_suite import FILES, SUPPORT, UnavailableError, run, unexpected, unpack


def write_archive(file: Path, version: str, names: tuple[str, ...]) -> Path:
    """A source distribution of PEFT with some files in tests/."""
    with tarfile.open(file, "w:gz") as archive:
        texts = {"PKG-INFO": f"Name: peft\nVersion: {version}\n", **{f"tests/{name}": "" for name in names}}
        for name, text in texts.items():
            member = tarfile.TarInfo(f"peft-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return file


@pytest.mark.slow
def test_the_tests_of_peft_pass(tmp_path: Path) -> None:
    try:
        report = run(tmp_path / "outcomes.json")
    except UnavailableError as error:
        pytest.skip(str(error))
    assert not unexpected(report)
    for file, least in zip(FILES, (1000, 400), strict=True):
        passed = sum(file in test for test, outcome in report["outcomes"].items() if outcome == "passed")
        assert passed >= least, f"only {passed} tests of {file} ran"


def test_only_the_tests_are_unpacked(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "peft.tar.gz", "1.0", (*FILES, *SUPPORT, "test_other.py"))
    unpack(archive, "1.0", tmp_path / "a" / "b")
    assert {file.name for file in (tmp_path / "a" / "b" / "tests").iterdir()} == {*FILES, *SUPPORT}


@pytest.mark.parametrize(
    ("version", "names", "message"),
    [("2.0", FILES + SUPPORT, "is peft 2.0, not peft 1.0"), ("1.0", FILES, "no source distribution with PEFT's tests")],
)
def test_another_archive_is_refused(tmp_path: Path, version: str, names: tuple[str, ...], message: str) -> None:
    archive = write_archive(tmp_path / "peft.tar.gz", version, names)
    with pytest.raises(UnavailableError, match=message):
        unpack(archive, "1.0", tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "peft.tar.gz").write_bytes(b"<html>")
    with pytest.raises(UnavailableError, match="no source distribution"):
        unpack(tmp_path / "peft.tar.gz", "1.0", tmp_path / "a" / "b")
