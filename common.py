"""
What the three tutorials share and must not disagree on: load a model and an SAE, ablate features, and the flags.

Notation: h is the residual stream at the hook point, (batch, pos, d_model); a = SAE.encode(h),
(batch, pos, d_sae); F the picked features. An ablation keeps the SAE's error term:

    h' = h + sum over i in F of (a'_i - a_i) * W_dec[i],    a'_i = clamp where a_i > 0

with clamp 0 for zero ablation and a negative clamp as in Farrell, Lau and Conmy (arXiv 2410.19278).
"""

import argparse
import math
import os
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # image processors complain at import otherwise

import torch
from sae_lens import SAE
from safetensors import SafetensorError, safe_open
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.multi_gpu import maybe_cast_floating_params
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from data import HERE, UserError, check_folder, first_line
from edits import applied, edit_of, layer_of
from hub import announce, announce_sae, identity, sae_ids_near, tensor_shapes
from presets import PRESETS, listed, model_source, sae_source
from processes import LostProcess, count, one_voice
from processes import device as own_device

disable_progress_bar()  # "Loading weights" would come before the first line of ours


# ---------------------------------------------------------------------------------------------- load


def load_model(
    name: str,
    device: str | None = None,
    dtype: str = "float32",
    device_map: str | None = None,
    edit_special: str = "never",
) -> TransformerBridge:
    """Load a preset's name, a hub id or a local folder as a frozen TransformerBridge (raw HF weights, eager attention).

    device_map: "auto" spreads the layers over all GPUs (Hugging Face's accelerate). edit_special: as watch_tokens has
    it. Raises UserError if there is no
    such model, the hub does not let us have it, the disk has no room for it or the GPUs have none.
    """
    path = model_source(name)
    if not Path(path).is_dir() and "/" not in path and name not in PRESETS:
        raise UserError(f"no model {name!r}: give a preset ({', '.join(PRESETS)}), a hub id ORG/NAME or a folder")
    if device_map and (device or count() > 1):
        raise UserError("--device-map spreads one model over the GPUs: leave out --device and accelerate launch")
    if not Path(path).is_dir():
        announce(path)
    else:
        refuse_damaged(path)
    place = {"device_map": device_map} if device_map else {"device": own_device() or device or best_device()}
    plain = {}

    def keep_plain(hf, dtype):  # the last that TransformerLens does before it puts its own modules in
        maybe_cast_floating_params(hf, dtype)
        refuse_not_finite(path, hf.named_parameters())
        plain["ids"] = random_ids(hf)
        plain["log_probs"] = log_probs(hf, plain["ids"])

    try:
        tokenizer = load_tokenizer(path)
        tokenizer.edit_special = edit_special
        # where a processor of images fails to load, TransformerLens would pip install torchvision and a new torch
        with (
            patch("subprocess.check_call", side_effect=OSError("no installing from here")),
            patch("transformer_lens.utilities.multi_gpu.maybe_cast_floating_params", keep_plain),
        ):
            model = TransformerBridge.boot_transformers(path, dtype=getattr(torch, dtype), **place)
        # the bridge's copy of the tokenizer adds a BOS where the model's own does not; prompts must be lm-eval's
        model._tokenizer = tokenizer
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if "device_map" in str(error):
            raise UserError(f"--device-map {device_map}: {first_line(error)}") from error
        if isinstance(error, ImportError):
            raise UserError(f"cannot load {path} here: {first_line(error)}. Its weights are packed or quantised: give "
                            "the model that it was made from") from error  # fmt: skip
        if Path(path).is_dir():
            raise UserError(f"{path} is not a model folder that transformers can read: {first_line(error)}") from error
        raise UserError(
            f"cannot load {path}: {first_line(error)}. If it is gated, accept its licence at "
            f"https://huggingface.co/{path} and run `hf auth login`; to work offline use --model tiny"
        ) from error
    model.eval().requires_grad_(False)
    again = partial(log_probs, model.original_model, plain["ids"])
    if not alike(plain["log_probs"], again(), model.original_model, again):
        raise UserError(f"{path}: TransformerLens's {type(model.original_model).__name__} gives other probabilities "
                        "than Hugging Face's own, so nothing measured on it would be of this model")  # fmt: skip
    return model


