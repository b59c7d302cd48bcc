"""Errors put into the code on purpose, and the tests that must notice each of them.

    python tests/mutants.py              all of them, a few minutes
    python tests/mutants.py --only 3     the third alone

Each is applied to a copy of the tree, where its tests then run with ``-x -n 0``. First they run on the unchanged copy:
a test that fails there says nothing about a mutant. The exit code is 1 if a mutant survives or cannot be applied.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "outputs", "multirun", "site")


class Mutant(NamedTuple):
    """One changed text.

    Attributes:
        file: Path below the root.
        text: What is replaced; it stands in the file exactly once.
        replacement: What takes its place.
        tests: Names of test files, without ``test_`` and ``.py``, separated by blanks; one of them must fail.
    """

    file: str
    text: str
    replacement: str
    tests: str


MUTANTS = [
    # The library: gradients, merge, kernels, storage, initialisation, pruning.
    Mutant("lors/gradients.py", "r * height * width < wanted", "r * height * width > wanted", "functional"),
    Mutant("lors/gradients.py", "mask_(P := G.t() @ X, weight)", "P = G.t() @ X", "functional"),
    Mutant("lors/gradients.py", "gradient.to(dtype).mul_(scaling)", "gradient.to(dtype)", "functional"),
    Mutant("lors/gradients.py", "root.square(), alpha=-1)", "root.square(), alpha=1)", "gradients"),
    Mutant("lors/kernels/eager.py", "masked_(D[start:stop], M)", "masked_(D[start:stop], ~M)", "kernels"),
    Mutant("lors/kernels/eager.py", "masked_(scratch, W.bool())", "scratch", "kernels"),
    Mutant("lors/kernels/native.c", "0x7fff + ((bits >> 16) & 1)", "0x8000", "kernels"),
    Mutant("lors/kernels/layout.py", "(-1, per_byte)) << shifts)", "(-1, per_byte)) << shifts.flip(0))", "kernels"),
    Mutant("lors/sparse_layer.py", "stored.detach().clone()", "stored.detach()", "contract_edges adapters"),
    Mutant("lors/sparsity.py", "torch.where(weight != 0, merged, weight)", "merged", "sparsity"),
    Mutant("lors/initialization.py", "add_(gradient, alpha=tokens)", "add_(gradient)", "initialization"),
    Mutant("lors/pruning/wanda.py", "norms.to(exact).sqrt()", "norms.to(exact)", "pruners"),
    Mutant("lors/pruning/sparsegpt.py", "W[:, stop:] -= error", "W[:, stop:] += error", "sparsegpt"),
    Mutant("lors/pruning/walk.py", "sums[name].add_(part) if name in sums else part", "part", "prune_walk"),
    Mutant("lors/pruning/owl.py", "sparsity - sparsity_range *", "sparsity + sparsity_range *", "owl"),
    Mutant("lors/pruning/rmi.py", "sparsity - sparsity_range + above", "sparsity + sparsity_range - above", "rmi"),
    # The methods: a sign, a scale or a transposition each.
    Mutant("baselines/spp.py", "* c.squeeze(1)).mul_(scaling)", "* c.squeeze(1))", "spp"),
    Mutant("baselines/sqft.py", "((B @ A) * (weight != 0))", "(B @ A)", "sqft contract"),
    Mutant("baselines/sora.py", "(v.abs() - xi).clamp", "(v.abs() + xi).clamp", "sora"),
    Mutant("baselines/mora.py", "sign=-1)", "sign=1)", "mora"),
    Mutant("baselines/geolora.py", "= (new_V.t() @ L).t()", "= -(new_V.t() @ L).t()", "geolora"),
    Mutant("baselines/lora_rite.py", "b1 * (M @ P.mT)", "b1 * (M @ P)", "lora_rite"),
    Mutant("baselines/gelora.py", "max(after - before, 0)", "max(before - after, 0)", "gelora"),
    Mutant(
        "baselines/scale_lora.py",
        "self._product(name, weight.dtype).sub_(1)",
        "self._product(name, weight.dtype)",
        "scale_lora",
    ),
    Mutant("baselines/losa.py", "A[:rank], B[:, :rank]", "A, B", "losa"),
    Mutant("baselines/losa.py", "self._put_back(self._state)", "pass", "losa"),
    Mutant("baselines/reconstruct.py", "output.to(precise) - target", "output.to(precise) + target", "reconstruct"),
    # The harness: what is trained, measured, scored, stored.
    Mutant("harness/recipe.py", 'reduction="sum") / targets', 'reduction="mean")', "train"),
    Mutant("harness/deferred_head.py", "dZ.new_full(y.shape, -1.0)", "dZ.new_full(y.shape, 0.0)", "deferred_head"),
    Mutant("harness/evaluate.py", "scores.pop(gold) - max(scores)", "scores.pop(gold) - min(scores)", "evaluate"),
    Mutant("harness/perplexity.py", "mean = math.fsum(loss * weight", "mean = math.fsum(loss", "evaluate"),
    Mutant("harness/perplexity.py", "z[:-1].float(), y[1:]", "z[1:].float(), y[:-1]", "log_likelihood"),
    Mutant("harness/log_likelihood.py", "(parts[:, None, :] == 1)", "(parts[:, None, :] >= 1)", "log_likelihood"),
    Mutant("harness/evaluate.py", "metrics[0])", "metrics[-1])", "hub_tasks"),
    Mutant("harness/identity.py", "or value != ABSENT[key]", "or True", "identity"),
    Mutant("harness/sealed_folder.py", "or found[name] != sealed[name]", "", "sealed_folder"),
    Mutant("harness/meter.py", "for step in self.steps if not step.warmup]", "for step in self.steps]", "meter"),
    Mutant("harness/checkpoints.py", "if damage(path) is None:", "if path.is_dir():", "checkpoints"),
    Mutant("harness/zeros.py", 'kept = report["lost"] == 0', "kept = True", "harness_run"),
    Mutant("harness/cards.py", "peaks[number] + HEADROOM <=", "peaks[number] <=", "simulate"),
    # The analysis: what a table says of the results.
    Mutant("analysis/statistics.py", "return 2 * _rest_square(y)", "return _rest_square(y)", "analysis_statistics"),
    Mutant(
        "analysis/averages.py",
        'table.axes["pattern"] != "uns',
        'table.axes["pattern"] == "uns',
        "analysis_side_by_side",
    ),
]


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants that were asked for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", type=int, metavar="N", help=f"the N-th alone, 1 to {len(MUTANTS)}")
    only = parser.parse_args(arguments).only
    if only is not None and not 1 <= only <= len(MUTANTS):
        parser.error(f"--only={only}: allowed are 1 to {len(MUTANTS)}")
    numbered = {number: mutant for number, mutant in enumerate(MUTANTS, 1) if only in (None, number)}
    wrong = [f"{number}: {fault}" for number, mutant in numbered.items() if (fault := fault_of(mutant))]
    if wrong:
        print(*wrong, sep="\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        names = sorted({name for mutant in numbered.values() for name in mutant.tests.split()})
        clean = run_tests(tree, names)
        if clean.returncode:
            print(clean.stdout[-3000:], "the tests fail without a mutant", sep="\n")
            return 1
        killed = [is_killed(tree, number, mutant) for number, mutant in numbered.items()]
    print(f"{sum(killed)} of {len(killed)} killed")
    return 0 if all(killed) else 1


def fault_of(mutant: Mutant) -> str | None:
    """Why a mutant cannot be applied to the tree; None if it can."""
    file = ROOT / mutant.file
    if not file.is_file():
        return f"{mutant.file}: no such file"
    count = file.read_text(encoding="utf-8").count(mutant.text)
    return None if count == 1 else f"{mutant.file}: {mutant.text!r} stands there {count} times, must be once"


def is_killed(tree: Path, number: int, mutant: Mutant) -> bool:
    """Apply a mutant to the copy, run its tests, take it back, and say what came of it.

    Raises:
        RuntimeError: The tests did not run, which says nothing about the mutant.
    """
    file = tree / mutant.file
    original = file.read_text(encoding="utf-8")
    file.write_text(original.replace(mutant.text, mutant.replacement), encoding="utf-8")
    try:
        done = run_tests(tree, mutant.tests.split())
    finally:
        file.write_text(original, encoding="utf-8")
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not any("::" in test for test in failed):  # a file that could not be read has no test in it
        raise RuntimeError(f"{number} {mutant.file}: the tests did not run\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    print(f"{number:2} {'killed' if failed else 'SURVIVED'} {mutant.file}: {mutant.text}", *failed, flush=True)
    return bool(failed)


def run_tests(tree: Path, names: list[str]) -> subprocess.CompletedProcess[str]:
    """Run test files of the copy, up to the first failure."""
    files = [f"tests/test_{name}.py" for name in names]
    # Without bytecode: it would be taken for that of a mutant of the same size and second.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=short", *files]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
