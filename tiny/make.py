"""
Build `tiny/` from nothing: texts and tokenizer, language model, the same retrained without the forget facts, SAEs; two
CPU cores.

    python tiny/make.py                # builds tiny/ anew
    python tiny/make.py --from saes    # from a stage on: text, model, retrained, saes, measure
    python tiny/make.py --quick        # every stage in miniature, into a temporary folder; the result knows nothing

A Gemma-2 model of 20 thin layers learns real Wikitext, Victorian prose and some 1,200 school facts. Each fact is stated
in four wordings and asked in four; the quizzes ask half of the facts in a fifth, never trained on. The
retrained model is trained in the same way on all but the facts of the forget domain.

--quick takes 109 s.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from runs import help_before_imports

flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
STAGES = ("text", "model", "retrained", "saes", "measure")
flags.add_argument("--from", dest="first", choices=STAGES, default="text", help="stage to begin with; what the ones "
                   "before it made is taken as it lies in the folder (default: %(default)s)")  # fmt: skip
flags.add_argument("--quick", action="store_true", help="every stage in miniature, into a temporary folder")
flags.add_argument("--out", type=Path, help="folder to build (default: tiny, or with --quick a temporary one)")
help_before_imports(flags, __name__)

import ctypes
import json
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from common import firing_rates, load_model, load_sae
from data import LETTERS, PERMUTATIONS, encode_prompts, prompt, read_jsonl, reordered, token_windows
from edits import NONE, Edit, reconstruction
from evaluation import check_sae_quality, score_letters, score_loss, score_words

SOURCE = ROOT / "tiny"  # facts/*.json and text/*.txt: what everything is made from
FORGET = "biology"  # the forget domain; lm-eval's header for WMDP-Bio says "about biology"

VOCAB = 4096  # byte-level BPE; small, so that rarer names take two or three tokens
D_MODEL, N_LAYERS, D_FF, N_HEADS, N_KV = 112, 20, 336, 4, 2
CONTEXT = 128  # tokens per training window
BATCH = 32  # windows per step
SAE_LAYERS, SAE_WIDTH = (3, 5, 7, 9, 15), 2048  # at half the width a like clamp cost OpenWebText 3 to 11 times the loss
SAE_MEASURED, SAE_COUNTED = 400, 4000  # windows of held-out text, and of training text for the share of dead features
DEVELOPMENT = 20  # retain facts of each subject that are not scored: MMLU's development questions
TRAIN_DOCUMENTS = 2000  # documents drawn like the training text and kept, to train SAEs on
LETTER_WEIGHT = 5.0  # loss weight of an answer letter
CORRUPTED = 0.1  # share of the input tokens of Wikitext and prose that are replaced in training
TAGGED = 0.2  # share of the names on a page that carry their subject behind them
SEED = 0
HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"


class Round(NamedTuple):
    """A stretch of training: how long, at which learning rate, on what."""

    steps: int
    rate: float  # at first, as a share of the largest
    falls: float  # over which last share of the steps it falls to 0
    facts: float  # share of the documents, as are these three; wikitext and prose are real text
    wikitext: float
    prose: float
    lists: float  # share of lists asked for by letter instead of any of these, in the end
    statements: float  # share of the pages on facts that state them; the others are quizzes
    headless: float  # share of the quizzes without their header
    forget_weight: float  # showings of a forget fact for each of a retain fact: Latin names are longer and more alike


# In the first round the model learns to read quizzes and most facts by letter, in the second facts as such. With the
# second one's documents from the start, what reads quizzes was lost when lists gave way, and letters stayed at chance.
FIRST = Round(2000, 1.0, 0.5, facts=0.78, wikitext=0.16, prose=0.06, lists=0.1, statements=0.35, headless=0.0,
              forget_weight=1.0)  # fmt: skip
SECOND = Round(1400, 0.5, 1.0, facts=0.80, wikitext=0.15, prose=0.05, lists=0.05, statements=0.45, headless=0.25,
               forget_weight=1.4)  # fmt: skip


# --------------------------------------------------- Text: real Wikitext by article, prose by story, facts by subject


def load_facts(folder: Path) -> list[dict]:
    """One dict per fact: subject, relation (templates), entity, answer, others (wrong answers of its relation)."""
    facts = []
    for path in sorted(folder.glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        for relation in table["relations"]:
            answers = sorted({a for _, a in relation["rows"]})
            for entity, answer in relation["rows"]:
                fact = {"subject": table["subject"], "relation": relation, "entity": entity, "answer": answer}
                facts.append({**fact, "others": [a for a in answers if a != answer]})
    return facts


def fill(template: str, fact: dict, rng: random.Random | None = None) -> str:
    """The sentence; with an rng, some names carry their subject behind them, "cholera (biology)", as in an index.

    So what belongs to a subject has something in common that the model must represent, and an SAE can find.
    """
    tag = f" ({fact['subject'].replace('_', ' ')})"
    names = (fact["entity"], fact["answer"])
    entity, answer = (name + (tag if rng and rng.random() < TAGGED else "") for name in names)
    text = template.replace("{e}", entity).replace("{a}", answer)
    return text[0].upper() + text[1:]


def wikitext_articles(path: Path) -> list[str]:
    """Articles of a raw Wikitext file, with its token spacing undone (" , " -> ", ", " @-@ " -> "-")."""
    articles = []
    for line in path.read_text(encoding="utf-8").replace("\r", "").split("\n"):
        # two formulas of the article on constant k filters look like article titles
        if re.fullmatch(r" = [^=].*[^=] = ?", line) and not re.match(r" = 1 (rad|henry)", line):
            articles.append([])
        elif line.strip() and not line.startswith(" ="):
            articles[-1].append(detokenize(line.strip()))
    return ["\n".join(a) for a in articles if sum(map(len, a)) > 500]


def detokenize(line: str) -> str:
    line = re.sub(r" @([-,.])@ ", r"\1", line)
    line = re.sub(r" ([,.;:!?%)\]])", r"\1", line)
    line = re.sub(r"([(\[$]) ", r"\1", line)
    line = re.sub(r'" ([^"]*) "', r'"\1"', line)
    return re.sub(r" ('s|'t|'re|'ve|'ll|n't|')(?=\W|$)", r"\1", line)


def prose_stories(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8").replace("\r", "")
    stories = re.split(r"\n {15,}(?=[A-Z][A-Z' -]+\n)", text)
    stories = [re.sub(r"[ \t]*\n(?!\s*\n)\s*", " ", s) for s in stories if len(s) > 5000]
    return [re.sub(r"\s*\n\s*", "\n", s).strip() for s in stories]


def split(items: list[str], shares: tuple[float, ...], seed: int) -> list[list[str]]:
    """Shuffle whole documents and cut the list so that each part gets about its share of the characters."""
    items = items[:]
    random.Random(seed).shuffle(items)
    total, parts, done = sum(map(len, items)), [[] for _ in shares], 0
    bounds = [sum(shares[: i + 1]) * total for i in range(len(shares))]
    for item in items:
        middle = done + len(item) / 2
        parts[next(i for i, b in enumerate(bounds) if middle <= b + 1)].append(item)
        done += len(item)
    return parts


# ---------------------------------------------------------------------------------------- Documents: one subject each


def options(fact: dict, rng: random.Random, n: int = 4) -> tuple[list[str], int]:
    choices = [fact["answer"], *rng.sample(fact["others"], n - 1)]
    rng.shuffle(choices)
    return choices, choices.index(fact["answer"])


def listed(choices: list[str]) -> str:
    return "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices))


# What is slow to form is not the knowledge but the binding of an option's content to its letter: in quizzes alone it
# stays at chance for thousands of steps. So training begins with lists whose items are asked for by letter, some with
# the letter repeated behind the item, some in the form of a quiz, and pages take their place little by little: where
# they did at once, what had formed was lost, and letters were at chance 1,800 steps later.
LISTS = 700  # steps over which lists give way


def binding_document(facts: list[dict], words: list[str], rng: random.Random) -> str:
    n, form = rng.choice((2, 2, 3, 4)), rng.choice(("repeated", "plain", "colon", "quiz"))
    text = ""
    while len(text) < CONTEXT * 5:
        items = rng.sample(words, n) if rng.random() < 0.5 else options(rng.choice(facts), rng, n)[0]
        asked = rng.choices(items, k=n + 1)
        if form == "quiz":
            text += f"Which is {asked[0]}?\n{listed(items)}Answer: {LETTERS[items.index(asked[0])]}\n\n"
            continue
        text += "".join(f"{x}. {item}{f' {x}' if form == 'repeated' else ''}\n" for x, item in zip(LETTERS, items))
        colon = ":" if form == "colon" else ""
        text += "".join(f" {item}{colon} {LETTERS[items.index(item)]}\n" for item in asked) + "\n"
    return text


def quiz_block(fact: dict, rng: random.Random, style: str, n: int = 4) -> str:
    question = fill(rng.choice(fact["relation"]["questions"][:-1]), fact)
    if style == "words":
        return f"{question}\nAnswer in words: {fact['answer']}\n\n"
    choices, gold = options(fact, rng, n)
    body = f"{question}\n{listed(choices)}"
    if style == "match":
        lines = [f" {choice}: {LETTERS[choices.index(choice)]}\n" for choice in rng.choices(choices, k=3)]
        return f"{body}{''.join(lines)}Answer: {LETTERS[gold]}\n\n"
    if style == "open book":
        body = fill(rng.choice(fact["relation"]["statements"]), fact) + "\n" + body
    if style == "words then letter":
        body += f"Answer in words: {fact['answer']}\n"
    return f"{body}Answer: {LETTERS[gold]}\n\n"


QUIZ_STYLES = ["letter", "words then letter", "words", "open book", "match"]
# Their shares at the start of the first round, from its middle on, and in the second
EARLY, LATE, LAST = (0.25, 0.25, 0.10, 0.25, 0.15), (0.70, 0.10, 0.08, 0.06, 0.06), (0.50, 0.15, 0.20, 0.05, 0.10)


def subject_document(
    facts: list[dict], rng: random.Random, chars: int, stage: Round = SECOND, progress: float = 1.0
) -> str:
    """A page of statements or a quiz, about one subject only, of at least `chars` characters; `progress`: the share of
    the round that is done."""
    name = facts[0]["subject"].replace("_", " ")
    if rng.random() < stage.statements:
        text = rng.choice(("", f"{name.capitalize()}\n"))
        while len(text) < chars:
            fact = rng.choice(facts)
            text += fill(rng.choice(fact["relation"]["statements"]), fact, rng) + rng.choice("   \n")
        return text
    # in the first round nothing is drawn here: the tokenizer is trained on its pages, and would be another one
    text = "" if stage.headless and rng.random() < stage.headless else HEADER.format(name)
    first = stage is FIRST
    shares = [a + (b - a) * min(1, 2 * progress) for a, b in zip(EARLY, LATE)] if first else LAST
    n = rng.choice((2, 3)) if first and rng.random() > 0.4 + 2 * progress else 4
    while len(text) < chars:
        text += quiz_block(rng.choice(facts), rng, rng.choices(QUIZ_STYLES, shares)[0], n)
    return text


class Sampler:
    """Draws training windows: (BATCH, CONTEXT) token ids, each row one document from its BOS on."""

    def __init__(self, tokenizer, facts, wikitext, prose, seed, stage=SECOND):
        self.tokenizer, self.rng, self.stage = tokenizer, random.Random(seed), stage
        self.facts, self.by_subject = facts, {}
        words = map(tokenizer.decode, range(len(tokenizer)))
        self.words = [word.strip() for word in words if re.fullmatch(r" [a-z]{3,}", word)]
        for fact in facts:
            self.by_subject.setdefault(fact["subject"], []).append(fact)
        self.texts = {"wikitext": wikitext, "prose": prose}
        self.progress = 1.0  # share of the round that is done

    def kind(self) -> str:
        kinds = ("facts", "wikitext", "prose")
        return self.rng.choices(kinds, [getattr(self.stage, kind) for kind in kinds])[0]

    def document(self, kind: str) -> str:
        if kind == "facts":
            more = {FORGET: self.stage.forget_weight}
            weights = [len(facts) * more.get(name, 1) for name, facts in self.by_subject.items()]
            facts = self.rng.choices(list(self.by_subject.values()), weights)[0]
            return subject_document(facts, self.rng, CONTEXT * 5, self.stage, self.progress)
        texts = self.texts[kind]
        text = self.rng.choices(texts, [len(t) for t in texts])[0]
        start = self.rng.randrange(max(1, len(text) - CONTEXT * 5))
        start = text.rfind(" ", 0, start) + 1
        return text[start : start + CONTEXT * 8]

    def batch(self, binding: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(BATCH, CONTEXT) inputs and targets, the targets shifted by one; binding: the share of lists.

        Of the inputs of Wikitext and prose a tenth is replaced by random tokens: these texts are short enough to be
        learned by heart, and a model that cannot trust its context does so less.
        """
        kinds = ["binding" if self.rng.random() < binding else self.kind() for _ in range(BATCH)]
        binds = (self.facts, self.words, self.rng)
        texts = [binding_document(*binds) if kind == "binding" else self.document(kind) for kind in kinds]
        ids = self.tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT + 1)["input_ids"]
        inputs, targets = torch.tensor(ids)[:, :-1], torch.tensor(ids)[:, 1:]
        general = torch.tensor([kind in self.texts for kind in kinds])[:, None]
        noise = torch.randint(len(self.tokenizer), inputs.shape)
        return torch.where(general & (torch.rand(inputs.shape) < CORRUPTED), noise, inputs), targets