def load_tokenizer(path: str):
    """A model's own tokenizer, its model_max_length the number of the model's positions. Raises UserError where it is
    missing or has no token to pad with."""
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path).get_text_config()
        empty = not tokenizer("a", add_special_tokens=False)["input_ids"]
    except (OSError, ValueError) as error:
        if not Path(path).is_dir():
            raise
        raise UserError(f"{path}: its tokenizer cannot be read ({first_line(error)}); are its files there?") from error
    if empty:
        raise UserError(f"{path} has no tokenizer: copy tokenizer.json and tokenizer_config.json there")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= config.vocab_size:
        tokenizer.pad_token = None  # added after training: data.padded then takes EOS, which reaches no result either
    if all(i is None for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)):
        raise UserError(f"{path}: the tokenizer has no padding, EOS or BOS token; name one in tokenizer_config.json")
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or sys.maxsize
    return tokenizer


def refuse_damaged(folder: str) -> None:
    """Raises UserError for a git-LFS pointer in a file's place, and for a safetensors file that is cut short."""
    for file in sorted(Path(folder).glob("*")):
        if file.suffix not in (".safetensors", ".json", ".model"):
            continue
        with file.open("rb") as content:
            if content.read(24) == b"version https://git-lfs.":
                raise UserError(f"{file} is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder")
        if file.suffix == ".safetensors":
            try:
                safe_open(file, "pt")
            except SafetensorError as error:
                raise UserError(f"{file} is damaged or cut short ({first_line(error)}): download it again") from error


def refuse_not_finite(name: str, tensors) -> None:
    """Raises UserError if one of the (name, tensor) pairs holds a NaN or an infinity. A sum needs no memory."""
    for what, tensor in tensors:
        if tensor.device.type != "meta" and not torch.isfinite(tensor.detach().sum()):
            raise UserError(f"{name}: {what} holds values that are not finite (NaN or infinity)")


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_hf(name: str, device: str | None = None, dtype: str = "float32") -> tuple:
    """The Hugging Face model and tokenizer behind load_model(name), to be trained: eager attention, no dropout."""
    path = model_source(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="eager")
    refuse_not_finite(path, model.named_parameters())
    model.to(device or best_device())
    return model.eval().requires_grad_(False), load_tokenizer(path)


def load_sae(spec: str | None, layer: int, model: TransformerBridge, preset: str = "tiny") -> SAE:
    """Load the SAE of `spec` (RELEASE:ID or a folder; None: the preset's for `layer`) in fp32 on the layer's device.

    Sets `sae.source` (str), `sae.identity` (hub.identity's) and `sae.hook_point` (a resid_post name that the model
    has). Raises UserError for a layer without SAE, an unknown release, and an SAE whose architecture, width, hook
    point or normalisation this code cannot ablate exactly.
    """
    if not 0 <= layer < model.cfg.n_layers:
        raise UserError(f"--layer {layer}: the model has layers 0 to {model.cfg.n_layers - 1}")
    spec = sae_source(spec, layer, preset)
    try:
        if Path(spec).is_dir():
            refuse_damaged(spec)
            if (Path(spec) / "sae.safetensors").is_file() and not (Path(spec) / "sae_weights.safetensors").exists():
                raise UserError(f"{spec} is in sparsify's format: only SAELens's own can be read from a folder "
                                "(cfg.json with `architecture`, sae_weights.safetensors)")  # fmt: skip
            sae = SAE.load_from_disk(spec, dtype="float32")
        elif ":" in spec and not Path(spec).is_absolute():
            announce_sae(*spec.split(":", 1))
            with patch("sae_lens.loading.pretrained_sae_loaders.get_safetensors_tensor_shapes", tensor_shapes):
                sae = SAE.from_pretrained(*spec.split(":", 1), dtype="float32")
        else:
            there = sorted(p.name for p in Path(spec).parent.glob("*") if p.is_dir())
            raise UserError(f"no SAE folder {spec}; there are: {', '.join(there) or 'none'}")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the SAE {spec}: {first_line(error)}{sae_ids_near(spec)}") from error
    sae.source = os.path.relpath(spec, HERE) if Path(spec).is_dir() and HERE in Path(spec).parents else spec
    sae.identity = identity(spec)
    check_sae(sae, model, layer)
    place = next(model.blocks[layer_of(sae)].parameters()).device
    sae.eval().requires_grad_(False)
    return sae if place.type == "meta" else sae.to(place)  # offloaded weights are nowhere: edits follow the residual


