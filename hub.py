"""
Downloads from the model hub: how large they are and whether the disk has room, and what the cache knows without asking;
and what a model or an SAE is, for all that is kept of it.
"""

import hashlib
import shutil
import sys
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import build_hf_headers
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors import safe_open

from data import UserError
from processes import is_first

WEIGHTS = (".safetensors", ".npz")


def announce(repo: str, folder: str = "") -> None:
    """Print what loading the weights in a repository's folder will download, if anything. Raises UserError if the disk
    of the cache has no room for it. Says nothing where the hub does not answer: loading will say why."""
    missing = sum(
        size for path, size in weights_in(repo, folder) if not isinstance(try_to_load_from_cache(repo, path), str)
    )
    cache = Path(constants.HF_HUB_CACHE)
    disk = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if missing > free:
        raise UserError(
            f"{repo} needs {readable(missing)} of disk, {cache} has {readable(free)}: make room, or set HF_HOME to "
            "a larger disk"
        )
    if missing and is_first():
        print(f"download: {repo}, {readable(missing)} to {cache} ({readable(free)} free)", file=sys.stderr)


def weights_in(repo: str, folder: str) -> list[tuple[str, int]]:
    """Path and size of each weight file; [] where the hub is off or does not answer at once (its client would wait)."""
    if constants.HF_HUB_OFFLINE:
        return []
    try:
        address = f"{constants.ENDPOINT}/api/models/{repo}/tree/main/{folder}".rstrip("/")
        answer = get_session().get(address, headers=build_hf_headers(), timeout=10)
        answer.raise_for_status()
        files = [(Path(file["path"]), file["size"]) for file in answer.json()]
        # Mistral's repositories hold the weights a second time, for Mistral's own code
        return [(str(path), size) for path, size in files
                if path.suffix in WEIGHTS and not path.name.startswith("consolidated")]  # fmt: skip
    except Exception:  # anything from OSError to the HTTP client's own errors
        return []


def readable(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size > 5e7 else f"{size / 1e6:.1f} MB"


def announce_sae(release: str, sae_id: str) -> None:
    """As announce, for an SAE of SAELens's table; one that is not in the table is left to SAELens."""
    entry = get_pretrained_saes_directory().get(release)
    if entry and sae_id in entry.saes_map:
        path = entry.saes_map[sae_id]
        announce(entry.repo_id, str(Path(path).parent) if Path(path).suffix in WEIGHTS else path)


def tensor_shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
    """Shapes of a safetensors file. SAELens asks the hub for them at every load; the cache has them offline too."""
    with safe_open(hf_hub_download(repo_id, filename), "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)


def sae_ids_near(spec: str) -> str:
    """What else the release of a RELEASE:ID holds, for an error message."""
    release = get_pretrained_saes_directory().get(spec.split(":")[0])
    return f"; the release has: {', '.join(release.saes_map)[:300]} ..." if release else ""


def identity(source: str) -> str:
    """What a model or an SAE is: a hash of the files of a local folder, or the commit of a repository on the hub.

    source: a folder, a hub id, or RELEASE:ID of SAELens's table. Whatever is kept of a run carries it, since a path
    says nothing: a model trained again into the same folder is another model.
    """
    if Path(source).is_dir():
        whole = hashlib.sha256()
        for path in sorted(path for path in Path(source).iterdir() if path.is_file() and path.name[0] != "."):
            with path.open("rb") as file:
                whole.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return f"sha256:{whole.hexdigest()[:32]}"
    release, _, inside = source.partition(":")
    entry = get_pretrained_saes_directory().get(release) if inside else None
    repo, inside = (entry.repo_id, entry.saes_map.get(inside, inside)) if entry else (release, inside)
    cached = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    main = cached / "refs/main"
    commits = [main.read_text()] if main.is_file() else sorted(path.name for path in cached.glob("snapshots/*"))
    return ":".join(filter(None, (f"{repo}@{'+'.join(commits) or 'unknown'}", inside)))


def check_same(path: str, record: dict, what: str, source: str, layer: int | None = None) -> None:
    """Raises UserError unless `source` still is the record's `what`: "model", "sae" (of `layer`, where it has several)
    or "folder". Records without identities, which earlier versions wrote, are taken as they are."""
    then = record.get("identity", {}).get(what)
    if isinstance(then, list):
        then = then[record["layer"].index(layer)]
    if then is not None and then != identity(source):
        name = {"model": "model", "sae": "SAE", "folder": "trained model"}[what]
        raise UserError(f"{path} is of another {name} than {source} holds now: run its command again")
