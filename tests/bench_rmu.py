"""
What RMU holds in memory: peak over the model's weights plus the activations of the layers it runs, against the way of
the release, which keeps a full frozen copy and runs both models to the end. A process each; Linux.

    python tests/bench_rmu.py
"""

import copy
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_patched import write_smollm_shape  # puts the project on the path

import unlearning
from common import load_hf
from data import padded
from edits import decoder_layers, residual_stream

LAYER, BATCH, STEPS, ALPHA, RATE = 7, 4, 3, 100.0, 1e-4
LENGTH = 512  # tokens a text, the release's longest


def texts() -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(10, 4000) for _ in range(LENGTH)] for _ in range(16)]


def status(name: str) -> float:
    """MB of a line of /proc/self/status: VmRSS, what the process holds, or VmHWM, the most it has held."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def saved_megabytes(model) -> float:
    """Of one step: what its two forward passes with gradient keep for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    for matrix in unlearning.down_projections(model, LAYER).values():
        matrix.requires_grad_(True)
    ids = torch.tensor(texts()[:BATCH])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = [residual_stream(model, ids, LAYER) for _ in range(2)]
    total = sum(kept.values()) / 2**20
    del held
    model.requires_grad_(False)
    return total


def release(model, tokenizer) -> None:
    """Steps in the release's way (github.com/centerforaisafety/wmdp): whole passes, and a frozen copy of the model."""
    frozen, draw = copy.deepcopy(model), random.Random(0)
    matrices = list(unlearning.down_projections(model, LAYER).values())
    for matrix in matrices:
        matrix.requires_grad_(True)
    optimizer = torch.optim.AdamW(matrices, lr=RATE)

    def stream(which, ids):
        kept = []
        block = decoder_layers(which)[LAYER]
        handle = block.register_forward_hook(
            lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        which(ids, use_cache=False)
        handle.remove()
        return kept[0]

    for _ in range(STEPS):
        forget, retain = (padded(draw.sample(texts(), BATCH), tokenizer, "cpu") for _ in range(2))
        with torch.no_grad():
            before = stream(frozen, retain)
        loss = stream(model, forget).square().mean() + ALPHA * (stream(model, retain) - before).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def child(folder: str, way: str) -> None:
    import_only = status("VmRSS")
    model, tokenizer = load_hf(folder)
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    if way == "activations":
        print(f"{weights} {saved_megabytes(model)}")
        return
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    if way == "ours":
        training = unlearning.Training(lambda: model, tokenizer, [], [], picking=(texts(), [texts()]))
        setting = dict(layer=LAYER, multiple=4.0, alpha=ALPHA, steps=STEPS, lr=RATE, batch=BATCH)
        unlearning.METHODS["rmu"].train(training, **setting)
    else:
        release(model, tokenizer)
    print(status("VmHWM") - import_only)


def measured(folder: str, way: str) -> list[float]:
    command = [sys.executable, __file__, folder, way]
    # what is freed goes back to the system at once: the peak is of what was held, not of what the allocator kept
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return [float(number) for number in output.split()]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(*sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_smollm_shape(Path(folder))
            model = str(Path(folder) / "model")
            weights, activations = measured(model, "activations")
            print(f"random model of SmolLM2-135M's shape, fp32, layer 7, 4 + 4 texts of {LENGTH} tokens")
            print(f"  weights {weights:.0f} MB, activations of layers 0 to 7 for two passes {activations:.0f} MB")
            for way, name in (("ours", "unlearning.py"), ("release", "full frozen copy, whole passes")):
                peak = measured(model, way)[0]
                print(f"  {name}: peak {peak:.0f} MB, {peak / (weights + activations):.2f} of their sum")
