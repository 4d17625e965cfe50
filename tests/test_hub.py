"""What models and SAEs are, and whether an SAE fits."""

import json
import os
import shutil
import socket
import time
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from conftest import ordinary_mask, some_windows, write_sae
from huggingface_hub import hf_hub_download
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

import common
import edits
import hub
from data import UserError
from hub import identity


def perfect(sae):
    """Two features per dimension, its positive and its negative part: exact, and 32 are active on each token."""
    eye = torch.eye(32)
    sae.W_enc.copy_(torch.cat([eye, -eye], 1))
    sae.W_dec.copy_(torch.cat([eye, -eye]))
    sae.b_enc.zero_(), sae.b_dec.zero_(), sae.threshold.zero_()


def broken(sae):
    perfect(sae)
    sae.threshold.fill_(1e3)


def test_sanity_gate_passes_a_fitting_sae(model, tmp_path, capsys):
    sae = common.load_sae(str(write_sae(tmp_path, "x", spoil=perfect, l0=31.0)), 1, model)
    found = hub.sanity_gate(model, sae, some_windows(model))
    assert found["l0"] == pytest.approx(32, abs=0.1) and found["variance_explained"] > 0.999
    assert found["promised_l0"] == 31.0
    assert found["n_tokens"] == sum(int(ordinary_mask(model, torch.tensor(row)).sum()) for row in some_windows(model))
    assert "L0 32.0 (promised 31.0)" in capsys.readouterr().out


def test_of_many_windows_the_gate_reads_some(gemma, tmp_path):
    sae, windows = common.load_sae(str(write_sae(tmp_path, "x", spoil=perfect)), 1, gemma), some_windows(gemma) * 4
    tokens = sum(map(len, windows))
    whole, half = (hub.sanity_gate(gemma, sae, windows, most=most)["n_tokens"] for most in (tokens, tokens // 2))
    assert 0 < half < 0.7 * whole


@pytest.mark.parametrize("spoil,promised", [(broken, None), (perfect, 200.0), (perfect, 5.0)])
def test_sanity_gate_stops_a_broken_sae(gemma, tmp_path, spoil, promised):
    sae = common.load_sae(str(write_sae(tmp_path, "gemma2", spoil=spoil, l0=promised)), 1, gemma)
    with pytest.raises(UserError, match="does not fit"):
        hub.sanity_gate(gemma, sae, some_windows(gemma))
    assert hub.sanity_gate(gemma, sae, some_windows(gemma), insist=False)["n_tokens"] > 50


def lopsided(sae):
    """As `perfect`, but nothing of the first dimension is written back."""
    perfect(sae)
    sae.W_dec[:, 0] = 0


def too_large(sae):
    lopsided(sae)
    sae.W_dec.mul_(2.5)


def gate_on(monkeypatch, sae, h):
    """The gate on a residual stream h (n, 32) that comes in windows of 100, longest, if any, first."""
    chunks = [(part, None) for part in h.split(100)]
    monkeypatch.setattr(edits, "residuals", lambda *args, **kwargs: chunks)
    return hub.sanity_gate(None, sae, [[0] * len(part) for part, _ in chunks])


def test_a_few_sink_tokens_do_not_decide_the_variance_explained(gemma, make_sae, monkeypatch, capsys):
    h = torch.randn(6096, 32, generator=torch.Generator().manual_seed(0)) + 3
    fits = make_sae(gemma, spoil=lopsided)
    plain = gate_on(monkeypatch, fits, h)
    by_hand = 1 - h[:, 0].square().sum() / (h - h.mean(0)).square().sum()
    assert plain["variance_explained"] == pytest.approx(by_hand.item(), abs=3e-3) and plain["n_tokens"] == 6096
    sinks = h.clone()
    sinks[[7, 2222, 6000]] = torch.eye(32)[0] * 50 * h.norm(dim=1).mean()
    found = gate_on(monkeypatch, fits, sinks)
    assert found["variance_explained"] == pytest.approx(plain["variance_explained"], abs=3e-3)
    assert "the thousandth of largest norm left out" in capsys.readouterr().out
    for spoil in (broken, too_large):
        with pytest.raises(UserError, match="does not fit"):
            gate_on(monkeypatch, make_sae(gemma, spoil=spoil), sinks)


def test_the_gate_looks_at_all_windows(gemma, make_sae, monkeypatch):
    h = torch.randn(6096, 32, generator=torch.Generator().manual_seed(0))
    h[4096:, 0] *= 20  # the shorter windows, which come last
    with pytest.raises(UserError, match="does not fit"):
        gate_on(monkeypatch, make_sae(gemma, spoil=lopsided), h)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_residual_stream_that_is_not_finite_passes_no_gate(gemma, make_sae, monkeypatch, value):
    h = torch.randn(300, 32)
    h[120, 5] = value
    chunks = [(part, None) for part in h.split(100)]
    monkeypatch.setattr(edits, "residuals", lambda *args, **kwargs: chunks)
    with pytest.raises(UserError, match="not finite"):
        hub.sanity_gate(None, make_sae(gemma, spoil=lopsided), [[0] * 100] * 3, insist=False)


def test_sanity_gate_stops_a_sae_read_with_the_wrong_architecture(gemma, tmp_path):
    # a JumpReLU SAE whose cfg.json calls it standard loses its thresholds: far too many features fire
    write_sae(tmp_path, "gemma2", spoil=lambda sae: sae.threshold.fill_(2.5), l0=1.0)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "architecture": "standard"}))
    try:
        sae = common.load_sae(str(tmp_path), 1, gemma)
    except UserError:  # SAELens may already refuse the unknown weight
        return
    with pytest.raises(UserError, match="does not fit"):
        hub.sanity_gate(gemma, sae, some_windows(gemma))


