"""Measures one row: checked, warmed, timed and weighed; what fails is told and not raised."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ...files import read_json
from ...ops import _gpu
from .. import roofline
from ..timing import Timing, Visitor, interleaved, ratio, summary
from ..verify import GateError
from .cases import Case, Linear, Prepared, precision_of
from .events import Device, Step

Row = dict[str, Any]

# parts of a masked layer's step: which steps of `Prepared.parts` tell them, and the kernels of
# `roofline.masked_step` that are theirs
PARTS = {
    "forward": ("forward", None, ("masks", "forward")),
    "dx": ("forward and dx", "forward", ("masks of dx", "dx")),
    "dlogits": ("forward and dlogits", "forward", ("dlogits",)),
}


class LostDeviceError(RuntimeError):
    """The device answers with errors only: a new process is needed."""


def reason_of(error: BaseException) -> str:
    """An exception in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def status_of(error: BaseException) -> str:
    """How a row is said to have ended."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return "wrong" if isinstance(error, GateError) else "failed"


def key_of(case: Case) -> str:
    """The name of a row among all suites."""
    return f"{case.suite}: {case.label}"


def measure(
    case: Case,
    device: Device,
    *,
    rounds: int = 5,
    visit_seconds: float = 0.01,
    leave_out: tuple[str, ...] = (),
) -> Row:
    """A JSON-able row.

    Args:
        case: what to measure.
        device: where.
        rounds, visit_seconds: of `timing.interleaved`.
        leave_out: candidates that are not wanted.

    Returns:
        `status` is `measured`, `wrong` (it was not timed), `out of memory` or `failed`, with a
        `reason`; `absent` tells the same of single candidates.

    Raises:
        LostDeviceError: after the row that is its argument nothing works in this process.
    """
    row: Row = {
        "suite": case.suite,
        "label": case.label,
        "dtype": case.dtype,
        "case": asdict(case),  # type: ignore[call-overload]
        "work": {name: asdict(work) for name, work in case.work().items()},
        "status": "measured",
        "absent": {},
    }
    try:
        with precision_of(case.dtype):
            _fill(row, case, device, rounds, visit_seconds, leave_out)
    except (Exception, SystemExit) as error:
        row["status"], row["reason"] = status_of(error), reason_of(error)
    try:
        device.release()
        device.synchronize()
    except RuntimeError as error:
        if row["status"] == "measured":
            row["status"], row["reason"] = "failed", reason_of(error)
        raise LostDeviceError(row) from error
    return row


def _fill(
    row: Row,
    case: Case,
    device: Device,
    rounds: int,
    visit_seconds: float,
    leave_out: tuple[str, ...],
) -> None:
    prepared = case.prepare(device.device)
    row["backend"] = prepared.backend
    row["error_over_allowed"] = _checked(row, prepared)
    device.release()
    steps = _steps(row, device, prepared.candidates, leave_out)
    row["peak_bytes"] = {name: device.peak_bytes(step) for name, step in steps.items()}

    def timed(functions: Mapping[str, Step]) -> dict[str, Timing]:
        visitors: dict[str, Visitor] = {n: device.visitor(f) for n, f in functions.items()}
        return interleaved(visitors, rounds=rounds, visit_seconds=visit_seconds)

    timings = {"eager": timed(steps)}
    if device.is_cuda:
        timings["graph"] = timed(_recorded(row, device, steps))
    row["seconds"] = {how: summary(found) for how, found in timings.items()}
    row["ratio_to_plain"] = {
        how: {name: asdict(ratio(t, found["plain"])) for name, t in found.items()}
        for how, found in timings.items()
        if "plain" in found
    }
    if prepared.parts:
        del steps
        device.release()
        parts = _steps(row, device, prepared.parts, ())
        if device.is_cuda:
            parts = _recorded(row, device, parts)
        row["parts"] = _differences(timed(parts))
    if isinstance(case, Linear):
        row["prediction"] = prediction(case, device.device)


def _checked(row: Row, prepared: Prepared) -> dict[str, float]:
    try:
        return dict(prepared.check())
    except torch.OutOfMemoryError as error:
        row["absent"]["check"] = reason_of(error)
        return {}


def _steps(
    row: Row,
    device: Device,
    makers: Mapping[str, Callable[[], Step]],
    leave_out: tuple[str, ...],
) -> dict[str, Step]:
    """Steps that have run; without those of `plain` and `fused` there is no row."""
    steps = {}
    for name, make in makers.items():
        if name in leave_out:
            continue
        try:
            step = make()
            device.warm(step)
        except Exception as error:
            device.synchronize()  # fails where the device is lost
            if name in ("plain", "fused"):
                raise
            row["absent"][name] = reason_of(error)
            device.release()
            continue
        steps[name] = step
    return steps


def _recorded(row: Row, device: Device, steps: Mapping[str, Step]) -> dict[str, Step]:
    graphs = {}
    for name, step in steps.items():
        try:
            graphs[name] = device.recorded(step)
        except Exception as error:
            device.synchronize()
            row["absent"][f"{name}, recorded"] = reason_of(error)
    return graphs


def _differences(timings: Mapping[str, Timing]) -> dict[str, float]:
    """Seconds of each part."""
    found = {}
    for name, (with_it, without, _) in PARTS.items():
        if with_it in timings and (without is None or without in timings):
            before = 0.0 if without is None else timings[without].median
            found[name] = timings[with_it].median - before
    return found


def counts_of(capability: int) -> dict[str, Any]:
    """Instructions of the compiled kernels for a compute capability, or the last before it.

    Raises:
        FileNotFoundError: the table is not here: it belongs to the checkout.
    """
    path = roofline.FOLDER / "instructions.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not below the working directory")
    table = read_json(path)
    known = sorted(int(name) for name in table if name.isdigit())
    best = max((c for c in known if c <= capability), default=known[0])
    counts: dict[str, Any] = table[str(best)]
    return counts


def parts_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each of `PARTS`, by those of the kernels of a step.

    Raises:
        ValueError: a kernel that is of none of them.
    """
    unknown = set(seconds).difference(*(names for _, _, names in PARTS.values()))
    if unknown:
        raise ValueError(f"kernels of no part of a step: {', '.join(sorted(unknown))}")
    return {
        part: sum(seconds[name] for name in names if name in seconds)
        for part, (_, _, names) in PARTS.items()
    }


