"""
Downloads from the model hub: how large they are and whether the disk has room, and what the cache knows without asking.
"""

import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors import safe_open

from data import UserError
from processes import is_first

WEIGHTS = (".safetensors", ".npz")


def announce(repo: str, folder: str = "") -> None:
    """Print what loading the weights in a repository's folder will download, if anything. Raises UserError if the disk
    of the cache has no room for it. Says nothing where the hub does not answer: loading will say why."""
    try:
        files = [file for file in HfApi().list_repo_tree(repo, folder or None) if Path(file.path).suffix in WEIGHTS]
    except Exception:  # anything from OSError to the hub's own errors
        return
    missing = sum(file.size for file in files if not isinstance(try_to_load_from_cache(repo, file.path), str))
    cache = Path(constants.HF_HUB_CACHE)
    disk = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if missing > free:
        raise UserError(
            f"{repo} needs {gb(missing)} of disk, {cache} has {gb(free)}: make room, or set HF_HOME to a larger disk"
        )
    if missing and is_first():
        print(f"download: {repo}, {gb(missing)} to {cache} ({gb(free)} free)", file=sys.stderr)


def gb(size: int) -> str:
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