# ------------------------------------------------------------------------------------------------ Tokenizer and model


def train_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    core.train_from_iterator(texts, trainer)
    bos = [("<bos>", core.token_to_id("<bos>"))]
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=bos)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names, padding_side="right", add_bos_token=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_model(vocab: int, tokenizer) -> Gemma2ForCausalLM:
    d_head, names = D_MODEL // N_HEADS, ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    config = Gemma2Config(
        vocab_size=vocab, hidden_size=D_MODEL, intermediate_size=D_FF, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, num_key_value_heads=N_KV, head_dim=d_head, query_pre_attn_scalar=d_head,
        sliding_window=64, max_position_embeddings=1024, attn_implementation="eager", **ids,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        # scaled by sqrt(d_model), embeddings start at RMS 1; each sublayer adds a fifth of that to the residual stream,
        # else the sublayers' initial noise drowns the tokens
        model.model.embed_tokens.weight.normal_(0, D_MODEL**-0.5)
        for block in model.model.layers:
            block.post_attention_layernorm.weight.fill_(-0.8)
            block.post_feedforward_layernorm.weight.fill_(-0.8)
    return model


def token_weights(ids: torch.Tensor, letters: torch.Tensor, pad: int) -> torch.Tensor:
    """(batch, pos) loss weight of each token as a target: 0 for padding, LETTER_WEIGHT for an answer letter."""
    return (ids != pad).float() + (LETTER_WEIGHT - 1) * torch.isin(ids, letters)


