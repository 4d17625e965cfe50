"""Models and SAEs: presets, what a source is (identity), whether what is loaded is sound, whether an SAE fits."""

import hashlib
import logging
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from safetensors import safe_open

from data import HERE, UserError, check_ends, first_line, in_a_line, note_once, opening


@dataclass(frozen=True)
class Preset:
    """A model and its SAEs. Their layers, width and L0 stand here, since reading SAELens's table takes seconds."""

    model: str  # hub id or folder
    sae: str | None = None  # of layer {layer}: a folder, or RELEASE:ID of SAELens's table
    layers: range | tuple[int, ...] = ()  # that have an SAE
    width: str = ""  # number of features
    l0: str = ""  # features active on a token, by layer: lowest to highest
    clamp: float = -100.0
    chosen: bool = False  # whether that clamp was chosen on this model
    n_features: int = 50
    dtype: str = "float32"
    retrained: str | None = None  # preset of the same model trained from scratch without the forget set


# Clamps: tiny's was chosen on the tuning half (docs/results.md). For the SAEs of gemma-2-2b -100 is the middle setting
# of SAEBench and Farrell et al. (arXiv 2410.19278). Gemma-3's residual stream is far larger, so -100 may do nothing.
PRESETS = {
    "tiny": Preset(str(HERE / "tiny/model"), str(HERE / "tiny/sae/layer_{layer}"), (3, 5, 7, 9, 15), "2048", "40",
                   -40.0, chosen=True, retrained="tiny-retrained"),
    "tiny-retrained": Preset(str(HERE / "tiny/retrained")),
    "qwen3-1.7b-base": Preset("Qwen/Qwen3-1.7B-Base", "qwen-scope-3-1.7b-base-w32k-l50:layer{layer}", range(28), "32k",
                              "50", dtype="bfloat16"),
    "qwen2.5-7b-instruct": Preset(
        "Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct-andyrdt:resid_post_layer_{layer}_trainer_1",
        range(3, 28, 4), "131k", "64", dtype="bfloat16"),
    "gemma-2-2b-it": Preset("google/gemma-2-2b-it", "gemma-scope-2b-pt-res-canonical:layer_{layer}/width_16k/canonical",
                            range(26), "16k", "59 to 141", chosen=True, dtype="bfloat16"),
    "gemma-2-9b-it": Preset("google/gemma-2-9b-it", "gemma-scope-9b-it-res-canonical:layer_{layer}/width_16k/canonical",
                            (9, 20, 31), "16k", "76 to 91", dtype="bfloat16"),
    **{f"gemma-3-{size}-it": Preset(f"google/gemma-3-{size}-it",
       f"gemma-scope-2-{size}-it-res-all:layer_{{layer}}_width_16k_l0_small", range(n), "16k", "10 to 20",
       dtype="bfloat16") for size, n in {"270m": 18, "1b": 26, "4b": 34, "12b": 48, "27b": 62}.items()},
    "gpt2": Preset("openai-community/gpt2", "gpt2-small-res-jb:blocks.{layer}.hook_resid_pre", range(12), "24k",
                   "10 to 70", -10.0)}  # fmt: skip


def preset(model: str) -> Preset:
    """The preset of that name; for a hub id or a folder, one that has this model, no SAEs and Preset's defaults."""
    return PRESETS.get(model, Preset(model))


def sae_source(spec: str | None, layer: int, model: str) -> str:
    """`spec`, a folder or RELEASE:ID; by default that of the model's preset. Raises UserError if both are None."""
    if not (spec or preset(model).sae):
        raise UserError(f"no SAE is known for {model}: give one, RELEASE:ID or a folder")
    return spec or str(layer).join(preset(model).sae.rsplit("{layer}", 1))  # a folder above may be called so


def listed() -> str:
    """The table of presets."""
    lines = [f"{'preset':20}{'model':25}{'layers':15}{'width':6}{'L0':10}{'clamp':11}dtype"]
    for name, p in PRESETS.items():
        clamp, r = f"{p.clamp:g}" if p.chosen else "not chosen", p.layers
        at = ", ".join(map(str, r)) if len(r) < 7 else f"{r[0]} to {r[-1]}" + f" by {r.step}" * (r.step > 1)
        saes = f"{at:15}{p.width:6}{p.l0:10}{clamp:11}" if p.sae else f"{'no SAEs':42}"
        lines.append(f"{name:20}{p.model.removeprefix(f'{HERE}/'):25}{saes}{p.dtype}")
    return "\n".join(lines)


