"""Presets, what models and SAEs are, and which SAEs are refused."""

import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import HOOK
from huggingface_hub import hf_hub_download
from sae_lens.loading.pretrained_sae_loaders import get_safetensors_tensor_shapes
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save_file

import hub
from data import HERE, UserError
from hub import identity


def test_the_project_may_lie_in_a_folder_with_braces(monkeypatch):
    preset = replace(hub.PRESETS["tiny"], sae="/home/me/{my} pro{ject/tiny/sae/layer_{layer}")
    monkeypatch.setitem(hub.PRESETS, "tiny", preset)
    assert hub.sae_source(None, 7, "tiny") == "/home/me/{my} pro{ject/tiny/sae/layer_7"


def test_presets_name_their_saes_layers_widths_and_l0s():
    """As SAELens's table and tiny's folders have them."""
    table = get_pretrained_saes_directory()
    for name in ("gemma-2-2b-it", "gemma-3-1b-it", "gemma-3-4b-it", "gpt2"):
        preset = hub.PRESETS[name]
        release, template = preset.sae.split(":", 1)
        ids = [template.format(layer=layer) for layer in preset.layers]
        assert (
            set(ids) <= set(table[release].saes_map) and template.format(layer=len(ids)) not in table[release].saes_map
        )
        paths, l0s = [table[release].saes_map[sae] for sae in ids], [table[release].expected_l0[sae] for sae in ids]
        if name.startswith("gemma-2"):  # its table tells the L0 by the path
            l0s = [float(path.split("_l0_")[1]) for path in paths]
        assert preset.l0 == f"{min(l0s):.0f} to {max(l0s):.0f}"
        assert name == "gpt2" or all(f"width_{preset.width}" in path for path in paths)
    tiny = hub.PRESETS["tiny"]
    assert {f"layer_{layer}" for layer in tiny.layers} == {path.name for path in (HERE / "tiny/sae").glob("layer_*")}
    for layer in tiny.layers:
        config = json.loads((HERE / f"tiny/sae/layer_{layer}/cfg.json").read_text())
        assert str(config["d_sae"]) == tiny.width and round(config["metadata"]["l0"]) == int(tiny.l0)


def test_the_table_of_presets_needs_no_library():
    code = (
        "import sys, hub; print(hub.listed()); assert not {'torch', 'sae_lens', 'huggingface_hub'} & set(sys.modules)"
    )
    started = time.perf_counter()
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE).stdout
    assert time.perf_counter() - started < 2  # 0.2 s where nothing else runs
    assert [line.split()[0] for line in lines.splitlines()] == ["preset", *hub.PRESETS]
    dtypes = {preset.dtype for preset in hub.PRESETS.values()}
    assert {line[83:] for line in lines.splitlines()[1:]} == dtypes  # columns are aligned
    assert "16k     59 to 141  -100   bfloat16" in lines


def test_what_a_preset_decides(twin):
    tiny, gpt2, gemma, other = map(hub.preset, ("tiny", "gpt2", "gemma-2-2b-it", "some/model"))
    assert (tiny.retrained, gpt2.retrained, other.retrained) == ("tiny-retrained", None, None)
    assert (tiny.clamp, gpt2.clamp, gemma.clamp, other.clamp) == (-40, -10, -100, -100)
    assert (tiny.dtype, gpt2.dtype, gemma.dtype, other.dtype) == ("float32", "float32", "bfloat16", "float32")
    assert hub.sae_source(None, 7, "tiny").endswith("tiny/sae/layer_7") and hub.sae_source("x:y", 7, "gpt2") == "x:y"
    for model in ("some/model", "tiny-retrained"):
        with pytest.raises(UserError, match=f"no SAE is known for {model}"):
            hub.sae_source(None, 7, model)
    assert hub.resolve_model("gpt2") == "openai-community/gpt2"
    with pytest.raises(UserError, match="no model 'tyni': give a preset"):
        hub.resolve_model("tyni")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_config.json"])
