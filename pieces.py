"""
What long runs keep as they go: files written whole or not at all, and finished pieces that a stopped run goes on from.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import processes
from data import UserError, digest
from evaluation import foretell

PIECE = 64  # prompts or windows that are scored and kept together: what a stop costs at the most
FORM = 2  # of what pieces hold: those of another one, left by an earlier version, are not taken up


def write_whole(path: Path, write) -> None:
    """Call write(temporary path), then move it to `path`: a stopped run leaves nothing half-written.

    Of several processes the first one writes.
    """
    if not processes.is_first():
        return
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def keeping(path: Path, decides):
    """Yields a folder beside `path` for finished pieces, and removes it at the end, when what they make up is written.

    decides: all that the pieces depend on, so that those of another run are never taken up. Stopped, by Ctrl-C or as
    another process is lost, it says what was kept.
    """
    key = hashlib.sha256(json.dumps([FORM, decides], sort_keys=True).encode()).hexdigest()[:16]
    folder = path.with_suffix(".pieces") / key
    try:
        yield folder
    except (KeyboardInterrupt, processes.LostProcess) as stop:
        done, why = len(list(folder.glob("*.json"))), f"{stop}: " if str(stop) else ""
        raise type(stop)(f"{why}{done} finished pieces are kept; the same command goes on from there") from None
    if processes.is_first():
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):  # else it holds what another run stopped at
            folder.parent.rmdir()


def write_piece(path: Path, values) -> None:
    text = json.dumps({"sha256": digest(values), "values": values})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write_text(text))


def read_piece(path: Path):
    """What write_piece wrote; None where nothing is. Raises UserError for a damaged file."""
    if not path.exists():
        return None
    try:
        piece = json.loads(path.read_text())
        if piece["sha256"] != digest(piece["values"]):
            raise ValueError("its checksum is another")
        return piece["values"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and it is made again") from error


def resumed(folder: Path, jobs: dict) -> list:
    """Results of the jobs {name: function without arguments}, each a piece of the folder."""
    found = []
    for name, make in tqdm(jobs.items(), desc="settings", unit="setting", leave=False):
        found.append(read_piece(folder / f"{name}.json"))
        if found[-1] is None:
            found[-1] = make()
            write_piece(folder / f"{name}.json", found[-1])
    return found


def piecewise(lm, folder: Path, s):
    """For evaluation.answers: a function (name, items, score) that scores PIECE items (lists of ids) at a time, each
    kept in the folder. s: the settings."""

    def run(name: str, items: list[list[int]], score) -> torch.Tensor:
        order = sorted(range(len(items)), key=lambda i: -len(items[i]))  # items of like length share a batch
        pieces = [order[at : at + PIECE] for at in range(0, len(order), PIECE)]
        paths = [folder / f"{name}_{number:04}.json" for number in range(len(pieces))]
        columns = processes.from_first([read_piece(path) for path in paths])
        missing = [number for number, column in enumerate(columns) if column is None]
        if missing:
            foretell(lm, name, [items[i] for number in missing for i in pieces[number]], score, s.batch_size,
                     s.max_memory)  # fmt: skip
        # as many pieces at once as there are processes, so that each has a piece's worth of batches to run
        for at in tqdm(range(0, len(missing), processes.count()), desc=name, unit="piece", leave=False):
            some = missing[at : at + processes.count()]
            values = score([items[i] for number in some for i in pieces[number]])
            for number, part in zip(some, values.split([len(pieces[number]) for number in some], dim=1)):
                columns[number] = part.tolist()
                write_piece(paths[number], columns[number])
        return torch.from_numpy(np.concatenate(columns, 1)[:, np.argsort(order)])

    return run
