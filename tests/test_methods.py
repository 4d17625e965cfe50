"""What the methods' edits are made of is read where they are put."""

import baselines
import methods
from common import load_model, load_sae
from data import load_benchmark
from flags import settings


def test_what_reads_the_stream_reads_it_there_too(renamed, monkeypatch):
    """DSG's gate, CRISP's layers, and the layers from which a direction is taken out."""
    s, lm = settings(baselines.flags, dict(sae=renamed, layer=4, limit=6)), load_model("tiny")
    texts = load_benchmark(s)[0]
    texts["retain"] = [part[:30] for part in texts["retain"]]
    measured, straight = (
        methods.measure(lm, layer, load_sae(place, layer, lm), texts["forget"], texts["retain"], s.clamp, s)
        for layer, place in ((4, renamed), (3, None))
    )
    features = measured.features(20, "dsg")
    assert features == straight.features(20, "dsg")
    assert methods.gate_for(measured, 20) == methods.gate_for(straight, 20) > 0
    assert list(baselines.read_by_crisp(measured)[0]) == [3]
    edit = methods.edit_for("diff-in-means", {"strength": 1, "behind": True}, measured)
    assert list(edit.at) == list(range(3, 12))