def test_identity_is_content_whatever_the_path_and_the_time_say(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(b"1234")
    os.utime(tmp_path / "a" / name, (1, 1))
    first = identity(str(tmp_path / "a"))
    assert identity(shutil.copytree(tmp_path / "a", tmp_path / "b")) == first
    (tmp_path / "a" / name).write_bytes(b"1235")  # of the same length
    os.utime(tmp_path / "a" / name, (1, 1))
    assert identity(str(tmp_path / "a")) != first


def test_large_weights_are_never_read_whole(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as content:
        content.truncate(2**26)
    os.utime(file, (1, 1))
    tracemalloc.start()
    first = identity(str(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 2**26 / 20
    tracemalloc.stop()
    with file.open("r+b") as content:
        content.write(b"x")
    os.utime(file, (1, 1))
    assert identity(str(tmp_path)) != first


def test_a_repositorys_identity_is_its_commit(stand_in):
    weights = stand_in.root / "models/google/gemma-scope-2b-pt-res/layer_7/width_16k/average_l0_69/params.npz"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"1234")
    sae = "gemma-scope-2b-pt-res-canonical:layer_{}/width_16k/canonical"
    assert identity("google/gemma-scope-2b-pt-res") == "google/gemma-scope-2b-pt-res@unknown"  # nothing is there yet
    hf_hub_download("google/gemma-scope-2b-pt-res", "layer_7/width_16k/average_l0_69/params.npz")
    commit, asked = stand_in.commit("google/gemma-scope-2b-pt-res"), len(stand_in.asked)
    assert identity("google/gemma-scope-2b-pt-res") == f"google/gemma-scope-2b-pt-res@{commit}"
    assert identity(sae.format(7)) == f"google/gemma-scope-2b-pt-res@{commit}:layer_7/width_16k/average_l0_69"
    assert identity(sae.format(7)) != identity(sae.format(8))
    assert identity("google/gemma-scope-2b-pt-res:a/b").endswith(f"@{commit}:a/b")
    assert len(stand_in.asked) == asked


def test_shapes_are_read_from_the_cache(stand_in, monkeypatch):
    folder = stand_in.root / "models/some/sae"
    folder.mkdir(parents=True)
    save_file({"w_enc": torch.zeros(3, 5), "b": torch.zeros(5)}, folder / "params.safetensors")
    wanted = {"w_enc": [3, 5], "b": [5]}
    assert get_safetensors_tensor_shapes("some/sae", "params.safetensors") == wanted
    assert hub.tensor_shapes("some/sae", "params.safetensors") == wanted
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.tensor_shapes("some/sae", "params.safetensors") == wanted


# ----------------------------------------------------------------------------------------- which SAEs fit


def sae_and_model(**changes):
    """What check_sae looks at of an SAE and a model with 4 layers of 8 dimensions."""
    given = {"architecture": "jumprelu", "d_in": 8, "normalize_activations": "none", "hook_name": HOOK, "weight": 0.0,
             "model_name": "org/some", **changes}  # fmt: skip
    metadata = SimpleNamespace(hook_name=given["hook_name"], model_name=given["model_name"])
    cfg = SimpleNamespace(architecture=lambda: given["architecture"], d_in=given["d_in"], metadata=metadata,
                          normalize_activations=given["normalize_activations"])  # fmt: skip
    hooks = {f"blocks.{block}.hook_resid_{kind}" for block in range(4) for kind in ("pre", "post")}
    model = SimpleNamespace(cfg=SimpleNamespace(d_model=8, model_name="some"), hook_dict=hooks)
    return SimpleNamespace(cfg=cfg, state_dict=lambda: {"W": torch.full((2,), given["weight"])}), model


def test_the_hook_point_of_an_sae(capsys):
    assert hub.check_sae(*sae_and_model(), 1, "x") == HOOK
    assert not capsys.readouterr().err
    assert hub.check_sae(*sae_and_model(hook_name="blocks.2.hook_resid_pre"), 2, "x") == HOOK  # the same tensor
    hub.check_sae(*sae_and_model(model_name="org/other"), 1, "x")
    assert capsys.readouterr().err == "note: x was trained on org/other, the model is some\n"


@pytest.mark.parametrize("changes, said", [
    ({"architecture": "matryoshka"}, "architecture 'matryoshka' cannot be ablated"),
    ({"d_in": 9}, "reads 9 dimensions, the model's residual stream has 8"),
    ({"normalize_activations": "expected_average_only_in"}, "was not folded"),
    ({"hook_name": None}, "does not say which hook point"),
    ({"hook_name": "blocks.1.hook_mlp_out"}, "hook point blocks.1.hook_mlp_out is not a residual stream"),
    ({"hook_name": "blocks.7.hook_resid_post"}, "is not a residual stream"),
    ({"hook_name": "blocks.0.hook_resid_pre"}, "is not a residual stream"),  # no layer before it
    ({"hook_name": "blocks.2.hook_resid_post"}, "x was trained at layer 2, not at layer 1"),
    ({"weight": torch.nan}, "x: W holds values that are not finite"),
])  # fmt: skip
def test_saes_that_cannot_be_ablated_exactly_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        hub.check_sae(*sae_and_model(**changes), 1, "x")
