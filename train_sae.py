# %% [markdown]
"""
Train SAEs for a model that has none, at several layers in one run, with SAELens's own trainer.

    python train_sae.py --layers 3 5 7 9 15 --width 2048 --text tiny/data/train.jsonl --out my_saes
    python train_sae.py --model gpt2 --layers 7 --text Skylion007/openwebtext --width 16384 --tokens 200000000

Works for any model that the other scripts do. The text is a hub data set, a text file (documents separated by blank
lines) or a JSONL file with a "text" in each line; one document in twenty is held out and measured on. A text of more
tokens than --tokens asks for is not tokenised whole: documents are drawn at random until there are enough. Over a
shorter one training goes several times, its windows in a new order each time. Trained as BatchTopK (Bussmann, Leask and
Nanda, arXiv 2412.06410), which SAELens saves as a JumpReLU SAE; each folder OUT/layer_L is what --sae takes.

The first command trains tiny's own SAEs; docs/results.md says what they reach, and how long it takes.
"""

# %%
import argparse

from data import HERE
from flags import PUSH, answered, command_line, settings

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
flags.add_argument("--model", default="tiny", help="preset, hub id or folder (default: %(default)s)")
flags.add_argument("--layers", type=int, nargs="+", default=[7], help="one SAE each (default: %(default)s)")
flags.add_argument("--text", default=str(HERE / "tiny/data/train.jsonl"), help="hub id, .txt or .jsonl (default: "
                   "tiny/data/train.jsonl)")  # fmt: skip
flags.add_argument("--held-out", help="text to measure on (default: every 20th document of --text)")
flags.add_argument("--width", type=int, help="number of features (default: 8 times the model's width)")
flags.add_argument("--k", type=int, default=40, help="features active per token, on average (default: %(default)s)")
flags.add_argument("--tokens", type=int, default=1_500_000, help="training tokens (default: %(default)s)")
flags.add_argument("--lr", type=float, default=2e-3, help="learning rate of Adam (default: %(default)s)")
flags.add_argument("--context", type=int, default=128, help="tokens per window (default: %(default)s)")
flags.add_argument("--batch-size", type=int, default=32, help="windows per forward pass (default: %(default)s)")
flags.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
flags.add_argument("--device", help="cuda, mps or cpu (default: cuda if there is one)")
flags.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model, not of SAEs")
flags.add_argument("--out", default="my_saes", help="folder to write to (default: %(default)s)")
flags.add_argument("--push", metavar="ORG/NAME", help=PUSH)
answered(flags, __name__)

# %%
import json
import random
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

import processes
import publish
from common import firing_rates, load_model
from data import UserError, batches, first_line, read_jsonl, token_windows
from edits import NONE, Edit, edit_of, layer_of, watch_tokens
from engine import check_engine
from evaluation import score_loss
from hub import check_sae, sanity_gate

TRAINING_BATCH = 1024  # tokens per optimiser step
BUFFER = 2**16  # tokens that are mixed before they are served, so that a step does not see one document only
HELD_OUT = 20  # one document in so many
MEASURED, COUNTED = 400, 4000  # windows of held-out text, and of training text for the share of dead features

# %% [markdown]
# ## Text and activations


