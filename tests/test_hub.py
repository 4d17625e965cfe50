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
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import data
import hub
from data import HERE, UserError
from hub import identity


def test_the_project_may_lie_in_a_folder_with_braces(monkeypatch):
    preset = replace(hub.PRESETS["tiny"], sae="/home/me/{my} {layer} pro{ject/tiny/sae/layer_{layer}")
    monkeypatch.setitem(hub.PRESETS, "tiny", preset)
    assert hub.sae_source(None, 7, "tiny") == "/home/me/{my} {layer} pro{ject/tiny/sae/layer_7"


def test_presets_name_their_saes_layers_widths_and_l0s():
    """As SAELens's table and tiny's folders have them."""
    table = get_pretrained_saes_directory()
    for name, preset in hub.PRESETS.items():
        if name.startswith("tiny"):
            continue
        release, template = preset.sae.split(":", 1)
        entry = table[release]
        has = [layer for layer in range(100) if template.format(layer=layer) in entry.saes_map]
        assert has == list(preset.layers) and (name in ("gemma-2-2b-it", "gpt2") or preset.model.endswith(entry.model))
        ids = [template.format(layer=layer) for layer in has]
        paths, l0s = [entry.saes_map[sae] for sae in ids], [entry.expected_l0[sae] for sae in ids]
        if name.startswith("gemma-2"):  # its table tells the L0 by the path
            l0s = [float(path.split("_l0_")[1]) for path in paths]
        if name == "qwen2.5-7b-instruct":  # which the table does not tell: k of the second of four, 32 to 256
            l0s = [64]
        least, most = min(l0s), max(l0s)
        assert preset.l0 == (f"{least:.0f}" if least == most else f"{least:.0f} to {most:.0f}")
        assert all(f"width_{preset.width}" in path for path in paths if "width_" in path)
    assert "-W32K-" in table[hub.PRESETS["qwen3-1.7b-base"].sae.split(":")[0]].repo_id
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
    assert {line[87:] for line in lines.splitlines()[1:]} == dtypes  # columns are aligned
    assert "16k   59 to 141 -100       bfloat16" in lines and "3 to 27 by 4   131k  64        not chosen" in lines
    assert max(map(len, lines.splitlines())) <= 95


def test_what_a_preset_decides(twin):
    tiny, gpt2, gemma, other = map(hub.preset, ("tiny", "gpt2", "gemma-2-2b-it", "some/model"))
    assert (tiny.retrained, gpt2.retrained, other.retrained) == ("tiny-retrained", None, None)
    assert (tiny.clamp, gpt2.clamp, gemma.clamp, other.clamp) == (-40, -10, -100, -100)
    assert (tiny.chosen, gpt2.chosen, gemma.chosen, other.chosen) == (True, False, True, False)
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


# ------------------------------------------------------------------------------ tokenizers, and what they encode


