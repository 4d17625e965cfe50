"""
How much of a device's memory is free, what scoring and training take of it, and what to do where it runs out.
"""

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import processes
from common import best_device
from data import LESS_MEMORY, UserError, ran_out
from hub import model_source

COPY_TOKENS = 4096  # of edited copies that are run at a time, at most: on two CPU cores more gains nothing
SHARE = 0.7  # of what is free that is planned with: allocators lose some to fragments, and formulas err


def free_bytes(device: torch.device, most: float | None = None) -> int:
    """Memory that this process could still have on the device; most: GB that it may have in all."""
    if most is not None:
        return max(0, int(most * 1e9) - held_bytes(device))
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return psutil.virtual_memory().available // processes.count()


def held_bytes(device: torch.device) -> int:
    """Memory of the device that this process has."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return psutil.Process().memory_info().rss


def row_bytes(model, tokens: int, total: int, layers: int) -> int:
    """What running `tokens` tokens, the last of `total`, through `layers` layers takes: their keys and values, and the
    larger of what attention and what an MLP hold at once. model: a TransformerBridge. Counted on the meta device for
    Gemma-2, Gemma-3 and Llama's shapes at 30 to 1,000 tokens, it was 0.75 to 0.91 times this."""
    cfg, size = model.cfg, model.unembed.weight.element_size()
    keys = 2 * layers * total * (getattr(cfg, "n_key_value_heads", None) or cfg.n_heads) * cfg.d_head * size
    attention = cfg.n_heads * tokens * total * (2 * size + 2 * 4)  # the softmax is in fp32
    mlp = 4 * tokens * (cfg.d_mlp or 4 * cfg.d_model) * size
    return keys + max(attention, mlp) + tokens * cfg.d_model * (4 * size + 2 * 4)  # and norms


def room_for(model, tokens: int, most: float | None) -> tuple[float, float]:
    """What scoring a prompt of so many tokens takes, and what is free, in GB; as row_bytes and free_bytes have it."""
    need, free = row_bytes(model, tokens, tokens, model.cfg.n_layers), free_bytes(torch.device(model.cfg.device), most)
    return need / 1e9, free / 1e9


def refuse_without_room(model, tokens: int, most: float | None) -> None:
    """Raises UserError where a prompt of so many tokens finds no room beside what is loaded."""
    need, free = room_for(model, tokens, most)
    if need > free:
        raise UserError(f"a prompt of {tokens} tokens takes {need:.2f} GB beside the model, {free:.2f} GB are free"
                        f"{f' of --max-memory {most:g}' if most else ''}: {LESS_MEMORY}")  # fmt: skip


def in_parts(items: list, size: int, make):
    """Yield make(some) for at most `size` of the items at a time, and for half as many from where memory runs out.
    Raises UserError where it does with a single one."""
    at = 0
    while at < len(items):
        some = items[at : at + max(1, size)]
        try:
            found = make(some)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            if len(some) == 1:
                raise UserError(f"no memory is left for a single prompt: {LESS_MEMORY}") from error
            size = len(some) // 2
        else:
            at += len(some)
            yield found
            continue
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check_room(what: str, model: str, device: str | None, dtype: str, beside: int = 0, trained=None) -> None:
    """Say what training a model (as for load_model) needs and what is free, before it is loaded.

    trained: function of the model, on the meta device, to {name: matrix} of what is trained (None: all of it).
    In bytes: of a weight its own 2 or 4, and what the method keeps `beside`; of one that is trained for bfloat16 a copy
    in fp32 (4), a gradient (4), AdamW's two moments (8). Activations come on top and are not counted. Raises UserError
    where even this does not fit.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_source(model)))
    n = sum(one.numel() for one in empty.parameters())
    some = sum(one.numel() for one in trained(empty).values()) if trained else n
    parts = {"weights": n * getattr(torch, dtype).itemsize, "fp32 copies": 4 * some * (dtype != "float32"),
             "gradients": 4 * some, "Adam's moments": 8 * some, "other copies": n * beside}  # fmt: skip
    need, free = sum(parts.values()) / 1e9, free_bytes(torch.device(device or best_device())) / 1e9
    shares = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
    of = f"all {n / 1e6:,.1f}" if some == n else f"{some / 1e6:,.2f} of {n / 1e6:,.1f}"
    text = f"{what} trains {of} million weights: {need:.2f} GB ({shares}) and activations"
    if need > free:
        less = "rmu.py and `baselines.py --method crisp` train few weights, " if some == n else ""
        raise UserError(f"{text}; {free:.2f} GB are free. {less}the edits of baselines.py train none")
    print(f"{text}; {free:.2f} GB are free")
