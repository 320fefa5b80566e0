"""One process of a data-parallel job: `python distributed_probe.py RANK WORLD FOLDER [PART]`.

With WORLD 1 there is no process group, and the job is what the others are to agree with. Writes
what it learned to FOLDER/WORLD-RANK.pt. PART "broken" is a job whose last process is killed midway,
"resumed" goes on with it and writes FOLDER/resumed-RANK.pt.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import modmask_kernels as mm

SAMPLES, STEPS, BATCH = 4, 6, 16  # of the job
RANK, WORLD, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
PART = sys.argv[4] if len(sys.argv) > 4 else ""


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 12), nn.Tanh()
    )
    model.append(nn.Linear(12, 3))
    model = mm.mask_model(model, sets=["a", "b"], samples=SAMPLES // WORLD, init=0.3)
    if RANK:  # the job starts from the logits of rank 0
        with torch.no_grad():
            logits_of(model)[0].add_(1.0)
    return model


def logits_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if n.endswith("_logits")]


def joint(step: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(BATCH, 2, 4, 4, generator=generator)
    return x, x.flatten(1)[:, :3].argmax(1)


def part(batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.chunk(WORLD)[RANK] for t in batch)


def loss(output: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def batches(step: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    if PART == "broken" and step == 4 and RANK == WORLD - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return part(joint(step, generator))


def learn(model: nn.Module, **options: object) -> dict[str, object]:
    data = dict.fromkeys(("a", "b"), batches)
    result = mm.learn_masks(
        model, loss, data, STEPS, lr=0.1, penalty=1e-3, callback_every=2, progress=False, **options
    )
    rows = [{k: row[k] for k in ("loss", "grad_norm", "kept")} for row in result.metrics]
    layers = mm.masks.masked_layers(model).values()
    assert all(layer.sample_offset == 0 for layer in layers)
    return {
        "masks": {name: dict(masks) for name, masks in result.masks.items()},
        "logits": {name: masks.logits for name, masks in result.masks.items()},
        "metrics": rows,
        "hash": result.masks["a"].metadata["weight_hash"],
    }


def own_loop(model: nn.Module, logits: list[nn.Parameter], wrapped: nn.Module) -> dict[str, object]:
    """Without `learn_masks`: one set, any optimiser."""
    for layer in mm.masks.masked_layers(model).values():
        layer.sample_offset = RANK * layer.samples
        layer.mode = "sample"
    mm.use_set(model, "a")
    optimizer = torch.optim.SGD(logits, lr=20.0)
    generator = torch.Generator().manual_seed(3)
    for step in range(3):
        for layer in mm.masks.masked_layers(model).values():
            layer.seed = torch.full((2,), step)
        batch = part(joint(step, generator))
        optimizer.zero_grad()
        loss(wrapped(batch[0]), batch).backward()
        optimizer.step()
    return {"logits": [mm.masks.ranks.whole(p.detach()).clone() for p in logits]}


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    if WORLD == 1:
        results["learn"] = learn(network())
        model = network()
        results["loop"] = own_loop(model, logits_of(model), model)
        torch.save(results, FOLDER / "1-0.pt")
        return
    dist.init_process_group(
        "gloo", init_method=f"file://{FOLDER / f'store{PART}'}", rank=RANK, world_size=WORLD
    )
    if PART:
        options = {"checkpoint": FOLDER / "broken.checkpoint", "checkpoint_every": 3}
        results["learn"] = learn(network(), resume=PART == "resumed", **options)
        torch.save(results, FOLDER / f"{PART}-{RANK}.pt")
        dist.destroy_process_group()
        return
    model = network()
    results["learn"] = learn(model, checkpoint=FOLDER / "learn.checkpoint", checkpoint_every=3)
    ddp = DistributedDataParallel(network())
    results["learn ddp"] = learn(ddp)

    model = network()
    ignored = set(logits_of(model))
    for layer in mm.masks.masked_layers(model).values():
        fully_shard(layer, ignored_params=ignored)
    fully_shard(model, ignored_params=ignored)
    assert hasattr(model[0].weight, "full_tensor")
    assert not hasattr(model[0].weight_logits, "full_tensor")
    results["learn fsdp"] = learn(model, checkpoint=FOLDER / "fsdp.checkpoint")

    model = network()
    mm.masks.ranks.Ranks().share(p.detach() for p in logits_of(model))
    results["loop ddp"] = own_loop(model, logits_of(model), DistributedDataParallel(model))

    model = network()
    mm.masks.ranks.Ranks().share(p.detach() for p in logits_of(model))
    for layer in mm.masks.masked_layers(model).values():
        fully_shard(layer)
    fully_shard(model)
    assert hasattr(model[0].weight_logits, "full_tensor")
    results["loop fsdp"] = own_loop(model, logits_of(model), model)
    for name, options, cause in (
        ("sharded logits", {}, model),
        ("union clip", {"union_clip": True}, network()),
    ):
        try:
            data = {"a": lambda step, g: part(joint(step, g))}
            mm.learn_masks(cause, loss, data, 1, progress=False, **options)
        except ValueError as error:
            results[name] = str(error)
    for wrong in (0, 2):  # the step whose batches differ
        try:
            sizes = {
                "a": lambda step, g, wrong=wrong: tuple(
                    t[: 4 * (1 + RANK * (step == wrong))] for t in joint(step, g)
                )
            }
            mm.learn_masks(network(), loss, sizes, 4, progress=False)
        except ValueError as error:
            results[f"sizes of step {wrong}"] = str(error)
    alone = network()
    torch.nn.init.constant_(logits_of(alone)[0], 0.3 + RANK)
    mm.learn_masks(alone, loss, {"a": joint}, 1, progress=False, data_parallel=False)
    results["alone"] = {"logits": logits_of(alone)[0].detach().clone()}
    torch.save(results, FOLDER / f"{WORLD}-{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
