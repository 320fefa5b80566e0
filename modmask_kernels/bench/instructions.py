"""Machine instructions that masks cost per weight, from the compiled kernels.

`python -m modmask_kernels.bench.instructions` writes docs/results/gpu/instructions.json and the
table beside it; Triton must be installed, a GPU is not needed.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import triton

from ..ops import _triton
from . import aot

CAPABILITIES = (80, 90, 100, 120)
KINDS = ("integer", "float", "all", "slots")
# of the same tile, so that the plain product can be subtracted
BITS = _triton.Config(128, 128, 64, 8, 3)
REGENERATE = _triton.Config(128, 64, 64, 8, 2)
GRADIENTS = _triton.Config(64, 64, 64, 8, 3)
INTEGER = (
    *(
        "IMAD",
        "IMAD.WIDE",
        "IMAD.HI",
        "IADD",
        "IADD3",
        "VIADD",
        "LOP3",
        "SHF",
        "LEA",
        "PRMT",
        "SEL",
        "ISETP",
        "PLOP3",
    ),
    *("VIMNMX", "IMNMX", "IMUL", "SHL", "SHR", "I2F", "I2FP", "F2I"),
)
FLOAT = ("FADD", "FADD2", "FMUL", "FMUL2", "FFMA", "FFMA2", "FMNMX", "FSETP", "FSEL", "MUFU")
# A processor issues 128 lanes per cycle; its units take fewer: 64 integer, logical and comparing
# operations or multiply-adds (throughput table of the CUDA programming guide), here 32 of those
# with a 64-bit product, and 16 special functions.
_LOGIC = {*INTEGER, "FMNMX", "FSETP", "FSEL"} - {"IMAD", "IMAD.WIDE", "IMAD.HI", "IMUL"}
UNITS = (
    dict.fromkeys(_LOGIC, 2),
    {"IMAD": 2, "IMUL": 2, "IMAD.WIDE": 4, "IMAD.HI": 4},
    dict.fromkeys(("MUFU", "I2F", "F2I"), 8),
)
ROWS = {
    "bits": "unpacking bits in a product, per weight and tile of rows",
    "regenerate": "drawing a hard mask in a product, per weight and tile of rows",
    "pack": "drawing a hard mask and packing it, per weight and mask",
    "pack_once": "packing, beside that per weight",
    "slope": "drawing the slope of the surrogate in dlogits, per weight and sample",
    "slope_once": "the slope, beside that per weight",
}


def slots(counts: Counter[str]) -> int:
    """Issue slots of lanes that instructions need, of the issue or of their busiest unit."""
    units = (sum(counts[name] * n for name, n in unit.items()) for unit in UNITS)
    return max(sum(counts.values()), *units)


def _per_weight(counts: Counter[str], threads: int, weights: int) -> dict[str, float]:
    scale = threads / weights
    integer = sum(counts[name] for name in INTEGER)
    floating = sum(counts[name] for name in FLOAT)
    return {
        "integer": round(integer * scale, 1),
        "float": round(floating * scale, 1),
        "all": round(sum(counts.values()) * scale, 1),
        "slots": round(slots(counts) * scale, 1),
    }


def measure(capability: int) -> dict[str, dict[str, float]]:
    """Instructions per weight beyond those of the kernel without masks, by `ROWS`."""

    def forward(source: str, config: _triton.Config) -> aot.Launch:
        return aot.launch_of("forward", source=source, config=config)

    def compiled(launch: aot.Launch) -> aot.Compiled:
        return aot.compile_launch(launch, capability)

    def less(more: Counter[str], fewer: Counter[str]) -> Counter[str]:
        more = more.copy()
        more.subtract(fewer)
        return more

    def extra(more: aot.Compiled, weights: int, once: bool) -> dict[str, float]:
        """Beyond the plain gradient, of the loop over samples or of what is outside of it."""

        def part(found: aot.Compiled) -> Counter[str]:
            inside = found.instructions(loop=True)
            return less(found.instructions(), inside) if once else inside

        return _per_weight(less(part(more), part(plain)), more.threads, weights)

    def product(source: str, config: _triton.Config) -> dict[str, float]:
        """Of the loop over the depth, which runs once per tile of the weight."""
        masked = forward(source, config)
        dense = forward("regenerate", config).with_arguments(SOURCE=_triton.DENSE.value)
        found = compiled(masked)
        # where products wait in loops of their own, all is counted
        loop = capability != 100
        counts = less(found.instructions(loop), compiled(dense).instructions(loop))
        return _per_weight(counts, found.threads, config.n * config.k)

    threshold = aot.launch_of("gradients", estimator=_triton.THRESHOLD.value, config=GRADIENTS)
    plain = compiled(threshold.with_arguments(NOISE=False))
    slope = compiled(aot.launch_of("gradients", config=GRADIENTS))
    pack = aot.launch_of("pack")
    packed = compiled(pack)
    loop = packed.instructions(loop=True)
    weights, tile = 32 * pack.arguments["ROWS"], GRADIENTS.m * GRADIENTS.n
    return {
        "bits": product("bits", BITS),
        "regenerate": product("regenerate", REGENERATE),
        "pack": _per_weight(loop, packed.threads, weights),
        "pack_once": _per_weight(less(packed.instructions(), loop), packed.threads, weights),
        "slope": extra(slope, tile, False),
        "slope_once": extra(slope, tile, True),
    }


def table(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Instructions per weight",
        "",
        "Static counts of machine instructions that masks add to the kernels, from the compiler's",
        f"output (Triton {results['triton']}, bfloat16);",
        "nothing was run. Integer / floating-point / all / slots, per lane: a slot is 1/128 of a",
        "cycle of a processor, of which an instruction takes more than one where its unit is the",
        "busiest. Of products and gradients the difference to the same kernel without masks: of",
        "products the loop over their depth (sm_100: everything); of packing and gradients the",
        "loop over samples and, beside it, what is outside. Made by",
        "`python -m modmask_kernels.bench.instructions`.",
        "",
        "| masks | " + " | ".join(f"sm_{c}" for c in CAPABILITIES) + " |",
        "| --- |" + " --- |" * len(CAPABILITIES),
    ]
    for name, text in ROWS.items():
        cells = [
            " / ".join(f"{results[str(c)][name][kind]:g}" for kind in KINDS) for c in CAPABILITIES
        ]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    results: dict[str, Any] = {"triton": triton.__version__}
    for capability in CAPABILITIES:
        results[str(capability)] = measure(capability)
    folder = Path("docs/results/gpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "instructions.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "instructions.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
