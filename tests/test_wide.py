"""Wide SAEs: no pass holds the activations of a whole batch, or a second copy of the weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import KINDS, NORMS, ROOT, ordinary_mask, residual, some_ids, some_windows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import edits
import evaluation

WIDE, FEW = 4096, 2**16  # features, of 32 inputs each; activations at once: those of 16 tokens, half of W_enc's size


class Largest(TorchDispatchMode):
    """Within it `bytes` is the size of the largest tensor made that does not lie in the SAE's own weights."""

    def __init__(self, sae):
        super().__init__()
        self.own, self.bytes = {x.untyped_storage().data_ptr() for x in sae.parameters()}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage.data_ptr() not in self.own:
                self.bytes = max(self.bytes, storage.nbytes())
        return out


def passes_of(model, sae) -> dict:
    """{name: a function that runs the SAE over many tokens and returns what it finds, a list of tensors}."""
    ids, windows = some_ids(model), some_windows(model)
    h, ordinary = residual(model, ids), ordinary_mask(model, ids)

    def rates():
        found = common.firing_rates(model, sae, windows)
        return [found.fires, found.total]

    def row(method, **arguments):
        return lambda: [edits.make(method, sae, **arguments).at[1](h, ordinary)]

    return {
        "rates": rates,
        "check": lambda: [torch.tensor(list(evaluation.check_sae_quality(model, sae, windows, insist=False).values()))],
        "reconstruction": row("sae-reconstruction"),
        "clamp": row("clamp", features=[3, 17, 40], clamp=-5.0),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_passes_are_in_pieces_and_find_the_same(gemma, make_sae, kind, norm, monkeypatch):
    sae = make_sae(gemma, kind, norm, d_sae=WIDE)
    whole = {name: run() for name, run in passes_of(gemma, sae).items()}
    monkeypatch.setattr(edits, "AT_ONCE", FEW)
    for name, run in passes_of(gemma, sae).items():
        with Largest(sae) as seen:
            found = run()
        assert seen.bytes <= 4 * FEW, name
        for ours, wanted in zip(found, whole[name]):
            assert torch.equal(ours, wanted) or ours.is_floating_point(), name
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_less_than_a_batch_is_one_piece(gemma, make_sae):
    """The default: narrow SAEs, as tiny's, run as they always have."""
    h = torch.zeros(16, 128, 32)
    assert len(edits.chunks(make_sae(gemma), h)) == 1 and edits.AT_ONCE == 16 * 128 * 2**14


PEAK = """
import json, re, sys
from pathlib import Path
import sae_lens, torch
import common, edits, evaluation

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

kind, d_in, d_sae = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sae = getattr(sae_lens, kind)(getattr(sae_lens, kind + "Config")(d_in=d_in, d_sae=d_sae)).requires_grad_(False)
sae.hook_point, sae.source = "blocks.1.hook_resid_post", "random"
h = torch.randn(2, 2**26 // d_sae, d_in)
edits.iter_residual_stream = lambda *args, **kwargs: [(h.flatten(0, 1), None)]
passes = {
    "rates": lambda: common.firing_rates(None, sae, []),
    "check": lambda: evaluation.check_sae_quality(None, sae, [[0] * (2**27 // d_sae)], insist=False),
    "reconstruction": lambda: edits.reconstruction(sae).at[1](h, torch.ones(h.shape[:2], dtype=torch.bool)),
}
found = {}
for name, run in passes.items():
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run()
    found[name] = (kilobytes("VmHWM") - before) / 1e6
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind, d_in, d_sae", [
    ("JumpReLUSAE", 2304, 2**17), ("GatedSAE", 2304, 2**17), ("JumpReLUSAE", 256, 2**20), ("TopKSAE", 256, 2**20)
])  # fmt: skip
def test_peak_memory_beside_the_sae(kind, d_in, d_sae):
    """In GB, on the CPU, for so many tokens that one (tokens, d_sae) has 0.5 GB. A million features have fewer inputs
    here than Gemma Scope's: the SAE itself is 2.1 GB, and a copy of either half of it would still be seen."""
    memory = Path("/proc/meminfo")
    if not memory.exists() or int(re.search(r"MemAvailable:\s+(\d+)", memory.read_text())[1]) < 8e6:
        pytest.skip("needs Linux and 8 GB")
    done = subprocess.run([sys.executable, "-c", PEAK, kind, str(d_in), str(d_sae)], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout.splitlines()[-1]).values()) < 1, done.stdout  # after the SAE check's line
