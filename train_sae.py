# %% [markdown]
"""
Train SAEs for a model that has none, at several layers in one run, with SAELens's own trainer.

    python train_sae.py --layers 3 5 7 9 15 --width 2048 --text tiny/data/train.jsonl --out my_saes
    python train_sae.py --model gpt2 --layers 7 --text Skylion007/openwebtext --width 16384 --tokens 200000000

Works for any model that the other scripts do. The text is a hub data set, a text file (documents separated by blank
lines) or a JSONL file with a "text" in each line; one document in twenty is held out, and L0 and variance explained are
measured on it. Of a long text documents are drawn at random until there are enough tokens; a short one is gone over
several times. Trained as BatchTopK (Bussmann, Leask and Nanda, arXiv 2412.06410), saved as JumpReLU; each OUT/layer_L
is what --sae takes. The first command trains tiny's own SAEs; docs/results.md says what they reach, and how long it
takes. To publish SAEs: `hf upload ORG/NAME OUT`.

--frozen-decoder trains the control of Korznikov et al. (arXiv 2602.14111): encoder and biases learn, the decoder stays
at SAELens's random rows of unit norm. What its features do as well as a trained SAE's needs no trained decoder.
"""

# %%
from data import HERE, UserError, as_list, batches, in_a_line, n_processes, read_jsonl, stream, token_windows
from runs import Parser, help_before_imports, main, natural_int, number, positive_int, seed_int, settings

flags = Parser(description=__doc__)
add = flags.add_argument
add("--model", default="tiny", help="preset, hub id or folder (default: %(default)s)")
add("--layers", type=natural_int, nargs="+", default=[7], help="one SAE each (default: %(default)s)")
add("--text", default=str(HERE / "tiny/data/train.jsonl"), help="hub id, .txt or .jsonl (default: tiny's)")
add("--held-out", help="text to measure on (default: every 20th document of --text)")
add("--width", type=positive_int, help="number of features (default: 8 times the model's width)")
add("--k", type=positive_int, default=40, help="features active on a token, on average (default: 40)")
add("--tokens", type=number(int, "from 1024 on", lambda x: x >= 1024), default=1_500_000,
    help="to train on (default: %(default)s)")  # fmt: skip
add("--lr", type=number(float, "above 0", lambda x: x > 0), default=2e-3, help="rate of Adam (default: %(default)s)")
add("--context", type=number(int, "from 3 on", lambda x: x >= 3), default=128, help="tokens a window (default: 128)")
add("--batch-size", type=positive_int, default=32, help="windows per pass (default: %(default)s)")
add("--seed", type=seed_int, default=0, help="(default: %(default)s)")
add("--frozen-decoder", action="store_true", help="train encoder and biases only")
add("--device", help="cuda, mps or cpu (default: cuda if there is one)")
add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model, not of SAEs")
add("--out", default="my_saes", help="folder to write to (default: %(default)s)")
help_before_imports(flags, __name__)

# %%
import random
from dataclasses import replace
from pathlib import Path

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from common import load_model, load_sae
from edits import token_mask
from evaluation import check_sae_quality
from runs import refuse_unwritable, write_whole

TRAINING_BATCH = 1024  # tokens per optimiser step
BUFFER = 2**16  # tokens that are mixed before they are served, so that a step does not see one document only
HOOK = "blocks.{}.hook_resid_post"
HELD_OUT = 20  # one document in so many
MEASURED = 400  # windows of held-out text


