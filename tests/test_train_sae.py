"""What SAEs are trained on, and that none is lost."""

import json

import pytest
import torch
from sae_lens import SAE

import train_sae
from data import token_windows
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


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_windows_are_a_sample_of_documents_in_order(tokenizer, seed):
    texts = [f"{i} {SENTENCES[i % 2] * (1 + i % 3)}" for i in range(60)]  # a window each
    every, _ = token_windows(tokenizer, texts, 128, bos=True)
    assert drawn_windows(tokenizer, texts, 128, 10**6, seed) == every
    some = drawn_windows(tokenizer, texts, 128, 300, seed)
    assert sum(len(row) - 1 for row in some) == 300
    places = [every.index(row) for row in some if row in every]  # the last document that was drawn may be cut
    assert len(places) >= len(some) - 1 and places == sorted(places) and places[-1] - places[0] > 30
