"""
Where models and SAEs come from: presets, downloads, what a model or an SAE is, and whether the two fit.
"""

import hashlib
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import yaml

from data import HERE, UserError, first_line
from processes import is_first

# ------------------------------------------------------------------------------------------- presets


@dataclass(frozen=True)
class Preset:
    """A model, the SAE for `--layer L` (a folder, or RELEASE:ID of SAELens's table), the default clamp, the preset of
    the same model trained without the forget set, which on real models nobody can afford, and the default dtype."""

    model: str
    sae: str | None = None
    clamp: float = -100.0
    never_knew: str | None = None
    dtype: str = "bfloat16"


# Clamps: tiny's was chosen on the picking half (docs/results.md); -100 and the gemma-2 SAEs are SAEBench's and
# Farrell et al.'s middle setting (arXiv 2410.19278). Gemma-3 residuals are far larger, so -100 may do nothing.
PRESETS = {
    "tiny": Preset(str(HERE / "tiny/model"), str(HERE / "tiny/sae/layer_{layer}"), -40.0, "never-knew",
                   "float32"),
    "never-knew": Preset(str(HERE / "tiny/never_knew"), dtype="float32"),
    "gemma-2-2b-it": Preset("google/gemma-2-2b-it",
                            "gemma-scope-2b-pt-res-canonical:layer_{layer}/width_16k/canonical", -100.0),
    "gemma-3-1b-it": Preset("google/gemma-3-1b-it",
                            "gemma-scope-2-1b-it-res-all:layer_{layer}_width_16k_l0_small", -100.0),
    "gemma-3-4b-it": Preset("google/gemma-3-4b-it",
                            "gemma-scope-2-4b-it-res-all:layer_{layer}_width_16k_l0_small", -100.0),
    "gpt2": Preset("openai-community/gpt2", "gpt2-small-res-jb:blocks.{layer}.hook_resid_pre", -10.0,
                   dtype="float32"),
}  # fmt: skip


def model_source(name: str) -> str:
    """The hub id or folder that --model NAME stands for."""
    return PRESETS[name].model if name in PRESETS else name


def never_knew(name: str) -> str | None:
    """The preset of the model that was trained as the preset `name` was, without the forget set: what unlearning aims
    at. None where there is none, as for all models but tiny."""
    return PRESETS[name].never_knew if name in PRESETS else None


def identity_of_never_knew(name: str) -> str | None:
    """What the model that never_knew names is now; records with its scores depend on it."""
    twin = never_knew(name)
    return identity(PRESETS[twin].model) if twin else None


def sae_source(spec: str | None, layer: int, model: str) -> str:
    """The RELEASE:ID or folder that --sae SPEC (None: the preset's of the layer) stands for. Raises UserError for a
    model that has no preset."""
    if spec is None and (model not in PRESETS or PRESETS[model].sae is None):
        raise UserError(f"no SAE is known for {model}: give --sae RELEASE:ID or --sae FOLDER")
    return spec or PRESETS[model].sae.format(layer=layer)


def layers_of(preset: Preset) -> dict[int, tuple[str, float | None]]:
    """{layer: (width, L0 where it is known)} of the preset's SAEs: its folders, or the ids in SAELens's table."""
    if preset.sae is None:
        return {}
    if ":" not in preset.sae:
        folders = {int(path.name.split("_")[1]): path for path in HERE.glob("tiny/sae/layer_*")}
        configs = {layer: json.loads((path / "cfg.json").read_text()) for layer, path in sorted(folders.items())}
        return {layer: (str(config["d_sae"]), config["metadata"].get("l0")) for layer, config in configs.items()}
    release, template = preset.sae.split(":", 1)
    entry, found = release_of(release), {}
    pattern = re.escape(template).replace(re.escape("{layer}"), r"(\d+)")
    for sae_id, path in entry.saes_map.items():
        if match := re.fullmatch(pattern, sae_id):
            width = re.search(r"width_(\w+?)(?:[_/]|$)", path)
            l0 = entry.expected_l0.get(sae_id) or next(iter(re.findall(r"l0_(\d+)", path)), None)
            found[int(match[1])] = (width[1] if width else "", l0 and float(l0))
    return dict(sorted(found.items()))