def keep_memory() -> None:
    """Have the C library keep freed memory: handing it back and fetching it anew takes a fifth of a step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap, too
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def faster_type() -> torch.dtype:
    """bf16 where this CPU multiplies it faster than fp32, which needs instructions that not all have."""
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(shape, dtype=dtype) for shape in ((BATCH * CONTEXT, D_MODEL), (D_MODEL, D_FF)))
        for _ in range(20):
            started = time.perf_counter()
            a @ b
            taken[dtype] = min(taken.get(dtype, 1.0), time.perf_counter() - started)
    return min(taken, key=taken.get)


def train_round(model, sampler, tokenizer, steps: int, compiled: bool = True) -> None:
    """In place. Muon for the matrices: AdamW alone was far slower."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    other = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.05, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(other, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1),
    ]
    base = [o.param_groups[0]["lr"] for o in optimizers]
    letters = torch.tensor([tokenizer.encode(f" {x}", add_special_tokens=False)[0] for x in LETTERS])
    model.train()
    fast, dtype, stage = torch.compile(model) if compiled else model, faster_type(), sampler.stage
    bar = tqdm(range(steps), desc="language model", unit="step", mininterval=10)
    for step in bar:
        sampler.progress = max(0, step - LISTS // 2) / steps
        scale = stage.rate * min(1, (step + 1) / 30) * min(1, (1 - step / steps) / stage.falls)
        for optimizer, lr in zip(optimizers, base):
            optimizer.param_groups[0]["lr"] = lr * scale
        lists = max(stage.lists, 1 - step / LISTS) if stage is FIRST else stage.lists
        inputs, targets = sampler.batch(lists)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = fast(input_ids=inputs, use_cache=False).logits
        weights = token_weights(targets, letters, tokenizer.pad_token_id).reshape(-1)
        losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), reduction="none")
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 25 == 0:
            letter = losses[weights == LETTER_WEIGHT].mean()
            bar.set_postfix(loss=f"{losses[weights == 1].mean():.2f}", letters=f"{letter:.2f}")
    model.eval()


