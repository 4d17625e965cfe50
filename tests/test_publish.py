"""What is pushed to the hub: the files, and a card whose numbers are the record's."""

import json

import pytest
from huggingface_hub import ModelCard, constants
from sae_lens import SAE

import baselines
import publish
import rmu
import train_sae
from data import UserError

SETTINGS = dict(steps=2, limit=6)
WAY = {"share": 0.25, "low": 0.125, "high": 0.5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A record of rmu.py, and where it is, its model beside it."""
    path = tmp_path_factory.mktemp("trained") / "r.json"
    return rmu.run(**SETTINGS, out=str(path)), path


@pytest.fixture
def untrained(monkeypatch):
    """Nothing may be trained any more."""
    for module in (rmu, baselines, train_sae):
        monkeypatch.setattr(module, "load_model", None)


def pushed(stand_in, repo: str) -> dict[str, bytes]:
    folder = stand_in.root / "models" / repo
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cells(score: dict) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * score[key] for key in ("accuracy", "low", "high")))


def test_a_model_arrives_whole_with_a_card_of_its_record_and_is_not_trained_again(stand_in, trained, untrained, capsys):
    record, path = trained
    assert rmu.run(**SETTINGS, out=str(path), push="me/forgot") == json.loads(path.read_text())
    assert f"pushed: {stand_in.address}/me/forgot" in capsys.readouterr().out
    rmu.run(**SETTINGS, out=str(path), push="me/forgot")  # into a repository that is there
    files = pushed(stand_in, "me/forgot")
    text = files.pop("README.md").decode()
    assert files == {file.name: file.read_bytes() for file in (path.parent / "r.model").iterdir()}
    assert stand_in.validated == [text, text]
    card = ModelCard(text)
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "text-generation",
                                   "tags": ["unlearning", "wmdp", "rmu"]}  # fmt: skip
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    for name, point in zip(("unablated", "RMU, first batch's norm"), record["points"]):
        for quiz in ("wmdp_bio", "mmlu"):
            assert f"| {cells(point['scores'][quiz])} |" in lines[name]
    assert f"| {record['points'][1]['scores']['openwebtext']['loss_added']:+.3f} [" in lines["RMU, first batch's norm"]
    for said in ("WMDP-Bio stand-in", "MMLU stand-in", "nothing follows about hazardous knowledge", "licence applies",
                 "`robustness.py` was not run", "multiple 8, alpha 10, steps 2", "(n 6)",
                 record["identity"]["model"]):  # fmt: skip
        assert said in text


@pytest.mark.parametrize("changed", [dict(alpha=11.0), dict(limit=5), "model", "record"])
def test_another_model_is_not_pushed_in_its_place(trained, untrained, tmp_path, changed):
    _, path = trained
    for file in (path, *(path.parent / "r.model").iterdir()):
        (tmp_path / file.relative_to(path.parent)).parent.mkdir(exist_ok=True)
        (tmp_path / file.relative_to(path.parent)).write_bytes(file.read_bytes())
    if changed == "model":
        (tmp_path / "r.model/config.json").write_text("{}")
    if changed == "record":
        (tmp_path / "r.json").write_text("{}")
    flags = changed if isinstance(changed, dict) else {}
    with pytest.raises(TypeError, match="not callable"):  # it would be trained
        rmu.run(**SETTINGS | flags, out=str(tmp_path / "r.json"), push="me/forgot")


@pytest.mark.parametrize("why", ["no token", "no rights", "offline", "unreachable"])
def test_where_the_hub_does_not_take_it_one_line_says_so_and_all_is_kept(
    stand_in, trained, untrained, monkeypatch, why
):
    _, path = trained
    if why == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    if why == "no rights":
        stand_in.closed.add("me")
    if why == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if why == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    before = {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=r"cannot push to me/forgot: .*the same command pushes .*r\.model") as said:
        rmu.run(**SETTINGS, out=str(path), push="me/forgot")
    assert "\n" not in str(said.value) and not pushed(stand_in, "me/forgot")
    assert before == {file: file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}


def test_a_card_says_what_robustness_found_of_this_very_model(trained, tmp_path):
    record, _ = trained
    chosen = record["points"][1]
    scores = {"as tuned": chosen["scores"]["wmdp_bio"], "MMLU": chosen["scores"]["mmlu"]}
    point = {**chosen, "scores": scores, "survives": {"as tuned": WAY, "4 bits": WAY}, "recovery": {"reached": {}}}
    other = {**point, "scores": {**scores, "as tuned": {**scores["as tuned"], "letters": "AAAAAA"}}}
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "b.json").write_text(json.dumps({"script": "robustness.py", "points": [other]}))
    assert publish.tried_of(record, tmp_path) is None
    (tmp_path / "c.json").write_text(json.dumps({"script": "robustness.py", "points": [other, point]}))
    assert publish.tried_of(record, tmp_path) == json.loads(json.dumps(point))
    text = publish.card_of(record, publish.tried_of(record, tmp_path), "me/forgot")
    assert "4 bits" in text and "| 0.25 [0.12, 0.50] |" in text and "was not run" not in text


def test_the_card_of_a_model_of_the_hub_names_it_and_no_stand_in(trained):
    record = json.loads(json.dumps(trained[0])) | {"model": "gemma-2-2b-it"}
    for source in record["data"].values():
        source["stand_in"] = False
    text = publish.card_of(record, None, "me/forgot")
    assert ModelCard(text).data.base_model == "google/gemma-2-2b-it" and "tand-in" not in text


def test_a_card_has_the_command_without_this_machines_folders():
    for place in ("/home/me/x/", "~/x/", "C:\\Users\\me\\"):
        given = f"rmu.py --model ORG/NAME --out {place}r.json --push me/forgot --data results/mine"
        assert publish.placeless(given) == "rmu.py --model ORG/NAME --out r.json --push me/forgot --data results/mine"


@pytest.mark.parametrize(
    "script, flags, said",
    [
        (baselines, dict(method="clamp"), "clamp is an edit, .* --method of .*npo"),
        (baselines, dict(method="npo", all=True), "--all trains many"),
        (baselines, dict(method="npo", push="forgot"), "--push forgot: ORG/NAME"),
        (rmu, dict(push="me/for got"), "--push me/for got"),
        (train_sae, dict(push="a/b/c"), "--push a/b/c"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_the_work(untrained, tmp_path, script, flags, said):
    with pytest.raises(UserError, match=said):
        script.run(**{"push": "me/forgot", **flags}, out=str(tmp_path / "r.json"))
    assert not list(tmp_path.iterdir())


def test_saes_arrive_as_saelens_reads_them_with_what_was_measured(stand_in, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"text": "The heart is an organ of the cat, and the moon is not."}\n' * 400)
    flags = dict(text=str(tmp_path / "train.jsonl"), tokens=2048, width=64, k=8, context=16, layers=[1])
    measured = train_sae.run(**flags, out=str(tmp_path / "saes"), push="me/saes")["layer_1"]
    files = pushed(stand_in, "me/saes")
    text = files.pop("README.md").decode()
    assert files == {f"layer_1/{name}": (tmp_path / "saes/layer_1" / name).read_bytes()
                     for name in ("cfg.json", "sae_weights.safetensors")}  # fmt: skip
    assert ModelCard(text).data.library_name == "saelens" and 'from_pretrained("me/saes", "layer_1")' in text
    row = (
        f"| layer_1 | {measured['variance_explained']:.3f} | {measured['l0']:.1f} | {measured['loss_recovered']:.3f} |"
    )
    assert row in text and "trained on train.jsonl" in text
    assert SAE.from_pretrained("me/saes", "layer_1").cfg.d_sae == 64