# %% Text and activations
def read_texts(source: str, most: int = 200_000) -> list[str]:
    """Documents of a .jsonl or .txt file, or the first `most` of a hub data set's train split."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return [row["text"] for row in read_jsonl(path, "text")]
    if path.is_file() and path.suffix in ("", ".txt", ".md"):
        with in_a_line(f"{path} cannot be read as UTF-8 text"):
            return [part for part in path.read_text(encoding="utf-8-sig").split("\n\n") if part.strip()]
    if path.is_file() or source.count("/") != 1 or path.suffix in (".jsonl", ".txt"):
        raise UserError(f"--text {source}: neither a file of text or JSONL nor a hub id ORG/NAME")
    with in_a_line(f"cannot load {source} from the hub"):
        return [row["text"] for row in stream(source, None, "train", None, most)]


def drawn_windows(tokenizer, texts: list[str], context: int, tokens: int, seed: int) -> list[list[int]]:
    """Windows of documents drawn at random until they have `tokens`, or of all documents, in the order of the texts."""
    order = random.Random(seed).sample(range(len(as_list(texts, "texts"))), len(texts))
    windows, documents = token_windows(tokenizer, [texts[i] for i in order], context, tokens, bos=True)
    return [windows[at] for at in sorted(range(len(windows)), key=lambda at: order[documents[at]])]


@torch.no_grad()
def activations(model, windows: list[list[int]], layers: list[int], batch_size: int, seed: int):
    """Endlessly yield {hook point: (n, d_model) fp32 residuals of counted tokens}, windows shuffled each epoch."""
    captured, rng = {}, random.Random(seed)
    hooks = [(name, lambda h, hook, name=name: captured.update({name: h})) for name in map(HOOK.format, layers)]
    while True:
        order = rng.sample(windows, len(windows))
        for start in range(0, len(order), batch_size):
            _, ids = next(batches(order[start : start + batch_size], batch_size, model.tokenizer, model.cfg.device))
            with token_mask(model.original_model, model.tokenizer) as mask, model.hooks(fwd_hooks=hooks):
                model(ids, stop_at_layer=max(layers) + 1, use_cache=False)
            yield {name: h[mask.counted].float() for name, h in captured.items()}


# %% Train and measure
def new_sae(config: BatchTopKTrainingSAEConfig, float64: bool) -> BatchTopKTrainingSAE:
    """On config's device. Its threshold is in float64, or in float32 for Apple's GPUs, which have no float64."""
    sae = BatchTopKTrainingSAE(config if float64 else replace(config, device="cpu"))
    if not float64:
        sae.topk_threshold = sae.topk_threshold.float()
    return sae.to(config.device)


def train(model, windows, width: int, args) -> dict:
    """{layer: SAE}, all trained on the same stream of activations."""
    device, saes, lr = str(model.cfg.device), {}, args.lr
    names = {str(layer): HOOK.format(layer) for layer in args.layers}
    for layer, hook_name in names.items():
        metadata = SAEMetadata(hook_name=hook_name, model_name=Path(args.model).name, context_size=args.context,
                               frozen_decoder=args.frozen_decoder)  # fmt: skip
        saes[layer] = new_sae(BatchTopKTrainingSAEConfig(
            d_in=model.cfg.d_model, d_sae=width, k=args.k, device=device, apply_b_dec_to_input=False,
            normalize_activations="expected_average_only_in", metadata=metadata,
            decoder_init_norm=1.0 if args.frozen_decoder else 0.1,
        ), float64=not (args.device or "").startswith("mps"))  # fmt: skip
        saes[layer].W_dec.requires_grad_(not args.frozen_decoder)
    steps = args.tokens // TRAINING_BATCH
    config = SAETrainerConfig(
        total_training_samples=steps * TRAINING_BATCH, train_batch_size_samples=TRAINING_BATCH, lr=lr,
        lr_end=lr / 10, lr_warm_up_steps=min(100, steps // 10), lr_decay_steps=steps // 3, device=device,
        dead_feature_window=200, n_batches_for_norm_estimate=20)  # fmt: skip
    acts = activations(model, windows, args.layers, args.batch_size, args.seed)
    mixed = multi_hook_concat_split_iter(BUFFER, TRAINING_BATCH, acts, list(names.values()))
    MultiSAETrainer(config, saes, names, mixed).fit()
    return saes


def run(**changes) -> dict:
    """run(layers=[7], tokens=10**6): any flag by name. Writes OUT/layer_L; returns {layer: what is measured of it}."""
    args = settings(flags, changes)
    if n_processes() > 1:
        raise UserError("SAEs are trained by one process: start train_sae.py without accelerate launch")
    folders = {layer: Path(args.out) / f"layer_{layer}" for layer in args.layers}
    for folder in folders.values():
        refuse_unwritable(folder)  # nor is an SAE that is there replaced, perhaps one of another model
    torch.manual_seed(args.seed)
    model = load_model(args.model, args.device, args.dtype)
    width = args.width or 8 * model.cfg.d_model
    if args.k > width:
        raise UserError(f"--k {args.k}: of --width {width} features no more can be active")
    if bad := [layer for layer in args.layers if not 0 <= layer < model.cfg.n_layers]:
        raise UserError(f"--layers {bad[0]}: the model has layers 0 to {model.cfg.n_layers - 1}")
    texts = read_texts(args.text)
    held_out = read_texts(args.held_out) if args.held_out else texts[::HELD_OUT]
    texts = texts if args.held_out else [text for i, text in enumerate(texts) if i % HELD_OUT]
    # beside --tokens: what is in the buffer at the end, and what the scale of the activations is estimated on
    training = drawn_windows(model.tokenizer, texts, args.context, args.tokens + 2 * BUFFER, args.seed)
    held_out = token_windows(model.tokenizer, held_out, args.context, MEASURED * (args.context + 1), bos=True)[0]
    if not training or not held_out:
        raise UserError(f"--text {args.text}: too little text to train and measure on")
    saes = train(model, training, width, args)
    for layer, folder in folders.items():  # all are saved before the first is measured
        write_whole(folder, saes[str(layer)].save_inference_model)
    found, tokens = {}, sum(map(len, held_out))
    for layer, folder in folders.items():
        sae = load_sae(str(folder), layer, model, args.model)
        found[layer] = check_sae_quality(model, sae, held_out[:MEASURED], insist=False, most=tokens)
    return found


# %%
if __name__ == "__main__":
    main(run, flags)