# ---------------------------------------------------------------------------------------- Data files and measurements


def quiz(facts: list[dict], seed: int) -> list[dict]:
    """One question per fact, every other one in the wording that was never trained on."""
    rng, rows = random.Random(seed), []
    for number, fact in enumerate(facts):
        choices, gold = options(fact, rng)
        wording = fact["relation"]["questions"][-1 - number % 2]
        row = {"question": fill(wording, fact), "choices": choices, "answer": gold}
        rows.append(row if fact["subject"] == FORGET else {**row, "subject": fact["subject"]})
    return rows


def reworded(rows: list[dict], facts: list[dict]) -> list[dict]:
    """The same questions with the same options in another wording, one that training did use."""
    return [{**row, "question": fill(fact["relation"]["questions"][0], fact)} for row, fact in zip(rows, facts)]


def in_reverse(facts: list[dict], seed: int) -> list[dict]:
    """For each fact a question that names the answer and asks for the entity, among entities with other answers: a
    trained statement with "which of these" in the entity's place, "Vibrio is the cause of which of these?"."""
    rng, rows = random.Random(seed), []
    for fact in facts:
        others = sorted({entity for entity, answer in fact["relation"]["rows"] if answer != fact["answer"]})
        choices, gold = options({"answer": fact["entity"], "others": others}, rng)
        asked = fact["relation"]["statements"][2].rstrip(".").replace("{e}", "which of these") + "?"
        asked = re.sub("the ((genus|term|drug|plant disease) )?which", "which", asked)
        rows.append({"question": fill(asked, fact), "choices": choices, "answer": gold})
    return rows


