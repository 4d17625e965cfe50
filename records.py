"""
Records: where a run's results go, under which name, and what they say about how they came to be.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from data import UserError
from flags import settings
from hub import identity, identity_of_never_knew, model_source
from pieces import write_whole

try:
    import resource
except ImportError:  # Windows
    resource = None

LONGEST_NAME = 120  # characters of a record's name; figures add to it, and file systems end at 255 bytes
SHORT = {"layer": "L", "n_features": "n", "clamp": "c", "method": ""}
# Settings that a script's scores do not depend on, and those that a record's name says otherwise, or need not say
FREE = ("out", "push", "plot", "all", "relearn", "batch_size", "max_memory", "no_sanity")
NOT_IN_NAMES = (*FREE, "model", "device", "device_map", "max_batch_size", "use_cache", "output_path", "log_samples")


def outputs(script: str, s, flags, without: tuple[str, ...] = ()) -> Path:
    """Path of the record, its folder made and known to be writable before any work is done. Raises UserError.

    Its default name has a part for the layer, for the number of features and for all else that decides about results
    and differs from the default of the parser `flags`, so that no run overwrites what another one found. without: what
    `script` says already.
    """
    own = vars(flags.parse_args([]))  # not every script has --model
    usual = vars(settings(flags, {"model": s.model} if "model" in own else {}))
    always = ("layer", "n_features")
    said = {name: vars(s)[name] for name in usual if name not in (*NOT_IN_NAMES, *without)}
    parts = [part(name, value) for name, value in said.items()
             if value is not None and (name in always or value != usual[name])]  # fmt: skip
    name = "_".join([Path(script).stem, short_name(s.model), *parts])
    if len(name) > LONGEST_NAME:
        name = name[:LONGEST_NAME] + "_" + hashlib.sha256(name.encode()).hexdigest()[:8]
    name += ".json"
    path = Path(s.out or "results/")
    path = path if path.suffix == ".json" else path / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; give another --out") from error


def part(name: str, value) -> str:
    """A setting in a file name: "c-40", "seed1", "robust", "sae_layer_3-1f0a" (two folders may have the same name)."""
    if isinstance(value, list):
        value = "-".join(f"{x:g}" if isinstance(x, float) else str(x) for x in value)
    elif isinstance(value, float):
        value = f"{value:g}"
    text = "" if value is True else str(value)
    if "/" in text or os.sep in text or ":" in text:
        text = f"-{Path(text).name}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"
    return SHORT.get(name, name.replace("_", "-")) + re.sub(r"[^\w.+-]+", "-", text)


def short_name(model: str) -> str:
    """A model in file names and titles: its preset's name, or the last part of its hub id or folder."""
    return Path(model).name


def save_model(model, tokenizer, folder: Path) -> None:
    """Write a model folder; one of the same name that an earlier run wrote makes place for it."""
    half_written = folder.with_name(f".{os.getpid()}.{folder.name}")
    try:
        model.save_pretrained(half_written)
        tokenizer.save_pretrained(half_written)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(half_written, folder)
    finally:
        shutil.rmtree(half_written, ignore_errors=True)


def peak_gb() -> float | None:
    """Most memory that this process has had: of the GPU where it has used one, of several the sum, else of the process
    as a whole. None on Windows, which does not say without another package."""
    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if most := sum(torch.cuda.max_memory_allocated(card) for card in cards):
        return round(most / 1e9, 2)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes here
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def command() -> str:
    """The command line of this run, its script without a folder."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def make_record(script: str, s, saes: list, sources: dict, sanity, points: list, started: float) -> dict:
    """What was run, on what, and one point per edit with its scores; docs/records.md describes the fields. Of several
    SAEs, or where --layer takes several, what is said of the SAE is a list. started: time.time() when it began."""
    packages = ("torch", "transformers", "transformer-lens", "sae-lens", "datasets")

    def of_saes(name):
        values = [getattr(sae, name) for sae in saes]
        return values if len(values) > 1 or isinstance(s.layer, list) else next(iter(values), None)

    return {
        "script": script,
        "command": command(),
        "seconds": round(time.time() - started, 1),
        "model": s.model,
        "identity": {
            "model": identity(model_source(s.model)),
            "never_knew": identity_of_never_knew(s.model),
            "sae": of_saes("identity"),
        },
        "sae": of_saes("source"),
        "layer": s.layer,
        "hook_point": of_saes("hook_point"),
        "seed": s.seed,
        "dtype": s.dtype,
        "attention": "eager",
        "settings": vars(s),
        "versions": {name: version(name) for name in packages},
        "data": sources,
        "sanity": sanity,
        "points": points,
    }


def write_record(path: Path, record: dict | None, figures: dict, formats: tuple[str, ...] = ("png",)) -> None:
    """Write the record, if there is one, then figures {suffix: a figure, or a function that draws it} beside it, and
    print the record's path last: a figure that cannot be drawn loses no result."""
    if record is not None:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    try:
        for suffix, draw in figures.items():
            figure = draw() if callable(draw) else draw
            for form in formats:
                target = path.with_name(f"{path.stem}_{suffix}.{form}")
                write_whole(target, lambda file, form=form, figure=figure: figure.savefig(file, format=form, dpi=150))
                print(f"figure: {target}")
            if plt.get_backend().lower() == "agg":  # else a notebook shows it, or a desktop
                plt.close(figure)
    finally:
        if record is not None:
            print(f"record: {path}")
