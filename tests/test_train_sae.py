"""What SAEs are trained on, and that none is lost."""

import json

import pytest
import torch
from sae_lens import SAE
from safetensors import SafetensorError

import train_sae
from data import UserError, token_windows
from train_sae import drawn_windows

SENTENCES = ["The cat sat on the mat and looked at the moon over the sea.", "Blood carries oxygen to every organ."]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"text": SENTENCES[i % 2] * (1 + i % 3)} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def small(model_folder, text, tmp_path, monkeypatch):
    """Flags of a run that takes seconds."""
    monkeypatch.setattr(train_sae, "BUFFER", 2048)
    return dict(model=str(model_folder("gemma2")), text=str(text), layers=[1, 2], width=64, k=8, tokens=2048,
                context=16, device="cpu", out=str(tmp_path / "saes"))  # fmt: skip


def test_all_saes_are_saved_before_one_is_measured(small, tmp_path, monkeypatch):
    def fails(*args, **options):
        raise torch.OutOfMemoryError("while measuring")

    with monkeypatch.context() as broken:
        broken.setattr(train_sae, "check_sae_quality", fails)
        with pytest.raises(torch.OutOfMemoryError):
            train_sae.run(**small)
    for layer in (1, 2):
        sae = SAE.load_from_disk(tmp_path / f"saes/layer_{layer}")
        assert sae.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post" and sae.W_dec.isfinite().all()


def test_a_frozen_decoder_is_saved_as_it_was_drawn(small, tmp_path, monkeypatch):
    """Random unit rows, to which SAELens's scaling of activations and of norms leads back; all else is trained. Trained
    otherwise, the decoder turns away from them."""
    drawn, real = [], train_sae.new_sae

    def keeping(config, float64):
        sae = real(config, float64)
        drawn.append({name: value.detach().clone() for name, value in sae.named_parameters()})
        return sae

    monkeypatch.setattr(train_sae, "new_sae", keeping)
    for out, frozen in (("frozen", True), ("trained", False)):
        changes = {"layers": [1], "out": str(tmp_path / out), "tokens": 2**15, "lr": 0.01}
        train_sae.run(**small | changes, frozen_decoder=frozen)
        before, sae = drawn.pop(), SAE.load_from_disk(tmp_path / out / "layer_1")
        rows = before["W_dec"] / before["W_dec"].norm(dim=1, keepdim=True)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
        cosines = (rows * sae.W_dec).sum(1)
        assert bool((cosines > 1 - 1e-6).all()) == frozen and (frozen or cosines.min() < 0.999)
        assert torch.equal(before["W_enc"].T, before["W_dec"])
        encoder = sae.W_enc / sae.W_enc.norm(dim=0)
        assert (encoder.T * rows).sum(1).min() < 0.999 and sae.b_dec.abs().max() > 0
        assert sae.cfg.architecture() == "jumprelu" and sae.cfg.metadata.frozen_decoder == frozen
        if frozen:
            torch.testing.assert_close(before["W_dec"].norm(dim=1), torch.ones(64))
            torch.testing.assert_close(sae.W_dec, before["W_dec"], atol=1e-6, rtol=0)


def test_a_text_is_tokenised_no_further_than_is_needed(small, monkeypatch):
    """Of the same text twenty times over: as many documents, and what is measured on comes in full."""
    seen, windows = [], {}
    real = train_sae.token_windows

    def counting(tokenizer, texts, *args, **kwargs):
        found = real(tokenizer, texts, *args, **kwargs)
        seen.append(sum(len(row) - 1 for row in found[0]))
        return found

    monkeypatch.setattr(train_sae, "MEASURED", 10)
    monkeypatch.setattr(train_sae, "token_windows", counting)
    monkeypatch.setattr(
        train_sae, "check_sae_quality", lambda model, sae, held_out, **_: windows.update(n=len(held_out))
    )
    texts = train_sae.read_texts(small["text"]) * 20
    monkeypatch.setattr(train_sae, "read_texts", lambda source: texts)
    train_sae.run(**small)
    assert 6000 < seen[0] <= 2048 + 2 * 2048 and seen[1] <= 10 * 17
    assert windows["n"] == 10


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_a_text_in_another_encoding_is_refused(small, tmp_path, name):
    (tmp_path / name).write_bytes('{"text": "Le caf\xe9 est l\xe0."}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name} cannot be read as UTF-8 text: 'utf-8' codec can't decode byte 0xe9"):
        train_sae.run(**small | {"text": str(tmp_path / name)})


@pytest.mark.parametrize("changes, said", [
    ({"seed": 2**64}, r"--seed: 18446744073709551616 is not an integer from 0 to 2\*\*63 - 1"),
    ({"lr": -1}, "--lr: -1 is not above 0"),
    ({"out": "/proc/saes"}, "cannot write to /proc/saes: .*; give another --out"),
])  # fmt: skip
def test_what_would_end_a_run_late_is_refused_at_once(small, changes, said, monkeypatch):
    monkeypatch.delattr(train_sae, "train")
    with pytest.raises(UserError, match=said):
        train_sae.run(**small | changes)


def test_an_sae_that_is_there_is_not_overwritten(small, tmp_path, monkeypatch):
    monkeypatch.delattr(train_sae, "train")
    (tmp_path / "saes/layer_2").mkdir(parents=True)
    with pytest.raises(UserError, match="layer_2 is a folder there; give another --out"):
        train_sae.run(**small)


def test_a_full_disk_after_training_is_one_line_and_leaves_no_half_of_an_sae(small, tmp_path, monkeypatch):
    def full(sae, path):
        path.mkdir()
        (path / "sae_weights.safetensors").write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(train_sae.BatchTopKTrainingSAE, "save_inference_model", full)
    with pytest.raises(UserError, match=r"cannot write .*layer_1: Error while serializing: .*No space left on device"):
        train_sae.run(**small)
    assert not list((tmp_path / "saes").iterdir())


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_windows_are_a_sample_of_documents_in_order(tokenizer, seed):
    texts = [f"{i} {SENTENCES[i % 2] * (1 + i % 3)}" for i in range(60)]  # a window each
    every, _ = token_windows(tokenizer, texts, 128, bos=True)
    assert drawn_windows(tokenizer, texts, 128, 10**6, seed) == every
    some = drawn_windows(tokenizer, texts, 128, 300, seed)
    assert sum(len(row) - 1 for row in some) == 300
    places = [every.index(row) for row in some if row in every]  # the last document that was drawn may be cut
    assert len(places) >= len(some) - 1 and places == sorted(places) and places[-1] - places[0] > 30


@pytest.mark.parametrize("name", ["text.json", "text.csv", "text.parquet", "text.jsonl.gz"])
def test_a_file_of_another_format_is_not_read_as_prose(tmp_path, name):
    (tmp_path / "text.txt").write_text("One document.\n\nAnother one.\n")
    assert train_sae.read_texts(str(tmp_path / "text.txt")) == ["One document.", "Another one.\n"]
    (tmp_path / name).write_text('[{"text": "One document."},\n\n{"text": "Another one."}]')
    with pytest.raises(UserError, match=f"{name}: neither a file of text or JSONL nor a hub id"):
        train_sae.read_texts(str(tmp_path / name))