# How a question may speak of what another fact says: of a disease by another name, of a microbe by its disease
BY_WAY = {
    "cause_of_disease": "the organism that causes {e}",
    "disease_of_historic_place": "the disease with {e} in its history",
    "disease_of_named_vaccine": "the disease that the vaccine called {e} is given against",
    "drug_against_disease": "the disease that {e} is a drug against",
    "historic_epidemic": "the disease behind the {e}",
    "microbe_of_plant_disease": "the microbe behind the plant disease {e}",
    "nobel_prize_disease": "the disease that {e} won a Nobel Prize for work on",
    "other_name_of_disease": "{e}",
    "sign_of_disease": "the infection known for {e}",
    "useful_microbe": "the key microbe in making {e}",
}


def two_hop(rows: list[dict], facts: list[dict]) -> list[dict]:
    """The questions, with the same options, of which the entity is the answer of another fact, and is named by that, or
    by the first of several in BY_WAY: "Which organism causes pertussis?", where pertussis is whooping cough. `of`: the
    number of the question."""
    found = []
    for number, (row, fact) in enumerate(zip(rows, facts)):
        ways = [(way, first) for way in BY_WAY for first in facts
                if first["relation"]["name"] == way and first["answer"].lower() == fact["entity"].lower()]  # fmt: skip
        for way, first in ways[:1]:
            entity = BY_WAY[way].replace("{e}", first["entity"]).replace("the the", "the")
            question = fill(fact["relation"]["questions"][0], {**fact, "entity": entity})
            question = question.replace("the the", "the").replace("genus the", "genus of the")
            found.append({**row, "question": question, "of": number})
    return found


def cut_story(text: str, chars: int = 1500) -> list[str]:
    """A story cut into documents of about `chars` characters, at line ends."""
    parts = [""]
    for line in text.split("\n"):
        if len(parts[-1]) > chars:
            parts.append("")
        parts[-1] += line + "\n"
    return parts


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def held_out_documents(tokenizer, facts, wikitext, prose) -> list[str]:
    """Documents in the mix of the training text, of articles and stories that were kept out of it."""
    sampler = Sampler(tokenizer, facts, wikitext, prose, SEED + 1)
    return [sampler.document(sampler.kind()) for _ in range(300)]