def prediction(case: Linear, device: torch.device) -> dict[str, Any]:
    """What `bench.roofline` says of a row, in seconds; the CPU is taken for an H100."""
    dtype = {"tf32": "float32", "bfloat16": "bfloat16"}.get(case.dtype)
    if dtype is None:
        return {"absent": f"nothing is predicted for {case.dtype}"}
    try:
        if device.type == "cuda":
            ceilings = _gpu.device_of(device.index or 0)
            major, minor = torch.cuda.get_device_capability(device)
        else:
            ceilings, (major, minor) = _gpu.DEVICES[1], (9, 0)
        layer = roofline.Layer(case.outputs, case.inputs, case.batch, case.samples, dtype)
        row = roofline.row_of(layer, ceilings, counts_of(10 * major + minor))
    except (ImportError, OSError, ValueError, KeyError) as error:
        return {"absent": reason_of(error)}
    kernels = row["kernels"]
    return {
        "device": ceilings.name,
        "source": row["source"],
        "seconds": {"plain": row["seconds"]["plain"], "fused": row["seconds"]["masked"]},
        "floor": row["seconds"]["floor"],
        "parts": parts_of({name: kernel["seconds"] for name, kernel in kernels.items()}),
        "ratios": {
            "fused": row["ratio_to_plain"],
            "naive": row["naive"],
            "compiled": row["compiled"],
        },
    }


def best(row: Row) -> str | None:
    """The way of calling whose times are looked at: recorded, if that is there for `fused`."""
    seconds = row.get("seconds", {})
    wanted = "fused" if row["suite"] != "ceilings" else "plain"
    for how in ("graph", "eager"):
        if {"plain", wanted} <= set(seconds.get(how, ())):
            return how
    return None


def median(row: Row, name: str) -> float | None:
    """Seconds of a candidate in the way of `best`."""
    how = best(row)
    found = row["seconds"][how].get(name) if how else None
    return None if found is None else float(found["median"])


def ceilings_of(rows: list[Row]) -> dict[str, float]:
    """Bytes per second of `memory`, operations per second by dtype, as measured."""
    found: dict[str, float] = {}
    for row in rows:
        seconds = median(row, "plain") if row["suite"] == "ceilings" else None
        if seconds is None or row["status"] != "measured":
            continue
        work = row["work"]["plain"]
        if work["operations"]:
            found[row["dtype"]] = work["operations"] / seconds
        else:
            found["memory"] = max(found.get("memory", 0.0), work["bytes"] / seconds)
    return found


def share_of_ceiling(row: Row, name: str, ceilings: Mapping[str, float]) -> float | None:
    """The least time that the measured ceilings allow, over the time of a candidate."""
    seconds, work = median(row, name), row["work"].get(name)
    rate = ceilings.get(row["dtype"])
    if seconds is None or work is None or "memory" not in ceilings:
        return None
    if work["operations"] and rate is None:
        return None
    products = work["operations"] / rate if rate else 0.0
    least: float = max(work["bytes"] / ceilings["memory"], products)
    return least / seconds


def over_prediction(row: Row) -> dict[str, float]:
    """Measured over predicted seconds of a row: plain, fused, and the parts of fused."""
    predicted = row.get("prediction", {})
    if "seconds" not in predicted:
        return {}
    found = {}
    for name, expected in predicted["seconds"].items():
        seconds = median(row, name)
        if seconds is not None and expected:
            found[name] = seconds / expected
    for name, seconds in row.get("parts", {}).items():
        if predicted["parts"].get(name):
            found[name] = seconds / predicted["parts"][name]
    return found


def quotient(rows: list[Row], name: str) -> float | None:
    """The median over rows of what `over_prediction` gives for a name."""
    found = [values[name] for values in map(over_prediction, rows) if name in values]
    return statistics.median(found) if found else None
