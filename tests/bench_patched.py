"""
What a patched pass costs: time with 50 features ablated over time without, in one run, passes taken in turn.

    python tests/bench_patched.py
"""

import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common import ablate, load_model, load_sae

ROUNDS = 25


def write_smollm_shape(folder: Path, vocabulary: int = 49_152) -> None:
    """A random model of SmolLM2-135M's shape (its config.json), with that vocabulary or another, in folder/model, and a
    JumpReLU SAE of 16k features at layer 7 in folder/sae."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / "tiny/model").save_pretrained(folder / "model")
    metadata = SAEMetadata(hook_name="blocks.7.hook_resid_post", model_name="model")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=576, d_sae=16384, apply_b_dec_to_input=False, metadata=metadata))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.threshold.fill_(0.5)
    sae.save_model(folder / "sae")


def now(device) -> float:
    """Seconds, once the device has done what it was told."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def smollm_shape(folder: Path):
    """The model and the SAE, loaded."""
    write_smollm_shape(folder)
    model = load_model(str(folder / "model"), "cpu")
    return model, load_sae(str(folder / "sae"), 7, model)


@torch.inference_mode()
def ratio(model, sae, batch: int, length: int) -> float:
    """Time of a pass with features ablated over that of one without, median of pairs; printed, too."""
    place, features = model.cfg.device, list(range(0, 500, 10))
    ids = torch.randint(10, 4000, (batch, length), generator=torch.Generator().manual_seed(0)).to(place)

    def seconds(patched: bool) -> float:
        with ablate(model, sae, features, -5.0) if patched else nullcontext():
            start = now(place)
            model(ids, use_cache=False)
            return now(place) - start

    seconds(True), seconds(False)
    pairs = [(seconds(True), seconds(False)) for _ in range(ROUNDS)]
    patched, clean = (statistics.median(column) for column in zip(*pairs))
    each = sorted(a / b for a, b in pairs)
    print(f"  {batch} x {length} tokens: patched {patched:.3f} s, unpatched {clean:.3f} s, ratio {patched / clean:.3f}")
    print(f"  pair by pair {each[0]:.3f} to {each[-1]:.3f}, median {statistics.median(each):.3f}")
    return statistics.median(each)


if __name__ == "__main__":
    print("tiny, layer 7")
    tiny = load_model("tiny", "cpu")
    ratio(tiny, load_sae(None, 7, tiny), 16, 128)
    print("random model of SmolLM2-135M's shape, SAE of 16,384 features at layer 7")
    with tempfile.TemporaryDirectory() as folder:
        ratio(*smollm_shape(Path(folder)), 4, 128)
