"""
Where models and SAEs come from: presets, whether what is loaded is sound, what it is (identity), whether an SAE fits.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data import HERE, UserError, first_line


@dataclass(frozen=True)
class Preset:
    """A model and its SAEs. Their layers, width and L0 stand here, since reading SAELens's table takes seconds."""

    model: str  # hub id or folder
    sae: str | None = None  # of layer {layer}: a folder, or RELEASE:ID of SAELens's table
    layers: Sequence[int] = ()  # that have an SAE
    width: str = ""  # number of features
    l0: str = ""  # features active on a token, by layer: lowest to highest
    clamp: float = -100.0
    dtype: str = "bfloat16"
    retrained: str | None = None  # preset of the same model trained from scratch without the forget set


# Clamps: tiny's was chosen on the tuning half (docs/results.md). For the gemma-2 SAEs -100 is the middle setting of
# SAEBench and Farrell et al. (arXiv 2410.19278). Gemma-3's residual stream is far larger, so -100 may do nothing.
PRESETS = {
    "tiny": Preset(str(HERE / "tiny/model"), str(HERE / "tiny/sae/layer_{layer}"), (3, 5, 7, 9, 15), "2048", "40",
                   -40.0, "float32", "tiny-retrained"),
    "tiny-retrained": Preset(str(HERE / "tiny/retrained"), dtype="float32"),
    "gemma-2-2b-it": Preset("google/gemma-2-2b-it", "gemma-scope-2b-pt-res-canonical:layer_{layer}/width_16k/canonical",
                            range(26), "16k", "59 to 141"),
    "gemma-3-1b-it": Preset("google/gemma-3-1b-it", "gemma-scope-2-1b-it-res-all:layer_{layer}_width_16k_l0_small",
                            range(26), "16k", "10 to 20"),
    "gemma-3-4b-it": Preset("google/gemma-3-4b-it", "gemma-scope-2-4b-it-res-all:layer_{layer}_width_16k_l0_small",
                            range(34), "16k", "10 to 20"),
    "gpt2": Preset("openai-community/gpt2", "gpt2-small-res-jb:blocks.{layer}.hook_resid_pre", range(12), "24k",
                   "10 to 70", -10.0, "float32"),
}  # fmt: skip


def preset_clamp(model: str) -> float:
    """The clamp that is used where none is given."""
    return PRESETS[model].clamp if model in PRESETS else Preset.clamp


def preset_dtype(model: str) -> str:
    """The dtype in which the model is loaded where none is given."""
    return PRESETS[model].dtype if model in PRESETS else "float32"


def retrained(model: str) -> str | None:
    """The preset of the same model trained from scratch without the forget set: what unlearning aims at. Only tiny has
    one; for real models nobody can afford it."""
    return PRESETS[model].retrained if model in PRESETS else None


def model_source(name: str) -> str:
    """The hub id or folder of a preset, or the hub id or folder itself."""
    return PRESETS[name].model if name in PRESETS else name


def sae_source(spec: str | None, layer: int, model: str) -> str:
    """The folder or RELEASE:ID `spec` itself, by default that of the model's preset. Raises UserError where the model
    has no preset with SAEs."""
    if spec is None and (model not in PRESETS or PRESETS[model].sae is None):
        raise UserError(f"no SAE is known for {model}: give one, RELEASE:ID or a folder")
    return spec or PRESETS[model].sae.format(layer=layer)


def listed() -> str:
    """The table of presets."""
    lines = [f"{'preset':16}{'model':25}{'layers':16}{'width':8}{'L0':11}{'clamp':7}dtype"]
    for name, preset in PRESETS.items():
        start, layers = f"{name:16}{preset.model.removeprefix(f'{HERE}/'):25}", preset.layers
        span = f"0 to {len(layers) - 1}" if isinstance(layers, range) else ", ".join(map(str, layers))
        saes = f"{span:16}{preset.width:8}{preset.l0:11}{preset.clamp:<7g}" if layers else f"{'no SAEs':42}"
        lines.append(start + saes + preset.dtype)
    return "\n".join(lines)


def identity(source: str) -> str:
    """What a model or an SAE is: a hash of the files of a local folder, or the commit of a repository on the hub.

    source: a folder, a hub id, or RELEASE:ID of SAELens's table. Records and caches carry it, because a path says
    nothing: a model trained again into the same folder is another model.
    """
    if Path(source).is_dir():
        whole = hashlib.sha256()
        for path in sorted(path for path in Path(source).iterdir() if path.is_file() and path.name[0] != "."):
            whole.update(path.name.encode() + content_hash(path))
        return f"sha256:{whole.hexdigest()[:32]}"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, _, inside = source.partition(":")
    if inside:
        repo, inside = repository_of(repo, inside)
    try:
        commit = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[])).name  # cache/snapshots/COMMIT
    except LocalEntryNotFoundError:
        commit = "unknown"
    return f"{repo}@{commit}" + (f":{inside}" if inside else "")


