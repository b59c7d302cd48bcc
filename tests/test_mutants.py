"""The list of errors put into the code on purpose fits the code; ``python tests/mutants.py`` runs it."""

import pytest
from mutants import MUTANTS, ROOT, Mutant, fault_of


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.text}")
def test_a_mutant_can_be_applied(mutant: Mutant) -> None:
    assert fault_of(mutant) is None
    assert all((ROOT / f"tests/test_{name}.py").is_file() for name in mutant.tests.split())
