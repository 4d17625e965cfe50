"""
The way to the hub: what was trained, and a model card that its record fills.
"""

import json
import re
from pathlib import Path

import show
from data import UserError, first_line
from edits import Edit
from hub import identity, model_source
from records import FREE, command, short_name
from survival import survival_table

HALVES = {"half": "the half of the questions that nothing was trained or chosen on",
          "all": "all questions, those that it was trained on among them"}  # fmt: skip
STAND_INS = """
Stand-ins are ordinary school questions and old books in the place of these data sets: with them a method can be tried
on a laptop, and nothing follows about hazardous knowledge or about real models.
"""
TRIED = """How far it is on the way from the untrained model, 0, to one that never knew, 1 (where there is none, to
chance): as tuned, asked in other ways, and after each attack of `robustness.py`.

"""
UNTRIED = """`robustness.py` was not run on this model. What unlearning takes away seldom survives fine-tuning on a few
related texts, weights rounded to 4 bits, or another way of asking: take what was to be forgotten as still there."""

# --------------------------------------------------------------------------------------------- cards


def front(**about) -> str:
    """What of a card the hub reads, between its lines of dashes."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**about).to_yaml()}\n---"


def placeless(command: str) -> str:
    """The command without the folders of this machine, which are nobody's concern."""
    return re.sub(r"(?<!\S)(?:[A-Za-z]:|~)?[/\\]\S*[/\\]", "", command)


def card_of(record: dict, tried: dict | None, repo: str) -> str:
    """The card of a trained model. tried: its point in a record of robustness.py, None where there is none."""
    points, sources, base = record["points"], record["data"], model_source(record["model"])
    chosen = points[record["chosen"]]
    name, setting = show.method_name(chosen["method"]), {**chosen["setting"], **chosen["setting"].get("training", {})}
    rows = [point for point in points if point is chosen or point["method"] in ("none", "never-knew")]
    about = {"base_model": None if Path(base).is_dir() else base, "library_name": "transformers",
             "pipeline_tag": "text-generation", "tags": ["unlearning", "wmdp", chosen["method"]]}  # fmt: skip
    return f"""{front(**about)}

# {repo.split("/")[1]}

{short_name(record["model"])}, trained to forget what {show.title_of("wmdp_bio", sources)} questions ask. Made to study
unlearning; it is no safeguard.

- method: {name}: {show.setting_text(setting)}
- base model: {short_name(record["model"])} (`{record["identity"]["model"]}`), whose licence applies
- made by: `{placeless(record["command"])}`

## What it scores

On {HALVES[record["settings"]["pick_on"]]} (n {chosen["scores"]["wmdp_bio"]["n"]}), with 95% intervals:

{score_table(rows, sources)}
{STAND_INS if any(source["stand_in"] for source in sources.values()) else ""}
## What it does not survive

{TRIED + survival_table([(name, tried)]) if tried else UNTRIED}
"""


def score_table(points: list[dict], sources: dict) -> str:
    """Markdown: a line for each point."""
    titles = {name: show.title_of(name, sources) for name in ("wmdp_bio", "mmlu")}
    head = ["", *(cell for title in titles.values() for cell in (f"{title}, %", "change, points"))]
    lines = []
    for point in points:
        cells, loss = [show.label(Edit(point["method"], setting=point["setting"]))], point["scores"]["openwebtext"]
        for name in titles:
            cells += [show.accuracy_cell(point["scores"][name]), show.change_cell(point["scores"][name])]
        cells.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*show.loss_added(loss)) if "loss_added" in loss else "")
        lines.append([" ".join(cell.split()).replace("[ ", "[") for cell in cells])
    return show.markdown([*head, "loss added, nats per token"], lines)


def tried_of(record: dict, folder: Path) -> dict | None:
    """The point that a record of robustness.py in the folder has of this record's model, known by method, setting and
    letters; None where there is none."""
    chosen = record["points"][record["chosen"]]
    for path in sorted(folder.glob("*.json")):
        try:
            other = json.loads(path.read_text())
            points = other["points"] if other["script"] == "robustness.py" else []
        except (ValueError, KeyError, TypeError):  # another file
            continue
        for point in points:
            same = (point["method"], point["setting"]) == (chosen["method"], chosen["setting"])
            if same and point["scores"]["as tuned"]["letters"] == chosen["scores"]["wmdp_bio"]["letters"]:
                return point
    return None