def listed() -> str:
    """A line for each preset: model, layers, width, L0s from lowest to highest, default clamp and dtype."""
    lines = [f"{'preset':16}{'model':25}{'layers':16}{'width':8}{'L0':10}{'clamp':7}dtype"]
    for name, preset in PRESETS.items():
        model, layers = preset.model.removeprefix(f"{HERE}/"), layers_of(preset)
        if not layers:
            lines.append(f"{name:16}{model:25}no SAEs")
            continue
        every = list(layers) == list(range(min(layers), max(layers) + 1))
        span = f"{min(layers)} to {max(layers)}" if every else ", ".join(map(str, layers))
        l0s = sorted(l0 for _, l0 in layers.values() if l0)
        l0 = f"{l0s[0]:.0f} to {l0s[-1]:.0f}" if l0s else ""
        width = next(iter(layers.values()))[0]
        lines.append(f"{name:16}{model:25}{span:16}{width:8}{l0:10}{preset.clamp:<7g}{preset.dtype}")
    return "\n".join(lines)


GATE_TOKENS = 10_000  # of the retain texts, for the SAE check

# ----------------------------------------------------------------------------------- SAELens's table


@dataclass(frozen=True)
class Release:
    """What SAELens's table says of a release: its repository, and by id the path there and the L0."""

    repo_id: str
    saes_map: dict[str, str]
    expected_l0: dict[str, float]


@cache
def release_of(name: str) -> Release | None:
    """A release of the table; None if it has no such one. SAELens itself takes seconds to import and to read it all."""
    (package,) = find_spec("sae_lens").submodule_search_locations
    text = (Path(package) / "pretrained_saes.yaml").read_text(encoding="utf-8")
    block = re.search(rf"^{re.escape(name)}:.*\n(?:[ \t].*\n|\n)*", text + "\n", re.MULTILINE)
    if block is None:
        return None
    entry = yaml.load(block[0], getattr(yaml, "CSafeLoader", yaml.SafeLoader))[name]
    paths = {one["id"]: str(one["path"]) for one in entry["saes"]}
    return Release(entry["repo_id"], paths, {one["id"]: one.get("l0", 0.0) for one in entry["saes"]})


# ----------------------------------------------------------------------------------------- downloads


def announce(repo: str, *files: str, ignored: tuple[str, ...] = ()) -> None:
    """Print what loading a repository's files, given as patterns, will download, if anything. Raises UserError if the
    disk of the cache has no room for it. Says nothing where the hub does not answer: loading will say why."""
    from huggingface_hub import constants

    missing, cache = to_download(repo, files, ignored), Path(constants.HF_HUB_CACHE)
    disk = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if missing > free:
        raise UserError(f"{repo} needs {readable(missing)} of disk, {cache} has {readable(free)}: make room, or set "
                        "HF_HOME to a larger disk")  # fmt: skip
    if missing and is_first():
        print(f"download: {repo}, {readable(missing)} to {cache} ({readable(free)} free)", file=sys.stderr)


def to_download(repo: str, files: tuple[str, ...], ignored: tuple[str, ...]) -> int:
    """Bytes of a repository's files, given as patterns, that are not in the cache; 0 where the hub is off, does not let
    us in or does not answer within 10 s."""
    from huggingface_hub import HfApi, snapshot_download
    from tqdm import tqdm

    try:
        commit = HfApi().model_info(repo, timeout=10).sha  # snapshot_download would ask, and wait for minutes
        found = snapshot_download(repo, revision=commit, allow_patterns=[*files], ignore_patterns=[*ignored],
                                  tqdm_class=partial(tqdm, disable=True), dry_run=True)  # fmt: skip
    except Exception:  # anything from OSError to the HTTP client's own errors
        return 0
    return sum(file.file_size or 0 for file in found if file.will_download)


def readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size > 5e7 else f"{size / 1e6:.1f} MB"


def announce_sae(release: str, sae_id: str) -> None:
    """As announce, for an SAE of SAELens's table; one that is not in the table is left to SAELens."""
    entry = release_of(release)
    if entry and sae_id in entry.saes_map:
        path = entry.saes_map[sae_id]  # a file, or a folder
        announce(entry.repo_id, path, *(f"{path}/*{kind}" for kind in (".safetensors", ".npz", ".pt")))