def identity(source: str) -> str:
    """What a model or an SAE is: a hash of a local folder's files, or the commit of a hub repository. source: a folder,
    a hub id, or RELEASE:ID of SAELens's table. A path says nothing: a model trained again into it is another."""
    if Path(source).is_dir():
        whole = hashlib.sha256()
        for path in sorted(path for path in Path(source).iterdir() if path.is_file() and path.name[0] != "."):
            with path.open("rb") as file:
                whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return f"sha256:{whole.hexdigest()[:32]}"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from sae_lens.loading.pretrained_saes_directory import get_repo_id_and_folder_name

    repo, _, inside = source.partition(":")
    if inside:  # a release that the table lacks is a repository itself
        repo, inside = get_repo_id_and_folder_name(repo, inside)
    try:
        commit = Path(snapshot_download(repo, local_files_only=True, allow_patterns=[])).name  # cache/snapshots/COMMIT
    except LocalEntryNotFoundError:
        commit = "unknown"
    return f"{repo}@{commit}" + (f":{inside}" if inside else "")


def resolve_model(name: str) -> str:
    """The folder or hub id of a model. Raises UserError for a name that is neither, and as refuse_damaged does."""
    source = preset(name).model
    if Path(source).is_dir():
        refuse_damaged(source)
    elif "/" not in source:
        raise UserError(f"no model {name!r}: give a preset ({', '.join(PRESETS)}), a hub id ORG/NAME or a folder")
    return source


def gated_hint(source: str) -> str:
    """What to add to the message that a model cannot be loaded, if it is on the hub."""
    return "" if Path(source).is_dir() else (
        f". If it is gated, accept its licence at https://huggingface.co/{source} and run `hf auth login`; to work "
        "offline use the model tiny")  # fmt: skip


def without_lines(logger: str, part: str):
    """A context within which those lines of a logger are left out that have `part` in them, and no others."""
    log = logging.getLogger(logger)
    return patch.object(log, "handle", lambda record: part in record.getMessage() or type(log).handle(log, record))


# What files may have beside the weights of the language model: masks and rotary tables, which older versions of
# transformers saved; what reads images and sound; heads that predict further tokens
LEFT_OUT = re.compile(r"\.(attn|attention)\.(masked_)?bias$|causal_mask$|inv_freq$|(^|\.)mtp\.|"
                      r"^(model\.)?(vision|visual|audio|multi_modal)")  # fmt: skip
FORMS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def refuse_two_models(folder: Path) -> None:
    """Raises UserError for a model's weights beside another's; says which form is read of one that has several."""
    forms = [name for name in FORMS if (folder / name).is_file()]
    if set(forms) >= {*FORMS[:2]} or set(forms) >= {*FORMS[2:]}:
        raise UserError(f"{folder} holds two models, {' and '.join(forms)}: move the old one away")
    if len(forms) > 1:
        note_once(f"note: {folder} holds {' and '.join(forms)}: {forms[0]} is read")


def load_weights(auto_class, path: str, **options):
    """auto_class.from_pretrained(path, **options), a class of transformers, without its progress bar. Raises UserError
    naming the weights that the files lack, have in another shape or beyond the model's, and for files of two models."""
    from transformers.utils import cached_file

    refuse_two_models(Path(path) / (options.get("subfolder") or ""))
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    # the bar would come before a script's first line; what the report says is raised
    with (patch("transformers.core_model_loading.tqdm", lambda items, **_: items),
          without_lines("transformers.modeling_utils", "LOAD REPORT")):  # fmt: skip
        model, info = auto_class.from_pretrained(path, **options)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{path} has adapter_config.json beside weights, so transformers adds the adapter to them, a "
                        "second time if they are merged: move the adapter's files or the weights away")  # fmt: skip
    where = {name: options[name] for name in ("revision", "subfolder") if options.get(name)}
    refuse_damaged(Path(cached_file(path, "config.json", **where)).parent)  # of the hub, too
    refuse_keys(path, **{kind: info[f"{kind}_keys"] for kind in ("missing", "mismatched", "unexpected")})
    return model