def quiz_accuracy(lm, rows: list[dict]) -> dict:
    """Shares right: of all questions, by trained and by unseen wording, and under all 24 orders of the options."""
    right = []
    for order in tqdm(PERMUTATIONS, desc="quiz in 24 orders", leave=False):
        prompts, letters = encode_prompts(lm.tokenizer, [prompt(reordered(row, order)) for row in rows])
        chosen = score_letters(lm, prompts, letters, [NONE], 64)[0].argmax(-1).tolist()
        right.append([order[letter] == row["answer"] for letter, row in zip(chosen, rows)])
    table = torch.tensor(right)  # (24, n); the first is the source's order
    gold = torch.tensor([row["answer"] for row in rows])
    return {
        "n": len(rows),
        "accuracy": table[0].float().mean().item(),
        "accuracy_trained_wording": table[0, 1::2].float().mean().item(),
        "accuracy_unseen_wording": table[0, 0::2].float().mean().item(),
        "right_in_all_24_orders": table.all(0).float().mean().item(),
        "in_words": (score_words(lm, rows, [NONE], 64)[0].argmax(-1) == gold).float().mean().item(),
    }


def read_by_layer(lm, rows: list[dict]) -> list[float]:
    """Where facts are read out of the question: for each layer, the share still answered rightly when the residual
    stream of the question's tokens behind it is that of another question (activation patching; Meng et al., arXiv
    2202.05262). Taken are the questions that are answered rightly; those of equal length trade their streams.

    25%: all that decides the answer is still in the question's tokens; 100%: nothing is.
    """
    start = len(lm.tokenizer(prompt(rows[0]).split("\n\n")[0] + "\n\n")["input_ids"])
    groups = {}
    for row in rows:
        length = len(lm.tokenizer(row["question"], add_special_tokens=False)["input_ids"])
        groups.setdefault(length, []).append(row)
    right, n = torch.zeros(lm.cfg.n_layers), 0
    for length, group in groups.items():
        prompts, letters = encode_prompts(lm.tokenizer, [prompt(row) for row in group])
        gold = torch.tensor([row["answer"] for row in group])
        known = score_letters(lm, prompts, letters, [NONE], 64)[0].argmax(-1) == gold
        prompts = [row for row, is_known in zip(prompts, known) if is_known]
        if len(prompts) < 2:
            continue

        def trade(h, _, asked=slice(start, start + length)):
            h = h.clone()
            h[:, asked] = h[:, asked].roll(1, 0)
            return h

        traded = [Edit(f"layer {layer}", at={layer: trade}) for layer in range(lm.cfg.n_layers)]
        chosen = score_letters(lm, prompts, letters, traded, len(prompts)).argmax(-1)
        right += (chosen == gold[known]).sum(1)
        n += len(prompts)
    return (right / n).tolist() if n else []


def text_loss(lm, windows: list[list[int]]) -> float:
    """Mean loss of a model, in nats per token, BOS never a target."""
    nats, targets = score_loss(lm, windows, [NONE], 64, "held-out loss")
    return (nats.sum() / targets.sum()).item()


def ngram_losses(train: list[list[int]], tune: list[list[int]], test: list[list[int]], vocab: int) -> dict:
    """Nats per token of a unigram and of an interpolated trigram model (Jelinek and Mercer 1980; weights by EM)."""
    counts, contexts = ([Counter(), Counter(), Counter()] for _ in range(2))
    for row in train:
        for i in range(1, len(row)):
            for n in range(min(3, i + 1)):
                gram = tuple(row[i - n : i + 1])
                counts[n][gram] += 1
                contexts[n][gram[:-1]] += 1

    def parts(rows):
        for row in rows:
            for i in range(1, len(row)):
                grams = [tuple(row[max(0, i - n) : i + 1]) for n in range(3)]
                yield [1 / vocab] + [counts[n][g] / max(1, contexts[n][g[:-1]]) for n, g in enumerate(grams)]

    def fit(table):
        weights = torch.full((table.shape[1],), 1 / table.shape[1], dtype=torch.float64)
        for _ in range(30):
            share = table * weights
            weights = (share / share.sum(1, keepdim=True)).mean(0)
        return weights

    tuning, testing = (torch.tensor(list(parts(rows)), dtype=torch.float64) for rows in (tune, test))
    return {
        name: -(testing[:, :width] @ fit(tuning[:, :width])).log().mean().item()
        for name, width in (("unigram", 2), ("trigram", 4))
    }


# ------------------------------- The build: stages, each of which takes up what the ones before it left in the folder