def tensor_shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
    """Shapes of a safetensors file. SAELens asks the hub for them at every load; the cache has them offline too."""
    from huggingface_hub import hf_hub_download
    from safetensors import safe_open

    with safe_open(hf_hub_download(repo_id, filename), "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)


def sae_ids_near(spec: str) -> str:
    """What else the release of a RELEASE:ID holds, for an error message."""
    release = release_of(spec.split(":")[0])
    return f"; the release has: {', '.join(release.saes_map)[:300]} ..." if release else ""


def identity(source: str) -> str:
    """What a model or an SAE is: a hash of the files of a local folder, or the commit of a repository on the hub.

    source: a folder, a hub id, or RELEASE:ID of SAELens's table. Whatever is kept of a run carries it, since a path
    says nothing: a model trained again into the same folder is another model.
    """
    if Path(source).is_dir():
        whole = hashlib.sha256()
        for path in sorted(path for path in Path(source).iterdir() if path.is_file() and path.name[0] != "."):
            whole.update(path.name.encode() + content_hash(path))
        return f"sha256:{whole.hexdigest()[:32]}"
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    release, _, inside = source.partition(":")
    entry = release_of(release) if inside else None
    repo, inside = (entry.repo_id, entry.saes_map.get(inside, inside)) if entry else (release, inside)
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    main = cached / "refs/main"
    commits = [main.read_text()] if main.is_file() else sorted(path.name for path in cached.glob("snapshots/*"))
    return ":".join(filter(None, (f"{repo}@{'+'.join(commits) or 'unknown'}", inside)))


LARGE = 2**26  # bytes: no file of so many is written anew between two ticks of the clock of a file system
KNOWN_HASHES = {}  # {path, size and times of a large file: its hash}


def content_hash(path: Path) -> bytes:
    """SHA-256 of a file, read piece by piece; a large one is read again only after somebody has touched it."""
    stat = path.stat()
    key = (path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if key in KNOWN_HASHES:
        return KNOWN_HASHES[key]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").digest()
    if stat.st_size >= LARGE:
        KNOWN_HASHES[key] = found
    return found


def check_same(path: str, record: dict, what: str, source: str, layer: int | None = None) -> None:
    """Raises UserError unless `source` still is the record's `what`: "model", "sae" (of `layer`, where it has several)
    or "folder". Records without identities, which earlier versions wrote, are taken as they are."""
    then = record.get("identity", {}).get(what)
    if isinstance(then, list):
        then = then[record["layer"].index(layer)]
    if then is not None and then != identity(source):
        name = {"model": "model", "sae": "SAE", "folder": "trained model"}[what]
        raise UserError(f"{path} is of another {name} than {source} holds now: run its command again")


# ------------------------------------------------------------------------------------ what is loaded


def ready(name: str) -> str:
    """The folder or hub id that --model NAME stands for, its files whole, or what is to be downloaded told. Raises
    UserError for a name that is neither, as refuse_damaged does, and where the disk has no room."""
    path = model_source(name)
    if Path(path).is_dir():
        refuse_damaged(path)
    elif "/" in path:
        # Mistral's repositories hold the weights a second time, for Mistral's own code; others in folders
        announce(path, "*.safetensors", ignored=("consolidated*", "*/*"))
    else:
        raise UserError(f"no model {name!r}: give a preset ({', '.join(PRESETS)}), a hub id ORG/NAME or a folder")
    return path


def gated(path: str) -> str:
    """What to add to the message that a model cannot be loaded."""
    if Path(path).is_dir():
        return ""
    return (f". If it is gated, accept its licence at https://huggingface.co/{path} and run `hf auth login`; to work "
            "offline use --model tiny")  # fmt: skip


def load_tokenizer(path: str):
    """A model's own tokenizer, its model_max_length the number of the model's positions. Raises UserError where it is
    missing or has no token to pad with."""
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
        tokenizer.pad_token = None  # added after training: data.padded then takes EOS, which reaches no result either
    if all(i is None for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)):
        raise UserError(f"{path}: the tokenizer has no padding, EOS or BOS token; name one in tokenizer_config.json")
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or sys.maxsize
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


# ----------------------------------------------------------------------------------- what an SAE fits


def check_sae(sae, model, layer: int) -> None:
    """Refuse what cannot be ablated exactly, and settle the hook point (`sae.hook_point`)."""
    name, arch = sae.source, sae.cfg.architecture()
    refuse_not_finite(name, sae.state_dict().items())
    if arch not in ("standard", "jumprelu", "gated", "topk"):
        raise UserError(f"{name}: architecture {arch!r} cannot be ablated feature by feature here")
    if sae.cfg.d_in != model.cfg.d_model:
        have = model.cfg.d_model
        raise UserError(f"{name}: the SAE reads {sae.cfg.d_in} dimensions, the model's residual has {have}")
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


def fit_of(model, sae, windows: list[list[int]]) -> tuple[float, float, int]:
    """L0, variance explained, and how many ordinary tokens of all windows they were measured on.

    1 - sum |h - SAE(h)|^2 / sum |h - mean h|^2, both sums without the largest thousandth of tokens by norm: a handful
    of attention sinks, tens of times as long as other tokens, would decide it alone. Holds one batch at a time.
    """
    import torch

    from edits import layer_of, passed, residuals

    with torch.inference_mode():
        origin, total, n, active, few = None, 0.0, 0, 0, math.ceil(sum(map(len, windows)) / 1000)
        longest = None  # (few, d_model + 2), that thousandth: h less the origin, squared error, norm
        for h, _ in residuals(model, layer_of(sae), windows, 16, shared=False):
            h = h.float()
            origin = h.mean(0) if origin is None else origin  # sums of squares far from it would lose digits
            fires, back = passed(sae, h)
            active += fires.sum().item()
            error, norm = (h - back).pow(2).sum(-1, keepdim=True), h.norm(dim=-1, keepdim=True)
            rows = torch.cat([h - origin, error, norm], 1)
            sums = torch.cat([rows.sum(0), rows[:, :-2].pow(2).sum()[None]]).cpu().double()
            total, n = total + sums, n + len(h)
            longest = rows if longest is None else torch.cat([longest, rows])
            longest = longest[longest[:, -1].topk(min(few, len(longest))).indices]
        if not n:
            raise UserError("the retain texts hold no token that rates could be counted on")
        some = longest[longest[:, -1].topk(math.ceil(n / 1000)).indices].cpu().double()
        total -= torch.cat([some.sum(0), some[:, :-2].pow(2).sum()[None]])
        varies = total[-1] - total[:-3].pow(2).sum() / max(1, n - len(some))
        return active / n, (1 - total[-3] / varies).item(), n


def sanity_gate(model, sae, windows: list[list[int]], insist: bool = True, most: int = GATE_TOKENS) -> dict:
    """L0 and variance explained on ordinary tokens, beside what SAELens's table or the SAE itself promises; of more
    than `most` tokens every second window, or third, and so on is read.

    Raises UserError on a gross mismatch unless `insist` is False: an SAE read with the wrong architecture,
    scaling or layer gives numbers too, only not of this SAE. Raises it always where they are not finite.
    """
    l0, explained, n = fit_of(model, sae, windows[:: math.ceil(sum(map(len, windows)) / most) or 1])
    if not math.isfinite(explained):
        raise UserError(f"{sae.source}: the variance it explains is {explained}: the model's residual stream at "
                        f"{sae.hook_point} or what the SAE makes of it is not finite")  # fmt: skip
    found = {"l0": round(l0, 2), "variance_explained": round(explained, 4), "n_tokens": n}
    release, _, sae_id = sae.source.partition(":")
    entry = release_of(release)
    promised = (entry.expected_l0.get(sae_id) if entry else None) or sae.cfg.metadata.l0
    if promised:
        found["promised_l0"] = round(promised, 2)
    wrong = found["variance_explained"] < 0.5 or (promised and not promised / 4 < l0 < promised * 4)
    print(f"SAE check: L0 {l0:.1f}{f' (promised {promised:.1f})' if promised else ''}, variance explained "
          f"{explained:.3f} on {n} tokens, the thousandth of largest norm left out")  # fmt: skip
    if wrong and insist:
        raise UserError(f"{sae.source} does not fit this model (see the line above); --no-sanity goes on regardless")
    return found