def refuse_keys(path: str, missing=(), mismatched=(), unexpected=()) -> None:
    """Raises UserError naming weights that the files at `path` lack, have in another shape, or beyond the model's."""
    shapes = [f"{name} {tuple(has)} for {tuple(wanted)}" for name, has, wanted in mismatched]
    more = [name for name in unexpected if not LEFT_OUT.search(name)]
    wrong = {"lack": missing, "have in another shape": shapes, "have beyond the model's": more}
    said = [f"{what} {', '.join(sorted(names)[:2])}{f' and {len(names) - 2} more' * (len(names) > 2)}"
            for what, names in wrong.items() if names]  # fmt: skip
    if said:
        raise UserError(f"{path}: its weights are not those of its config.json: the files {'; '.join(said)}")


# Blanks, digits, line ends, contractions, accents and other scripts, which tokenizers cut up differently
PROBE = "Don't  we've  SHE'LL 1234567 3.14\n\n\t  na\u00efve caf\u00e9\u2019s \u4e2d\u6587 x_y(z);\r\n Answer: A "


def as_its_file(tokenizer, path: str, revision=None, subfolder: str = ""):
    """The tokenizer at `path`, as its tokenizer.json has it: the class that tokenizer_config.json names may cut texts
    up otherwise than the model was trained with. Says where that file's add_bos_token is not what happens."""
    from transformers import PreTrainedTokenizerFast as Plain  # the class that reads the file and changes nothing
    from transformers.models.auto.tokenization_auto import get_tokenizer_config
    from transformers.utils import cached_file

    where, name, same = {"revision": revision, "subfolder": subfolder}, type(tokenizer).__name__, False
    if not cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **where):
        return tokenizer
    plain = tokenizer if type(tokenizer) is Plain else Plain.from_pretrained(path, **where)
    with suppress(Exception):  # tokenizers raises no other, as where a class's unknown token is no token here
        same = tokenizer(PROBE)["input_ids"] == plain(PROBE)["input_ids"]
    if not same:
        note_once(f"note: {path}: transformers' {name} encodes otherwise than tokenizer.json, which is used")
    tokenizer, begins = tokenizer if same else plain, plain.bos_token_id in opening(plain)
    said = get_tokenizer_config(path, **where).get("add_bos_token", begins)  # transformers 5 leaves it unread
    if said == (not begins) and plain.bos_token:
        note_once(f"note: {path}: add_bos_token is {said} in tokenizer_config.json, but tokenizer.json, which is used, "
                  f"puts {plain.bos_token if begins else 'no BOS token'} in front of a text")  # fmt: skip
    return tokenizer


