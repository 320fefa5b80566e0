"""Every CUDA kernel as it was compiled: architectures, registers, shared memory, wide loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import compiled
import pytest

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


class Budget(NamedTuple):
    """What a kernel may use at most on every architecture."""

    registers: int
    shared: int = 0  # static, in bytes
    wide: bool = False  # loads 16 bytes at once


# by kernel; those with template arguments share one line
BUDGETS = {
    "bias_gradients": Budget(64),
    "expand_bits": Budget(56),
    "finish_linear": Budget(48),
    "group_affine": Budget(48, wide=True),
    "group_affine_backward": Budget(64, shared=8192, wide=True),
    "group_affine_finish": Budget(40),
    "masked_linear_dx": Budget(128),
    "masked_linear_forward": Budget(128),
    "masked_linear_gradients": Budget(128, shared=9472),
    "pack_bits": Budget(32, wide=True),
    "rnn_backward": Budget(128, wide=True),
    "rnn_cell_backward": Budget(80, wide=True),
    "rnn_cell_forward": Budget(80, wide=True),
    "rnn_forward": Budget(128, wide=True),
    "sample_backward": Budget(80, wide=True),
    "sample_bits": Budget(104, wide=True),
    "sample_values": Budget(104, wide=True),
    "selected_product": Budget(128, shared=8704, wide=True),
    "top_k_count": Budget(48, shared=8192),
    "top_k_cut": Budget(48, shared=64),
    "top_k_digit": Budget(64, shared=64),
    "top_k_list": Budget(32),
    "top_k_ranks": Budget(48, shared=64),
    "top_k_start": Budget(32),
    "top_k_ties": Budget(48, shared=64),
    "top_k_write": Budget(48, shared=64),
}


def family(kernel: str) -> str:
    return kernel.split("<", 1)[0]


@pytest.fixture(scope="module")
def resources(library: Path) -> dict[tuple[str, str], compiled.Resources]:
    return compiled.resources(library)


@pytest.fixture(scope="module")
def instructions(library: Path) -> dict[tuple[str, str], list[str]]:
    return compiled.instructions(library)


def test_machine_code_for_four_architectures_and_ptx_for_later_ones(library: Path) -> None:
    assert compiled.architectures(library) == set(ARCHITECTURES)
    assert compiled.ptx(library) == {"sm_120"}


def test_every_kernel_has_a_budget(resources) -> None:
    assert {family(kernel) for kernel, _ in resources} == set(BUDGETS)
    by_architecture = {a: {k for k, other in resources if other == a} for a in ARCHITECTURES}
    assert len({frozenset(kernels) for kernels in by_architecture.values()}) == 1


@pytest.mark.parametrize("name", BUDGETS)
def test_resources(resources, name: str) -> None:
    """No stack and no spilled registers; registers and shared memory within the budget."""
    budget = BUDGETS[name]
    for (kernel, architecture), used in resources.items():
        if family(kernel) == name:
            where = f"{kernel} on {architecture}: {used}"
            assert used.stack == 0, where
            assert used.local == 0, where
            assert used.registers <= budget.registers, where
            # from sm_90 on, 1 KiB belongs to the system
            system = 0 if architecture == "sm_80" else 1024
            assert used.shared <= budget.shared + system, where


@pytest.mark.parametrize("name", [name for name, budget in BUDGETS.items() if budget.wide])
def test_wide_loads(instructions, name: str) -> None:
    wide = re.compile(r"LDG\.E(\.\w+)*\.(128|256)")
    for (kernel, architecture), names in instructions.items():
        if family(kernel) == name:
            assert any(map(wide.match, names)), f"{kernel} on {architecture}"


def test_no_local_memory(instructions) -> None:
    """Loads and stores of local memory are spilled registers."""
    for where, names in instructions.items():
        assert not [n for n in names if n.startswith(("LDL", "STL"))], where