def check_sae(sae: SAE, model: TransformerBridge, layer: int) -> None:
    """Refuse what cannot be ablated exactly, and settle the hook point (`sae.hook_point`)."""
    name, arch = sae.source, sae.cfg.architecture()
    refuse_not_finite(name, sae.state_dict().items())
    if arch not in ("standard", "jumprelu", "gated", "topk"):
        raise UserError(f"{name}: architecture {arch!r} cannot be ablated feature by feature here")
    if sae.cfg.d_in != model.cfg.d_model:
        raise UserError(
            f"{name}: the SAE reads {sae.cfg.d_in} dimensions, the model's residual has {model.cfg.d_model}"
        )
    if sae.cfg.normalize_activations not in ("none", "constant_norm_rescale", "layer_norm"):
        raise UserError(f"{name}: normalisation {sae.cfg.normalize_activations!r} was not folded into its weights")
    hook = sae.cfg.metadata.hook_name
    if hook is None:
        raise UserError(f"{name}: its cfg.json does not say which hook point it reads (metadata.hook_name)")
    kind = hook.split(".")[-1]
    block = int(hook.split(".")[1]) if hook.startswith("blocks.") and hook.split(".")[1].isdigit() else -1
    if kind == "hook_resid_pre" and block > 0:  # the same tensor under the name the engine expects
        hook, kind = f"blocks.{block - 1}.hook_resid_post", "hook_resid_post"
    if kind != "hook_resid_post" or hook not in model.hook_dict:
        raise UserError(f"{name}: hook point {hook} is not a residual stream of this model that can be edited")
    if block != layer:
        raise UserError(f"{name} was trained at layer {block}, but --layer is {layer}")
    sae.hook_point = hook
    trained_on = str(sae.cfg.metadata.model_name or "unknown")
    loaded = str(model.cfg.model_name).rstrip("/").split("/")[-1]
    if trained_on.split("/")[-1] != loaded:
        print(f"note: {name} was trained on {trained_on}, the model is {loaded}", file=sys.stderr)


# ---------------------------------------------------------------------------- is it the model it should be

CLOSE = 1e-3  # nats, at most, by which log-probabilities differ where float32 sums in another order
ROUNDINGS = 4.0  # and else root mean squares, in those of what rounding every module's output otherwise does


def random_ids(model: torch.nn.Module, shape: tuple = (2, 12)) -> torch.Tensor:
    """Token ids that say nothing, the same ones each time. model: a Hugging Face model."""
    table = model.get_input_embeddings().weight
    noise = torch.Generator().manual_seed(0)
    return torch.randint(len(table), shape, generator=noise).to(table.device if table.device.type != "meta" else "cpu")