def tokenizer_of(name: str, place) -> None:
    """tiny's tokenizer and config, with this tokenizer_class in its tokenizer_config.json."""
    place.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(HERE / "tiny/model" / file, place)
    config = json.loads((place / "tokenizer_config.json").read_text())
    config.pop("backend", None)
    (place / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": name}))


OTHER_CLASSES = ["GemmaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizer",
                 "BertTokenizerFast", "RobertaTokenizer"]  # fmt: skip


@pytest.mark.parametrize("name", OTHER_CLASSES)
def test_a_tokenizer_encodes_as_its_file(tmp_path, capsys, name):
    """Whatever class tokenizer_config.json names: that of other models has other rules."""
    tokenizer_of(name, tmp_path / "model")
    text = "It's 1,234  caf\u00e9s\n\n\tAnswer: A"
    plain = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    tokenizer = hub.load_tokenizer(str(tmp_path / "model"))
    assert tokenizer(text)["input_ids"] == plain.encode(text).ids
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<bos>", "<pad>") and tokenizer.n_embeddings == 4096
    said, by_class = capsys.readouterr().err, AutoTokenizer.from_pretrained(tmp_path / "model")
    try:
        differs = by_class(hub.PROBE)["input_ids"] != plain.encode(hub.PROBE).ids
    except Exception:  # Gemma's unknown token is not one of tiny's
        differs = True
    assert ("encodes otherwise than tokenizer.json" in said) == differs
    assert differs or name in ("LlamaTokenizer", "GPT2TokenizerFast")


def test_a_class_that_cannot_read_the_tokenizers_file_is_refused_in_a_line(tmp_path):
    tokenizer_of("T5TokenizerFast", tmp_path / "model")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        hub.load_tokenizer(str(tmp_path / "model"))


def changed(file, **entries) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("add, puts, told", [
    (True, False, "add_bos_token is True in tokenizer_config.json, but tokenizer.json, which is used, puts no BOS"),
    (False, True, "add_bos_token is False in tokenizer_config.json, but tokenizer.json, which is used, puts <bos>"),
    (True, True, None), (False, False, None), (None, True, None), (None, False, None),
])  # fmt: skip
def test_a_bos_that_the_two_files_do_not_agree_on_is_said(tmp_path, capsys, name, add, puts, told):
    """transformers 5 leaves add_bos_token unread where there is a tokenizer.json."""
    tokenizer_of(name, tmp_path / "model")
    changed(tmp_path / "model/tokenizer_config.json", add_bos_token=add)
    if not puts:
        changed(tmp_path / "model/tokenizer.json", post_processor=None)
    tokenizer = hub.load_tokenizer(str(tmp_path / "model"))
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == puts
    said = capsys.readouterr().err
    assert told in said if told else "add_bos_token" not in said


def test_a_class_that_no_tokenizer_config_names_is_not_said_to_be_named_there(tmp_path, capsys):
    tokenizer_of("", tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no padding, EOS or BOS token"):
        hub.load_tokenizer(str(tmp_path / "model"))
    assert "transformers' GemmaTokenizer encodes otherwise than tokenizer.json" in capsys.readouterr().err


def test_a_tokenizer_on_the_hub_encodes_as_its_file(stand_in):
    tokenizer_of("GemmaTokenizerFast", stand_in.root / "models/some/model")
    plain = Tokenizer.from_file(str(HERE / "tiny/model/tokenizer.json"))
    assert hub.load_tokenizer("some/model")("It's 12  A")["input_ids"] == plain.encode("It's 12  A").ids


def test_a_token_beyond_the_embedding_is_refused_by_name(tmp_path):
    tokenizer_of("PreTrainedTokenizerFast", tmp_path / "model")
    tokenizer = hub.load_tokenizer(str(tmp_path / "model"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    question = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 0}
    assert data.encode_prompts(tokenizer, [data.prompt(question)])  # which the token is not in
    for encode in (lambda: data.encode_prompts(tokenizer, ["<|turn|>user Which?"]),
                   lambda: data.encode_words(tokenizer, [{**question, "question": "<|turn|>"}]),
                   lambda: data.token_windows(tokenizer, ["a text with <|turn|> in it"])):  # fmt: skip
        with pytest.raises(UserError, match=r"'<\|turn\|>' as token 4096, the model's embedding only 4096 rows"):
            encode()


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


@pytest.mark.parametrize("name", [
    "blocks.1.hook_out", "model.layers.1", "model.layers.1.output", "layers.1", "transformer.h.1", "gpt_neox.layers.1",
    "model.language_model.layers.1", "model.decoder.layers.1",
])  # fmt: skip
def test_other_names_of_the_residual_stream(name):
    assert hub.check_sae(*sae_and_model(hook_name=name), 1, "x") == HOOK
    with pytest.raises(UserError, match="trained at layer 1, not at layer 2"):
        hub.check_sae(*sae_and_model(hook_name=name), 2, "x")


@pytest.mark.parametrize("name", ["blocks.2.hook_in", "model.layers.2.input"])
def test_what_a_block_reads_is_what_the_one_before_writes(name):
    assert hub.check_sae(*sae_and_model(hook_name=name), 2, "x") == HOOK


@pytest.mark.parametrize("changes, said", [
    ({"hook_name": "model.layers.1.mlp"}, "hook point model.layers.1.mlp is not a residual stream"),
    ({"hook_name": "vision_tower.encoder.layers.1"}, "is not a residual stream"),
    ({"hook_name": "model.layers.1.self_attn.output"}, "is not a residual stream"),
    ({"hook_name": "model.layers.7"}, "is not a residual stream"),
    ({"hook_name": [HOOK, "blocks.2.hook_resid_post"]}, "does not say which hook point"),
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