def repository_of(release: str, sae_id: str) -> tuple[str, str]:
    """The repository of an SAE on the hub, and the SAE's path there. Releases that SAELens's table does not have are
    repositories themselves."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entry = get_pretrained_saes_directory().get(release)
    return (entry.repo_id, entry.saes_map.get(sae_id, sae_id)) if entry else (release, sae_id)


def content_hash(path: Path) -> bytes:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def resolve_model(name: str) -> str:
    """The folder or hub id of a model. Raises UserError for a name that is neither, and as refuse_damaged does."""
    source = model_source(name)
    if Path(source).is_dir():
        refuse_damaged(source)
    elif "/" not in source:
        raise UserError(f"no model {name!r}: give a preset ({', '.join(PRESETS)}), a hub id ORG/NAME or a folder")
    return source


def gated_hint(source: str) -> str:
    """What to add to the message that a model on the hub cannot be loaded."""
    if Path(source).is_dir():
        return ""
    return (f". If it is gated, accept its licence at https://huggingface.co/{source} and run `hf auth login`; to work "
            "offline use the model tiny")  # fmt: skip


def load_tokenizer(path: str, edit_special: str = "never"):
    """A model's own tokenizer. Its model_max_length is the number of the model's positions; edit_special ("never" or
    "all-but-bos") says whether edits reach special tokens. Raises UserError if it is missing or has no token to pad
    with."""
    from transformers import AutoConfig, AutoTokenizer

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
        tokenizer.pad_token = None  # added after training; data.padded then takes EOS, which reaches no result either
    if all(i is None for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)):
        raise UserError(f"{path}: the tokenizer has no padding, EOS or BOS token; name one in tokenizer_config.json")
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or sys.maxsize
    tokenizer.edit_special = edit_special
    return tokenizer


def refuse_damaged(folder: str) -> None:
    """Raises UserError for a git-LFS pointer in a file's place, and for a safetensors file that is cut short."""
    from safetensors import SafetensorError, safe_open

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
    import torch

    for what, tensor in tensors:
        if tensor.device.type != "meta" and not torch.isfinite(tensor.detach().sum()):
            raise UserError(f"{name}: {what} holds values that are not finite (NaN or infinity)")


def tensor_shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
    """Shapes of a safetensors file on the hub. SAELens's function of this use asks the hub at every load; the cache
    knows them without a network."""
    from huggingface_hub import hf_hub_download
    from safetensors import safe_open

    with safe_open(hf_hub_download(repo_id, filename), "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)


def sae_ids_near(spec: str) -> str:
    """What else the release of a RELEASE:ID holds, for an error message."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release = get_pretrained_saes_directory().get(spec.split(":")[0])
    return f"; the release has: {', '.join(release.saes_map)[:300]} ..." if release else ""


def check_sae(sae, model, layer: int, source: str) -> str:
    """The hook point at which the SAE's features can be ablated exactly, blocks.N.hook_resid_post. Raises UserError for
    an SAE of another width, layer or kind of hook point, and for architectures and normalisations that
    edits.Latents does not compute."""
    refuse_not_finite(source, sae.state_dict().items())
    architecture, hook = sae.cfg.architecture(), sae.cfg.metadata.hook_name
    if architecture not in ("standard", "jumprelu", "gated", "topk"):
        raise UserError(f"{source}: architecture {architecture!r} cannot be ablated feature by feature here")
    if sae.cfg.d_in != model.cfg.d_model:
        d_model = model.cfg.d_model
        raise UserError(f"{source}: the SAE reads {sae.cfg.d_in} dimensions, the model's residual stream has {d_model}")
    if sae.cfg.normalize_activations not in ("none", "constant_norm_rescale", "layer_norm"):
        raise UserError(f"{source}: normalisation {sae.cfg.normalize_activations!r} was not folded into its weights")
    if hook is None:
        raise UserError(f"{source}: its cfg.json does not say which hook point it reads (metadata.hook_name)")
    _, block, kind = (hook.split(".") + ["", ""])[:3] if hook.startswith("blocks.") else ("", "", "")
    block = int(block) if block.isdigit() else -1
    point = hook
    if kind == "hook_resid_pre" and block > 0:  # what block N reads is what block N - 1 writes
        point, kind = f"blocks.{block - 1}.hook_resid_post", "hook_resid_post"
    if kind != "hook_resid_post" or point not in model.hook_dict:
        raise UserError(f"{source}: hook point {hook} is not a residual stream of this model that can be edited")
    if block != layer:
        raise UserError(f"{source} was trained at layer {block}, not at layer {layer}")
    trained_on = str(sae.cfg.metadata.model_name or "unknown")
    loaded = str(model.cfg.model_name).rstrip("/").split("/")[-1]
    if trained_on.split("/")[-1] != loaded:
        print(f"note: {source} was trained on {trained_on}, the model is {loaded}", file=sys.stderr)
    return point