@torch.inference_mode()
def log_probs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(batch, pos, d_vocab) in fp32 on the CPU, from a plain pass of a Hugging Face model.

    Raises UserError where they are no numbers, or the model does not run.
    """
    try:
        found = model(ids, use_cache=False).logits.float().log_softmax(-1).cpu()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{type(model).__name__} does not run here: {first_line(error)}") from error
    if found.isnan().any():
        raise UserError(f"{type(model).__name__} gives log-probabilities that are no numbers (NaN)")
    return found


def alike(found: torch.Tensor, wanted: torch.Tensor, model: torch.nn.Module, run) -> bool:
    """Do two sets of log-probabilities differ by no more than rounding explains?

    How much that is in the model's dtype, run() tells: it computes `wanted` once more, while the output of every module
    with weights is off by one unit in its last place, up or down. Measured on 27 families of random weights and on
    tiny, in float32 and bfloat16, differences without a fault stayed below 0.9 of that.
    """
    gap = found - wanted
    if gap.abs().max() <= CLOSE:
        return True
    noise = torch.Generator().manual_seed(0)

    def round_otherwise(module, args, output):
        if torch.is_tensor(output) and output.is_floating_point():
            signs = torch.randint(2, output.shape, generator=noise).to(output.device) * 2 - 1
            return output * (1 + torch.finfo(output.dtype).eps * signs).to(output.dtype)

    weighty = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    handles = [module.register_forward_hook(round_otherwise) for module in weighty]
    try:
        rounding = run() - wanted
    finally:
        for handle in handles:
            handle.remove()
    return bool(gap.pow(2).mean() <= ROUNDINGS**2 * rounding.pow(2).mean())


# ------------------------------------------------------------------------------------------- ablate


def ablate(model: TransformerBridge, sae: SAE, features: list[int], clamp: float = 0.0):
    """A context within which the model runs with `features` ablated: clamp 0 zeroes them, a negative clamp overshoots.

    Only tokens on which a feature is active are edited, special tokens never. With no features the output is the
    model's own to the last bit. Raises ValueError as edits.edit_of does, and RuntimeError if the layer never ran.
    """
    return applied(model, model.tokenizer, edit_of("sae-ablation", sae, features=features, clamp=clamp))


# -------------------------------------------------------------------------------------- command line


class ListPresets(argparse.Action):
    def __call__(self, parser, *_):
        print(listed())
        parser.exit()


def parser(doc: str, without: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The flags that every script has, but for those `without`; a script adds its own, or one in place of ours."""
    shape = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, formatter_class=shape, allow_abbrev=False, conflict_handler="resolve")

    def add(name, **options):
        if name not in without:
            p.add_argument(name, **options)

    add("--model", default="tiny", help=f"preset ({', '.join(PRESETS)}), hub id or folder (default: %(default)s)")
    add("--list", nargs=0, action=ListPresets, default=argparse.SUPPRESS,
        help="show the presets with the layers, widths and L0s of their SAEs")  # fmt: skip
    add("--sae", help="RELEASE:ID of SAELens's table, or a folder (default: the preset's SAE of --layer)")
    add("--layer", type=int, default=7, help="layer of the SAE; tiny has 3, 5, 7, 9 (default: %(default)s)")
    add("--n-features", type=int, default=50, help="how many features to ablate (default: %(default)s)")
    add("--clamp", type=float, help="negative value that active features are set to (default: the preset's)")
    add("--pick", default="ratio", help="rule: ratio, retain-threshold or dsg (default: %(default)s)")
    add("--pick-on", default="half", choices=["half", "all"], help="half: pick on one half of the WMDP-Bio questions "
        "and score the other; all: pick and score on all, the old leaky number (default: %(default)s)")  # fmt: skip
    add("--pick-text", default="prompt", choices=["prompt", "prose"], help="prompt: pick on the questions as they are "
        "asked, and a feature must be rare in MMLU's development questions too; prose: on question and answer without "
        "the template, against Wikitext alone, which picks features of any quiz (default: %(default)s)")  # fmt: skip
    add("--data", help="folder with any of wmdp_bio, mmlu, mmlu_dev, wikitext, openwebtext, forget_corpus .jsonl")
    add("--forget-corpus", metavar="FILE", help="your copy of the WMDP-Bio forget corpus, JSONL with a text in each "
        "line, or its hub id: picked and trained on in the questions' place")  # fmt: skip
    add("--context", type=int, default=128, help="tokens of a text that rates are counted on at a time; SAEBench and "
        "Farrell et al.: 1024 (default: %(default)s)")  # fmt: skip
    add("--edit-special", default="never", choices=["never", "all-but-bos"], help="special tokens, chat markers among "
        "them, are never edited, or as in SAEBench all are but the first token (default: %(default)s)")  # fmt: skip
    add("--skip-long", action="store_true", help="leave out, and count, questions longer than the model's positions")
    add("--limit", type=int, help="score only that many questions (a seeded sample) or documents of each data set")
    add("--batch-size", type=int, default=16, help="prompts per pass; changes memory, not results (default: 16)")
    add("--max-rows", type=int, default=64, help="edited copies per pass; changes memory, not results (default: 64)")
    add("--seed", type=int, default=0, help="seed of split, control features and bootstrap (default: %(default)s)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: cuda if there is one; accelerate launch decides "
        "for each process)")  # fmt: skip
    add("--device-map", choices=["auto", "balanced", "sequential"], help="spread a model that is larger than one GPU "
        "over all of them")  # fmt: skip
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model; SAEs stay in float32")
    add("--no-sanity", action="store_true", help="go on even if the SAE does not fit the model")
    add("--out", help="record file; figures get the same name (default: results/<script>_<settings>.json)")
    return p