def test_a_full_disk_is_noticed_before_the_download(monkeypatch):
    monkeypatch.setattr(hub, "to_download", lambda *asked: 5 * 10**9)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    with pytest.raises(UserError, match=r"some/model needs 5\.0 GB of disk.* has 3\.0 GB.*HF_HOME"):
        hub.announce("some/model", "*.safetensors")


def weigh(folder, **sizes):
    for name, size in sizes.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".safetensors").write_bytes(bytes(size))


def test_what_a_download_takes_is_asked_of_the_hub(stand_in, capfd):
    """Of a model what is loaded of it, not what lies beside; of an SAE its folder; and nothing once it is there."""
    folder = stand_in.root / "models/some"
    weigh(folder / "model", model_1=20_000, model_2=30_000, consolidated=50_000, onnx__model=70_000)
    assert hub.ready("some/model") == "some/model"
    entry = hub.release_of("gemma-scope-2-1b-it-res-all")
    sae_id, inside = next((name, path) for name, path in entry.saes_map.items() if "layer_1_" in name)
    weigh(stand_in.root / "models" / entry.repo_id / inside, params=90_000)
    weigh(stand_in.root / "models" / entry.repo_id / inside.replace("layer_1_", "layer_2_"), params=10_000)
    hub.announce_sae("gemma-scope-2-1b-it-res-all", sae_id)
    said = [line.split(" to ")[0] for line in capfd.readouterr().err.splitlines()]
    assert said == ["download: some/model, 0.1 MB", f"download: {entry.repo_id}, 0.1 MB"]
    assert hub.to_download("some/model", ("*.safetensors",), ("consolidated*", "*/*")) == 50_000
    hf_hub_download("some/model", "model_1.safetensors")
    assert hub.to_download("some/model", ("*.safetensors",), ("consolidated*", "*/*")) == 30_000
    hf_hub_download("some/model", "model_2.safetensors")
    capfd.readouterr()
    hub.ready("some/model")
    assert not capfd.readouterr().err


@pytest.mark.parametrize("what", ["off", "gated", "unreachable"])
def test_where_the_hub_gives_no_sizes_nothing_is_said(stand_in, monkeypatch, capfd, what):
    weigh(stand_in.root / "models/some/model", model=20_000)
    stand_in.gated.update(["some/model"] if what == "gated" else [])
    if what == "off":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if what == "unreachable":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.time()
    hub.ready("some/model")
    assert not capfd.readouterr().err and time.time() - started < 5
    assert stand_in.asked == [] or what == "gated"


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_not_waited_for(stand_in, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.time()
        assert hub.to_download("some/model", ("*.safetensors",), ()) == 0 and time.time() - started < 20


def test_presets_have_an_sae_for_every_layer():
    table = get_pretrained_saes_directory()
    layers = {"gemma-2-2b-it": 26, "gemma-3-1b-it": 26, "gemma-3-4b-it": 34, "gpt2": 12}
    assert set(layers) | {"tiny", "never-knew"} == set(hub.PRESETS)
    for name, n in layers.items():
        release, sae_id = hub.PRESETS[name].sae.split(":", 1)
        assert all(sae_id.format(layer=layer) in table[release].saes_map for layer in range(n))


def test_the_table_of_saes_is_saelenss():
    """Read release by release, without the seconds that SAELens takes to import and read it."""
    table = get_pretrained_saes_directory()
    assert len(table) > 100 and hub.release_of("no-such-release") is None
    for name, entry in table.items():
        ours = hub.release_of(name)
        assert (ours.repo_id, ours.saes_map, ours.expected_l0) == (entry.repo_id, entry.saes_map, entry.expected_l0)


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


def test_large_weights_are_read_once_and_never_whole(tmp_path, monkeypatch):
    """A sweep asks what its model is for its pieces and for its record."""
    file, reads = tmp_path / "model.safetensors", []
    with file.open("wb") as content:
        content.truncate(hub.LARGE)
    os.utime(file, (1, 1))
    digest = hub.hashlib.file_digest
    monkeypatch.setattr(hub.hashlib, "file_digest", lambda *args: reads.append(1) or digest(*args))
    tracemalloc.start()
    first = identity(str(tmp_path))
    assert tracemalloc.get_traced_memory()[1] < hub.LARGE / 20
    tracemalloc.stop()
    assert identity(str(tmp_path)) == first and len(reads) == 1
    with file.open("r+b") as content:
        content.write(b"x")
    os.utime(file, (1, 1))
    assert identity(str(tmp_path)) != first


def test_a_repositorys_identity_is_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--google--gemma-scope-2b-pt-res/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc")
    sae = "gemma-scope-2b-pt-res-canonical:layer_{}/width_16k/canonical"
    assert identity(sae.format(7)).startswith("google/gemma-scope-2b-pt-res@abc:layer_7/")
    assert identity(sae.format(7)) != identity(sae.format(8))
    (refs / "main").write_text("def")
    assert identity("google/gemma-scope-2b-pt-res") == "google/gemma-scope-2b-pt-res@def"