# %%
def read_texts(source: str, most: int = 200_000) -> list[str]:
    """Documents of a .jsonl or .txt file, or the first `most` of a hub data set's train split."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return [row["text"] for row in read_jsonl(path, "text")]
    if path.is_file():
        return [part for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    if source.count("/") != 1 or path.suffix in (".jsonl", ".txt"):
        raise UserError(f"--text {source}: neither a file nor a hub id ORG/NAME")
    from datasets import load_dataset

    try:
        return [row["text"] for row in islice(load_dataset(source, split="train", streaming=True), most)]
    except Exception as error:  # the hub's libraries raise anything from OSError to RuntimeError
        raise UserError(f"cannot load {source} from the hub: {first_line(error)}") from error


def drawn_windows(tokenizer, texts: list[str], context: int, tokens: int, seed: int) -> list[list[int]]:
    """Windows of documents that are drawn at random until they have `tokens`, in the order of the texts; of all
    documents, where these have no more."""
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    windows, sources = token_windows(tokenizer, [texts[i] for i in order], context, tokens, bos=True)
    return [windows[at] for at in sorted(range(len(windows)), key=lambda at: order[sources[at]])]


def hook_name(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


@torch.no_grad()
def activations(model, windows: list[list[int]], layers: list[int], batch_size: int, seed: int):
    """Endlessly yield {hook point: (n, d_model) fp32 residuals of ordinary tokens}, windows shuffled each epoch."""
    kept, rng = {}, random.Random(seed)

    def keep(h, hook, name):
        kept[name] = h

    hooks = [(hook_name(layer), partial(keep, name=hook_name(layer))) for layer in layers]
    while True:
        order = rng.sample(windows, len(windows))
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            with watch_tokens(model.original_model, model.tokenizer) as seen, model.hooks(fwd_hooks=hooks):
                _, ids = next(batches(some, batch_size, model.tokenizer, model.cfg.device))
                model(ids, stop_at_layer=max(layers) + 1, use_cache=False)
            yield {name: h[seen["ordinary"]].float() for name, h in kept.items()}


# %% [markdown]
# ## Train and measure


# %%
def new_sae(config: BatchTopKTrainingSAEConfig, mps: bool) -> BatchTopKTrainingSAE:
    """On config's device. Its threshold is in float64; on Apple's GPUs, which have none, in float32."""
    if not mps:
        return BatchTopKTrainingSAE(config)
    sae = BatchTopKTrainingSAE(replace(config, device="cpu"))
    sae.topk_threshold = sae.topk_threshold.float()
    return sae.to(config.device)


def train(model, windows, s) -> dict[int, Path]:
    """One SAE per layer, all on the same stream of activations; returns the folders that they are saved in."""
    saes = {}
    for layer in s.layers:
        metadata = SAEMetadata(hook_name=hook_name(layer), model_name=Path(s.model).name, context_size=s.context)
        config = BatchTopKTrainingSAEConfig(
            d_in=model.cfg.d_model, d_sae=s.width, k=s.k, device=str(model.cfg.device), apply_b_dec_to_input=False,
            normalize_activations="expected_average_only_in", metadata=metadata,
        )  # fmt: skip
        saes[str(layer)] = new_sae(config, (s.device or "").startswith("mps"))
    steps = s.tokens // TRAINING_BATCH
    config = SAETrainerConfig(
        total_training_samples=steps * TRAINING_BATCH, train_batch_size_samples=TRAINING_BATCH, lr=s.lr,
        lr_end=s.lr / 10, lr_warm_up_steps=min(100, steps // 10), lr_decay_steps=steps // 3,
        device=str(model.cfg.device), dead_feature_window=200, n_batches_for_norm_estimate=20,
    )  # fmt: skip
    stream = activations(model, windows, s.layers, s.batch_size, s.seed)
    names = {str(layer): hook_name(layer) for layer in s.layers}
    mixed = multi_hook_concat_split_iter(BUFFER, TRAINING_BATCH, stream, list(names.values()))
    MultiSAETrainer(config, saes, names, mixed).fit()
    folders = {layer: Path(s.out) / f"layer_{layer}" for layer in s.layers}
    for layer, folder in folders.items():
        saes[str(layer)].save_inference_model(folder)
    return folders


def measure(model, sae: SAE, held_out, training, batch_size: int) -> dict:
    """Held-out variance explained, L0 and loss recovered (0 for a zeroed, 1 for the true residual stream), and the
    share of features that never fire on the training windows."""
    found = sanity_gate(model, sae, held_out, insist=False, most=sum(map(len, held_out)))
    zero = Edit("zeroed", {layer_of(sae): lambda h, ordinary: torch.where(ordinary[..., None], 0, h)})
    edits = [NONE, edit_of("sae-reconstruction", sae), zero]
    nats, targets = score_loss(model, held_out, edits, batch_size)
    clean, patched, zeroed = (nats.sum(1) / targets.sum()).tolist()
    found["loss_recovered"] = round((zeroed - patched) / (zeroed - clean), 4)
    found["loss_added"] = round(patched - clean, 4)
    found["l0_share"] = round(found["l0"] / sae.cfg.d_sae, 4)
    found["dead_share"] = round((firing_rates(model, sae, training, batch_size).fires == 0).float().mean().item(), 4)
    return found


def check(s) -> None:
    """Raises UserError for numbers that cannot be, before anything is loaded."""
    for name, least in {"width": 1, "k": 1, "tokens": TRAINING_BATCH, "context": 3}.items():
        if (value := getattr(s, name)) is not None and value < least:
            raise UserError(f"--{name} {value}: at least {least}")
    if s.lr <= 0:
        raise UserError(f"--lr {s.lr:g}: above 0")
    if len(set(s.layers)) < len(s.layers):
        raise UserError(f"--layers {' '.join(map(str, s.layers))}: each once")


def run(**changes) -> dict:
    """run(layers=[7], tokens=10**6): any flag by name. Writes OUT/layer_L and OUT/measured.json; returns the latter."""
    s = settings(flags, changes)
    check(s)
    publish.check_repo(s.push)
    if processes.count() > 1:
        raise UserError("SAEs are trained by one process: start train_sae.py without accelerate launch")
    torch.manual_seed(s.seed)
    model = load_model(s.model, s.device, s.dtype)
    check_engine(model, [])
    s.width = s.width or 8 * model.cfg.d_model
    if s.k > s.width:
        raise UserError(f"--k {s.k}: of --width {s.width} features no more can be active")
    if bad := [layer for layer in s.layers if not 0 <= layer < model.cfg.n_layers]:
        raise UserError(f"--layers {bad[0]}: the model has layers 0 to {model.cfg.n_layers - 1}")
    texts = read_texts(s.text)
    held_out = read_texts(s.held_out) if s.held_out else texts[::HELD_OUT]
    texts = texts if s.held_out else [text for i, text in enumerate(texts) if i % HELD_OUT]
    # beside --tokens: what is in the buffer at the end, and what the scale of the activations is estimated on; and a
    # window may leave one token behind it that makes no other
    needed = max(s.tokens + 2 * BUFFER, COUNTED * (s.context + 1))
    training = drawn_windows(model.tokenizer, texts, s.context, needed, s.seed)
    held_out = token_windows(model.tokenizer, held_out, s.context, MEASURED * (s.context + 1), bos=True)[0]
    if not training or not held_out:
        raise UserError(f"--text {s.text}: too little text to train and measure on")
    measured = {}
    for layer, folder in train(model, training, s).items():  # all are saved before the first is measured
        sae = SAE.load_from_disk(folder, device=str(model.cfg.device), dtype="float32")
        sae.source = str(folder)
        check_sae(sae, model, layer)
        sae.requires_grad_(False)
        measured[folder.name] = measure(model, sae, held_out[:MEASURED], training[:COUNTED], s.batch_size)
        print(f"layer {layer}: {measured[folder.name]}")
    (Path(s.out) / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    if s.push:
        publish.push_saes(Path(s.out), measured, s.text, s.model, s.push)
    return measured


# %%
if __name__ == "__main__":
    command_line(run, flags)