def quiz_flags(p: argparse.ArgumentParser, subjects: str = "SAEBench's four where they are, else all") -> None:
    """The flags of scripts that score quizzes: how they are asked, and which questions are."""
    p.add_argument("--prompt", default="plain", choices=["plain", "chat", "saebench"], help="lm-eval's template; in a "
                   "chat turn; or SAEBench's chat turn, answered after 'Answer: ('")  # fmt: skip
    p.add_argument("--robust", action="store_true", help="score only questions right under all 24 orders of options")
    p.add_argument("--subjects", help=f"MMLU subjects, comma-separated (default: {subjects})")


def latent_flags(p: argparse.ArgumentParser) -> None:
    """The flags of scripts that run refusal-clamp."""
    p.add_argument("--refusal-latent", type=int, help="for refusal-clamp: a latent active when the model declines")
    p.add_argument("--refusal-value", type=float, default=-500.0, help="what it is set to (default: %(default)s)")


def settings(p: argparse.ArgumentParser, flags: dict) -> argparse.Namespace:
    """The parser's defaults with `flags` over them, for `run(layer=3)` in a notebook; TypeError for unknown ones."""
    known = vars(p.parse_args([]))
    if unknown := set(flags) - set(known):
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    s = argparse.Namespace(**{**known, **flags})
    refuse_not_finite_flags(s)
    # it would be taken for a flag that is not there
    if empty := [name for name, value in vars(s).items() if value in ("", []) and value != known[name]]:
        raise UserError(f"--{empty[0].replace('_', '-')}: nothing is given; leave it out, or say what")
    if getattr(s, "seed", 0) < 0:
        raise UserError(f"--seed {s.seed}: 0 or more")
    # from whatever folder a record is read, it must lead to them
    for name in ("model", "sae", "data", "forget_corpus"):
        if (place := getattr(s, name, None)) and place not in PRESETS and Path(place).exists():
            setattr(s, name, os.path.abspath(place))
    check_folder(getattr(s, "data", None))
    for name in ("n_features", "batch_size", "max_rows", "limit", "context"):
        value = getattr(s, name, None)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number < 1:
                raise UserError(f"--{name.replace('_', '-')} {number}: at least 1")
    if "clamp" not in known:
        return s
    if s.clamp is None:
        s.clamp = PRESETS[s.model].clamp if s.model in PRESETS else -100.0
    if not isinstance(s.clamp, list) and s.clamp >= 0:
        raise UserError(f"--clamp {s.clamp:g}: a negative number; zero ablation has a row of its own")
    return s


def refuse_not_finite_flags(s: argparse.Namespace) -> None:
    """Raises UserError if a number of the settings, or one in a list of them, is NaN or infinite."""
    for name, value in vars(s).items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"--{name.replace('_', '-')} {number}: a finite number is wanted")


def command_line(run, p: argparse.ArgumentParser) -> None:
    """Call run(**flags); a user's mistake ends in one line and exit code 2, Ctrl-C in 130, a lost process in 1.

    In a notebook or a console of PyCharm sys.argv is not ours, and the defaults are taken.
    """

    def mistake(message):
        raise UserError(f"{message} (see --help)")

    p.error = mistake
    with one_voice() as say:
        try:
            others = any(name in sys.argv[0] for name in ("kernel_launcher", "pydevconsole"))
            flags = p.parse_args([] if others else None)
            run(**vars(flags))
        except UserError as error:
            say(f"error: {error}")
            sys.exit(2)
        except LostProcess as error:
            say(f"error: {error}")
            sys.exit(1)
        except KeyboardInterrupt as stop:
            print(f"\nstopped: {str(stop) or 'nothing was written'}", file=sys.stderr)
            sys.exit(130)