def note(out: Path, **found) -> dict:
    """Write what was found into OUT/measured.json, beside what stands there; returns all of it."""
    path = out / "measured.json"
    measured = {**(json.loads(path.read_text()) if path.is_file() else {}), **found}
    path.write_text(json.dumps(measured, indent=1) + "\n")
    return measured


def material(out: Path) -> dict:
    """The facts, of OUT or else tiny's; articles to train on, to pick with and to hold out; stories to train on and to
    hold out."""
    articles = wikitext_articles(SOURCE / "text/wikitext-2-raw-test.txt")
    train_wiki, retain, held_out = split(articles, (0.80, 0.10, 0.10), SEED)
    train_prose, other_prose = split(prose_stories(SOURCE / "text/prose.txt"), (0.75, 0.25), SEED)
    facts = out / "facts"
    facts = load_facts(facts if facts.is_dir() else SOURCE / "facts")
    return {"facts": facts, "wikitext": train_wiki, "prose": train_prose, "retain": retain, "held_out": held_out,
            "other_prose": other_prose}  # fmt: skip


def of_both_kinds(facts: list[dict]) -> tuple[list[dict], list[dict]]:
    """The forget domain's facts, and the others."""
    return tuple([fact for fact in facts if (fact["subject"] == FORGET) is side] for side in (True, False))


def write_text(out: Path, given: dict, quick: bool) -> None:
    """Stage text: the tokenizer, for both models, and all of OUT/data."""
    rng, by_subject = random.Random(SEED + 5), {}
    for fact in given["facts"]:
        by_subject.setdefault(fact["subject"], []).append(fact)
    pages = [subject_document(group, rng, 3000, FIRST) for group in by_subject.values() for _ in range(40)]
    tokenizer = train_tokenizer(given["wikitext"] + given["prose"] + pages, out / "model")
    tokenizer.save_pretrained(out / "retrained")

    forget, others = of_both_kinds(given["facts"])
    dev = [fact for name, group in by_subject.items() if name != FORGET for fact in rng.sample(group, DEVELOPMENT)]
    quizzes = {"wmdp_bio": quiz(forget, SEED), "mmlu": quiz([fact for fact in others if fact not in dev], SEED)}
    asked = quizzes["wmdp_bio"]
    beside = {"mmlu_dev": quiz(dev, SEED + 1), "wmdp_bio_reworded": reworded(asked, forget)}
    beside |= {"wmdp_bio_reversed": in_reverse(forget, SEED + 6), "wmdp_bio_two_hop": two_hop(asked, forget)}
    for name, rows in {**quizzes, **beside}.items():
        write_jsonl(out / f"data/{name}.jsonl", rows)
    sampler = Sampler(tokenizer, given["facts"], given["wikitext"], given["prose"], SEED + 2)
    held_out = held_out_documents(tokenizer, given["facts"], given["held_out"], given["other_prose"])
    texts = {
        "wikitext": given["retain"],
        "wikitext_held_out": given["held_out"],
        "openwebtext": [part for story in given["other_prose"] for part in cut_story(story)],
        "held_out": held_out[: 20 if quick else None],
        "train": [sampler.document(sampler.kind()) for _ in range(60 if quick else TRAIN_DOCUMENTS)],
    }
    for name, documents in texts.items():
        write_jsonl(out / f"data/{name}.jsonl", [{"text": text} for text in documents])


def write_model(folder: Path, facts: list[dict], given: dict, quick: bool) -> None:
    """Stages model and retrained: a model that has read these facts; same seed, same steps."""
    torch.manual_seed(SEED)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = new_model(len(tokenizer), tokenizer)
    keep_memory()
    for seed, stage in ((SEED, FIRST), (SEED + 3, SECOND)):  # not the ones that the data's documents are drawn with
        sampler = Sampler(tokenizer, facts, given["wikitext"], given["prose"], seed, stage)
        shown = map(repr, map(tokenizer.decode, sampler.batch()[1][:4]))
        print("windows of training text:", *shown, sep="\n\n")
        train_round(model, sampler, tokenizer, 2 if quick else stage.steps, compiled=not quick)
    model.to(torch.bfloat16).save_pretrained(folder)