def card_of_saes(measured: dict, text: str, model: str, repo: str) -> str:
    """The card of SAEs. measured: {SAE: what train_sae.measure found}; text: what they were trained on."""
    head = ["SAE", "variance explained", "L0", "loss recovered", "loss added, nats per token", "dead features, %"]
    rows = [
        [name, f"{one['variance_explained']:.3f}", f"{one['l0']:.1f}", f"{one['loss_recovered']:.3f}",
         f"{one['loss_added']:+.3f}", f"{100 * one['dead_share']:.1f}"] for name, one in measured.items()
    ]  # fmt: skip
    text = Path(text).name if Path(text).is_file() else text
    return f"""{front(library_name="saelens", tags=["sparse-autoencoder", "interpretability"])}

# {repo.split("/")[1]}

Sparse autoencoders of the residual stream of {short_name(model)}, trained on {text}, measured on held-out text:

{show.markdown(head, rows)}

- model: {short_name(model)} (`{identity(model_source(model))}`), whose licence applies
- made by: `{placeless(command())}`

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{repo}", "{next(iter(measured))}")
```
"""


# ------------------------------------------------------------------------------------------- uploads


def check_repo(repo: str | None) -> None:
    """Raises UserError, before any work, for a --push that is no name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        if repo is not None and "/" not in repo:
            raise UserError(f"--push {repo}: ORG/NAME is wanted, your own name or an organization's before the slash")
        if repo is not None:
            validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {first_line(error)}") from error


def pushed_before(path: Path, s) -> dict | None:
    """With --push, where an earlier run of these settings left its record at `path` and the model beside it: push that,
    and return the record. Raises UserError as push does."""
    if s.push is None:
        return None
    try:
        record = json.loads(path.read_text())
        then, now = ({name: value for name, value in one.items() if name not in (*FREE, "device")}
                     for one in (record["settings"], vars(s)))  # fmt: skip
        known = {"model": identity(model_source(s.model)), "folder": identity(str(path.with_name(record["folder"])))}
        if then != now or not known.items() <= record["identity"].items():
            return None
    except (OSError, ValueError, KeyError, TypeError):  # no record, or another one
        return None
    push_model(record, path, s.push)
    return record


def push_model(record: dict, path: Path, repo: str | None) -> None:
    """Upload the model of the record at `path`; repo None is no upload. Raises UserError as push does."""
    if repo is None:
        return
    folder, card = path.with_name(record["folder"]), card_of(record, tried_of(record, path.parent), repo)

    def send(api):
        api.upload_folder(repo_id=repo, folder_path=folder)

    push(repo, card, send, f"the same command pushes {folder}")


def push_saes(folder: Path, measured: dict, text: str, model: str, repo: str) -> None:
    """Upload the SAEs {name: what was measured} of the folder, by SAELens. Raises UserError as push does."""
    from sae_lens import upload_saes_to_huggingface

    saes, card = {name: folder / name for name in measured}, card_of_saes(measured, text, model, repo)

    def send(api):  # without SAELens's own card, which has neither the model nor what was measured
        upload_saes_to_huggingface(saes, repo, show_progress=False, add_default_readme=False)

    push(repo, card, send, f"`hf upload {repo} {folder}` pushes it")


def push(repo: str, card: str, send, later: str) -> None:
    """Make the repository where there is none, and upload the card, then the rest by send(api). Raises UserError where
    the hub does not take them; later: what to do then."""
    from huggingface_hub import HfApi, constants

    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        api.upload_file(repo_id=repo, path_or_fileobj=card.encode(), path_in_repo="README.md")
        send(api)
    except Exception as error:  # anything from OSError to the HTTP client's own errors
        raise UserError(f"cannot push to {repo}: {first_line(error)}. What was trained is kept: after `hf auth login` "
                        f"with a token that may write there {later}") from error  # fmt: skip
    print(f"pushed: {constants.ENDPOINT}/{repo}")