def load_tokenizer(path: str, edit_special: str = "never"):
    """A model's tokenizer, with its model_max_length (the model's positions), n_embeddings (its rows) and edit_special
    (edits.token_mask). Raises UserError if it is missing, unreadable or has no token to pad with; and as check_ends."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = as_its_file(AutoTokenizer.from_pretrained(path), path)
        config = AutoConfig.from_pretrained(path).get_text_config()
        empty = not tokenizer("a", add_special_tokens=False)["input_ids"]
    except (OSError, ValueError, TypeError) as error:
        if not Path(path).is_dir() and not isinstance(error, TypeError):
            raise  # a hub id: the caller's message adds gated_hint
        raise UserError(f"{path}: its tokenizer cannot be read ({first_line(error)}); are its files there?") from error
    if empty:
        raise UserError(f"{path} has no tokenizer: copy tokenizer.json and tokenizer_config.json there")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= config.vocab_size:
        tokenizer.pad_token = None  # the model has no embedding for it; data.pad_id then takes EOS
    if all(i is None for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)):
        raise UserError(f"{path}: the tokenizer has no padding, EOS or BOS token; name one in tokenizer_config.json")
    check_ends(tokenizer, [tokenizer("A")["input_ids"]])
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or sys.maxsize
    tokenizer.n_embeddings = config.vocab_size
    tokenizer.edit_special = edit_special
    return tokenizer


def refuse_damaged(folder) -> None:
    """Raises UserError for a git-LFS pointer, a folder or a broken link in a file's place, a safetensors file that is
    cut short, and weights in whole numbers where config.json has nothing about their scale."""
    kinds = (".safetensors", ".json", ".model", ".bin")
    for file in sorted(file for file in Path(folder).iterdir() if file.suffix in kinds):
        if not file.is_file():
            raise UserError(f"{file} is a folder or a broken link: download the file again")
        with file.open("rb") as content:
            if content.read(24) == b"version https://git-lfs.":
                raise UserError(f"{file} is a git-LFS pointer, not the file itself: run `git lfs pull` in its folder")
        if file.suffix == ".safetensors":
            with in_a_line(f"{file} is damaged or cut short, download it again"):
                content = safe_open(file, "pt")
            whole = [name for name in content.keys() if name.endswith(("weight", "_proj"))  # noqa: SIM118 (not a dict)
                     and content.get_slice(name).get_dtype()[0] in "IU"]  # fmt: skip
            if whole and not re.search(rb'"quantization_config"\s*:\s*{', (Path(folder) / "config.json").read_bytes()):
                raise UserError(f"{file}: {whole[0]} holds whole numbers, and config.json has no quantization_config: "
                                "give the model that it was made from")  # fmt: skip


def refuse_not_finite(name: str, tensors) -> None:
    """Raises UserError if one of the (name, tensor) pairs holds a NaN or an infinity. A sum needs no memory."""
    for what, tensor in tensors:
        if tensor.device.type != "meta" and not tensor.detach().sum().isfinite():
            raise UserError(f"{name}: {what} holds values that are not finite (NaN or infinity)")


def tensor_shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
    """Shapes in a safetensors file on the hub, from the cache: SAELens's own function needs the network every time."""
    from huggingface_hub import hf_hub_download

    with safe_open(hf_hub_download(repo_id, filename), "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)


# TransformerLens's names of the residual stream at a block, and the block's own names in transformers
RESIDUAL = re.compile(
    r"(?:blocks|(?:(?:model|language_model|text_model|transformer|gpt_neox|decoder|backbone)\.)*(?:layers|h))\.(\d+)"
    r"(?:\.(?:(hook_resid_pre|hook_in|input)|hook_resid_post|hook_out|output))?")  # fmt: skip


def check_sae(sae, model, layer: int, source: str) -> str:
    """The hook point at which the SAE's features can be ablated exactly, blocks.N.hook_resid_post. Raises UserError for
    another width, layer, kind of hook point, architecture or normalisation, and for weights that are not finite."""
    refuse_not_finite(source, sae.state_dict().items())
    architecture, hook, d_model = sae.cfg.architecture(), sae.cfg.metadata.hook_name, model.cfg.d_model
    if architecture not in ("standard", "jumprelu", "gated", "topk"):
        raise UserError(f"{source}: architecture {architecture!r} cannot be ablated feature by feature here")
    if sae.cfg.d_in != d_model:
        raise UserError(f"{source}: the SAE reads {sae.cfg.d_in} dimensions, the model's residual stream has {d_model}")
    if sae.cfg.normalize_activations not in ("none", "constant_norm_rescale", "layer_norm"):
        raise UserError(f"{source}: normalisation {sae.cfg.normalize_activations!r} was not folded into its weights")
    if not isinstance(hook, str):
        raise UserError(f"{source}: metadata.hook_name of its cfg.json does not say which hook point it reads: {hook}")
    named = RESIDUAL.fullmatch(hook)
    block = int(named[1]) if named else -1
    # what block N reads is what block N - 1 writes
    point = f"blocks.{block - 1 if named and named[2] else block}.hook_resid_post"
    if point not in model.hook_dict:
        raise UserError(f"{source}: hook point {hook} is not a residual stream of this model that can be edited")
    if block != layer:
        raise UserError(f"{source} was trained at layer {block}, not at layer {layer}")
    trained_on = str(sae.cfg.metadata.model_name or "unknown")
    loaded = str(model.cfg.model_name).rstrip("/").split("/")[-1]
    if trained_on.split("/")[-1] != loaded:
        print(f"note: {source} was trained on {trained_on}, the model is {loaded}", file=sys.stderr)
    return point
