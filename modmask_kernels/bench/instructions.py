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
# of the same tile, so that the plain product can be subtracted
CONFIG = _triton.Config(128, 64, 64, 8, 2)
INTEGER = (
    *("IMAD", "IADD", "IADD3", "VIADD", "LOP3", "SHF", "LEA", "PRMT", "SEL", "ISETP", "PLOP3"),
    *("VIMNMX", "IMNMX", "IMUL", "SHL", "SHR", "I2F", "I2FP", "F2I"),
)
FLOAT = ("FADD", "FADD2", "FMUL", "FMUL2", "FFMA", "FFMA2", "FMNMX", "FSETP", "FSEL", "MUFU")
ROWS = {
    "bits": "unpacking bits in a product, per weight and tile of rows",
    "regenerate": "drawing a hard mask in a product, per weight and tile of rows",
    "pack": "drawing a hard mask and packing it, per weight and mask",
    "slope": "drawing the slope of the surrogate in dlogits, per weight and sample",
}


def _per_weight(counts: Counter[str], threads: int, weights: int) -> dict[str, float]:
    scale = threads / weights
    integer = sum(counts[name] for name in INTEGER)
    floating = sum(counts[name] for name in FLOAT)
    return {
        "integer": round(integer * scale, 1),
        "float": round(floating * scale, 1),
        "all": round(sum(counts.values()) * scale, 1),
    }


def measure(capability: int) -> dict[str, dict[str, float]]:
    """Instructions per weight beyond those of the kernel without masks, by `ROWS`."""

    def forward(source: str) -> aot.Launch:
        return aot.launch_of("forward", source=source, config=CONFIG)

    def compiled(launch: aot.Launch) -> aot.Compiled:
        return aot.compile_launch(launch, capability)

    dense = compiled(forward("regenerate").with_arguments(SOURCE=_triton.DENSE.value))

    def extra(more: aot.Compiled, less: aot.Compiled, weights: int) -> dict[str, float]:
        counts = more.instructions()
        counts.subtract(less.instructions())
        return _per_weight(counts, more.threads, weights)

    tile = CONFIG.n * CONFIG.k
    plain = aot.launch_of("gradients", estimator=_triton.THRESHOLD.value, config=CONFIG)
    noisy = aot.launch_of("gradients", config=CONFIG)
    pack = aot.launch_of("pack")
    packed = compiled(pack)
    loop = packed.instructions(loop=True)
    return {
        "bits": extra(compiled(forward("bits")), dense, tile),
        "regenerate": extra(compiled(forward("regenerate")), dense, tile),
        "pack": _per_weight(loop, packed.threads, 32 * pack.arguments["ROWS"]),
        "slope": extra(
            compiled(noisy),
            compiled(plain.with_arguments(NOISE=False)),
            CONFIG.m * CONFIG.n,
        ),
    }


def table(results: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Instructions per weight",
        "",
        "Static counts of machine instructions that masks add to the kernels, from the compiler's",
        f"output (Triton {results['triton']}, bfloat16, tiles of {CONFIG.m}x{CONFIG.n}x{CONFIG.k}, "
        f"{CONFIG.warps} warps);",
        "nothing was run. Integer / floating-point / all, per lane. Of products the difference to",
        "the same kernel without masks, of packing the loop over masks. Made by",
        "`python -m modmask_kernels.bench.instructions`.",
        "",
        "| masks | " + " | ".join(f"sm_{c}" for c in CAPABILITIES) + " |",
        "| --- |" + " --- |" * len(CAPABILITIES),
    ]
    for name, text in ROWS.items():
        cells = [
            " / ".join(f"{results[str(c)][name][kind]:g}" for kind in ("integer", "float", "all"))
            for c in CAPABILITIES
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
