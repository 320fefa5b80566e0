"""docs/matrix.md says what the tests cover, and nothing else."""

import subprocess
import sys
from pathlib import Path

import matrix

ROOT = Path(__file__).parents[2]
CELLS = [
    cell for table in matrix.tables().values() for row in table.values() for cell in row.values()
]


def test_the_page_is_the_table():
    """If not: python tests/packaging/matrix.py > docs/matrix.md"""
    assert (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8") == matrix.page()


def test_every_cell_has_a_test_or_a_reason():
    assert all(cell.test or cell.reason for cell in CELLS)


def test_the_named_tests_exist():
    tests = {cell.test for cell in CELLS if cell.test}
    files = sorted({test.split("::")[0] for test in tests})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert tests <= set(done.stdout.splitlines())
