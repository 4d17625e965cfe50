"""
Models that come with SAEs: what `--model NAME` and `--layer L` stand for, and what there is to choose from.
"""

import json
import re
from dataclasses import dataclass

from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from data import HERE, UserError


@dataclass(frozen=True)
class Preset:
    """A model, the SAE for `--layer L` (a folder, or RELEASE:ID of SAELens's table), and the default clamp."""

    model: str
    sae: str
    clamp: float


# Clamps: tiny's was chosen on the picking half (README); -100 and the gemma-2 SAEs are SAEBench's and
# Farrell et al.'s middle setting (arXiv 2410.19278). Gemma-3 residuals are far larger, so -100 may do nothing.
PRESETS = {
    "tiny": Preset(str(HERE / "tiny/model"), str(HERE / "tiny/sae/layer_{layer}"), -80.0),
    "gemma-2-2b-it": Preset(
        "google/gemma-2-2b-it", "gemma-scope-2b-pt-res-canonical:layer_{layer}/width_16k/canonical", -100.0
    ),
    "gemma-3-1b-it": Preset(
        "google/gemma-3-1b-it", "gemma-scope-2-1b-it-res-all:layer_{layer}_width_16k_l0_small", -100.0
    ),
    "gemma-3-4b-it": Preset(
        "google/gemma-3-4b-it", "gemma-scope-2-4b-it-res-all:layer_{layer}_width_16k_l0_small", -100.0
    ),
    "gpt2": Preset("openai-community/gpt2", "gpt2-small-res-jb:blocks.{layer}.hook_resid_pre", -10.0),
}


def model_source(name: str) -> str:
    """The hub id or folder that --model NAME stands for."""
    return PRESETS[name].model if name in PRESETS else name


def sae_source(spec: str | None, layer: int, model: str) -> str:
    """The RELEASE:ID or folder that --sae SPEC (None: the preset's of the layer) stands for. Raises UserError for a
    model that has no preset."""
    if spec is None and model not in PRESETS:
        raise UserError(f"no SAE is known for {model}: give --sae RELEASE:ID or --sae FOLDER")
    return spec or PRESETS[model].sae.format(layer=layer)


def layers_of(preset: Preset) -> dict[int, tuple[str, float | None]]:
    """{layer: (width, L0 where it is known)} of the preset's SAEs: its folders, or the ids in SAELens's table."""
    if ":" not in preset.sae:
        folders = {int(path.name.split("_")[1]): path for path in HERE.glob("tiny/sae/layer_*")}
        configs = {layer: json.loads((path / "cfg.json").read_text()) for layer, path in sorted(folders.items())}
        return {layer: (str(config["d_sae"]), config["metadata"].get("l0")) for layer, config in configs.items()}
    release, template = preset.sae.split(":", 1)
    entry, found = get_pretrained_saes_directory()[release], {}
    pattern = re.escape(template).replace(re.escape("{layer}"), r"(\d+)")
    for sae_id, path in entry.saes_map.items():
        if match := re.fullmatch(pattern, sae_id):
            width = re.search(r"width_(\w+?)(?:[_/]|$)", path)
            l0 = entry.expected_l0.get(sae_id) or next(iter(re.findall(r"l0_(\d+)", path)), None)
            found[int(match[1])] = (width[1] if width else "", l0 and float(l0))
    return dict(sorted(found.items()))


def listed() -> str:
    """A line for each preset: model, layers, width, L0s from lowest to highest, default clamp."""
    lines = [f"{'preset':16}{'model':25}{'layers':12}{'width':8}{'L0':10}clamp"]
    for name, preset in PRESETS.items():
        layers = layers_of(preset)
        every = list(layers) == list(range(min(layers), max(layers) + 1))
        span = f"{min(layers)} to {max(layers)}" if every else ", ".join(map(str, layers))
        l0s = sorted(l0 for _, l0 in layers.values() if l0)
        model = "tiny/model" if name == "tiny" else preset.model
        l0 = f"{l0s[0]:.0f} to {l0s[-1]:.0f}" if l0s else ""
        width = next(iter(layers.values()))[0]
        lines.append(f"{name:16}{model:25}{span:12}{width:8}{l0:10}{preset.clamp:g}")
    return "\n".join(lines)
