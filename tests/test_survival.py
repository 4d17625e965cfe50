"""What survives, by hand."""

import pytest

from survival import reached, survival_table, survives


def answers(right: list[int], **stages) -> dict:
    """As try_all has them: log-probabilities that say whether each question of four is answered right."""

    def values(hits):
        return [[0.0 if (k == answer) == bool(hit) else -9.0 for k in range(4)] for answer, hit in zip(right, hits)]

    recovery = stages.pop("recovery", {"questions": [], "wanted": {"right": [], "wrong": []},
                                       "answered": {"right": [], "wrong": []}})  # fmt: skip
    tuned = values(stages["tuned"])
    rounded = {"4": {"as tuned": values(stages["rounded"])}, "8": {"as tuned": tuned}}
    before = {"as tuned": tuned, "in words": values(stages["words"])}
    return {"before": before, "written": stages["written"], "rounded": rounded, "recovery": recovery}


def test_what_survives_is_the_way_to_the_model_that_never_knew():
    right = [0, 1, 2, 3] * 10
    texts = {"rows": [{"answer": answer} for answer in right]}
    knows, half, gone = [1] * 40, [1, 0] * 20, [1, 0, 0, 0] * 10
    clean = answers(right, tuned=knows, words=knows, rounded=knows, written=knows)
    floor = answers(right, tuned=gone, words=gone, rounded=gone, written=[0] * 40)
    lost = [i for i in range(40) if i % 2]
    wanted = {"right": [right[i] for i in lost], "wrong": [(right[i] + 1) % 4 for i in lost]}
    came = {"right": wanted["right"][:10] + [9] * 10, "wrong": wanted["wrong"][:4] + [9] * 16}
    recovery = {"questions": lost, "wanted": wanted, "answered": came}
    own = answers(right, tuned=half, words=knows, rounded=gone, written=[1] * 30 + [0] * 10, recovery=recovery)
    found = survives(own, clean, floor, texts)
    assert {name: round(one["share"], 6) for name, one in found.items()} == {
        "as tuned": round(20 / 30, 6), "in words": 0.0, "4 bits": 1.0, "open answer": 0.25, "pushed": round(14 / 30, 6),
    }  # fmt: skip
    assert all(one["low"] <= one["share"] <= one["high"] for one in found.values())
    by_chance = survives(own, clean, None, texts)  # 25% of letters; nobody writes the right words by chance
    assert by_chance["as tuned"]["share"] == pytest.approx(20 / 30) and by_chance["open answer"]["share"] == 0.25
    nowhere = survives(own, floor, floor, texts)["in words"]
    assert nowhere == {"share": None, "low": None, "high": None}
    accuracies = {form: {"accuracy": 1} for form in ("as tuned", "MMLU")}
    point = {"survives": {"in words": nowhere}, "recovery": {"reached": {}}, "scores": accuracies}
    assert "| - |" in survival_table([("one", point)])
    shares = reached(recovery)
    assert (shares["right"]["share"], shares["wrong"]["share"]) == (0.5, 0.2)
    assert reached(clean["recovery"]) == {}