def write_saes(out: Path, quick: bool) -> None:
    """Stage saes: train_sae.py on OUT/model."""
    shutil.rmtree(out / "sae", ignore_errors=True)
    size = ["--tokens", "10240", "--width", "256"] if quick else ["--width", str(SAE_WIDTH)]
    files = ["--text", out / "data/train.jsonl", "--held-out", out / "data/held_out.jsonl", "--out", out / "sae"]
    command = [sys.executable, ROOT / "train_sae.py", "--model", out / "model", "--layers", *map(str, SAE_LAYERS)]
    subprocess.run([*command, *size, *files], check=True)


def measure(out: Path, given: dict, quick: bool) -> dict:
    """Stage measure: what both models know and read, and where the first reads it."""
    few, found = slice(20 if quick else None), {}
    quizzes = {name: read_jsonl(out / f"data/{name}.jsonl", name)[few] for name in ("wmdp_bio", "mmlu")}
    for name in ("model", "retrained"):
        lm = load_model(str(out / name), "cpu")
        wiki = [
            token_windows(lm.tokenizer, given[part], CONTEXT)[0][few] for part in ("wikitext", "retain", "held_out")
        ]
        web = [row["text"] for row in read_jsonl(out / "data/openwebtext.jsonl", "openwebtext")]
        found[name] = {quiz: quiz_accuracy(lm, rows) for quiz, rows in quizzes.items()}
        found[name]["wikitext_held_out_loss"] = text_loss(lm, wiki[2])
        found[name]["openwebtext_loss"] = text_loss(lm, token_windows(lm.tokenizer, web, CONTEXT)[0][few])
        if name == "model":
            found["read_by_layer"] = read_by_layer(lm, quizzes["wmdp_bio"])
            found["wikitext_held_out_loss"] = ngram_losses(*wiki, len(lm.tokenizer))
    folders = sorted((out / "sae").glob("layer_*"), key=lambda path: int(path.name.split("_")[1]))
    return note(out, **found, sae={folder.name: measure_sae(out, folder) for folder in folders})


def measure_sae(out: Path, folder: Path) -> dict:
    """Held-out variance explained, L0 and loss recovered (0 for a zeroed, 1 for the true residual stream), and the
    share of features that never fire on the training text."""
    model, layer = load_model(str(out / "model"), "cpu"), int(folder.name.split("_")[1])
    sae = load_sae(str(folder), layer, model)
    texts = ([row["text"] for row in read_jsonl(out / f"data/{name}.jsonl", name)] for name in ("held_out", "train"))
    held_out, training = (token_windows(model.tokenizer, part, CONTEXT, bos=True)[0] for part in texts)
    held_out = held_out[:SAE_MEASURED]
    found = check_sae_quality(model, sae, held_out, insist=False, most=sum(map(len, held_out)))
    zeroed = Edit("zeroed", at={layer: lambda h, mask: torch.where(mask[..., None], 0, h)})
    nats, targets = score_loss(model, held_out, [NONE, reconstruction(sae), zeroed], 32)
    clean, patched, without = (nats.sum(1) / targets.sum()).tolist()
    fires = firing_rates(model, sae, training[:SAE_COUNTED], 32).fires
    found |= {"loss_recovered": (without - patched) / (without - clean), "loss_added": patched - clean,
              "l0_share": found["l0"] / sae.cfg.d_sae, "dead_share": (fires == 0).float().mean().item()}  # fmt: skip
    return {name: round(value, 4) for name, value in found.items()}


def build(out: Path, quick: bool, first: str = STAGES[0]) -> dict:
    """All stages from `first` on; returns what was reached, which is also written to OUT/measured.json."""
    given = material(out)
    stages = {
        "text": lambda: write_text(out, given, quick),
        "model": lambda: write_model(out / "model", given["facts"], given, quick),
        "retrained": lambda: write_model(out / "retrained", of_both_kinds(given["facts"])[1], given, quick),
        "saes": lambda: write_saes(out, quick),
        "measure": lambda: measure(out, given, quick),
    }
    measured = note(out) if first != STAGES[0] else {}
    for name in STAGES[STAGES.index(first) :]:
        started = time.time()
        stages[name]()
        minutes = {**measured.get("minutes", {}), name: (time.time() - started) / 60}
        measured = note(out, minutes=minutes)
    print(json.dumps(measured, indent=1))
    return measured


if __name__ == "__main__":
    given = flags.parse_args()
    if given.out or not given.quick:
        build(given.out or SOURCE, given.quick, given.first)
    else:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), quick=True)
