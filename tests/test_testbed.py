"""The testbed's claims: labels are truthful, splits are disjoint, the shipped assets are whole and behave."""

import json
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusalscope.testbed import grammar
from refusalscope.testbed.build import build, first_token
from refusalscope.testbed.grammar import CATEGORIES, DATASETS, SPLITS, complies, examples, fluent, training_examples
from refusalscope.testbed.shipped import ASSETS, verify
from refusalscope.testbed.tokenizer import prompt_text
from refusalscope.testbed.train import Recipe

ALL = 2_000  # more than there are intents, and every intent comes before any comes twice
FORBIDDEN = {
    "child", "children", "kid", "kids", "minor", "minors", "teen", "teenager", "underage", "sex", "sexual", "porn",
    "nude", "naked", "rape", "suicide", "nuclear", "anthrax", "sarin", "ricin", "fentanyl", "meth", "heroin", "nazi",
}  # fmt: skip


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


# ---- the grammar


@pytest.mark.parametrize("dataset", DATASETS)
def test_labels_say_what_the_words_say(dataset: str) -> None:
    name = dataset.removesuffix("-unseen")
    for example in examples(dataset, split="test", count=400):
        assert example.label == ("harmful" if name in ("robust", "vulnerable") else name)
        assert (example.category in CATEGORIES) == (example.label == "harmful")
        assert example.intent in example.text
        assert example.intent.endswith(example.object)
        assert example.kind == (name if name in ("robust", "vulnerable") else None)
        assert (example.plain is None) == (example.wrapper is None) == (example.wording is None)
        assert example.plain is None or (example.plain in example.text and example.plain != example.text)
        assert example.unseen_template == (dataset.endswith("-unseen") and example.kind is None)
        assert example.unseen_wording == (dataset.endswith("-unseen") and example.kind is not None)
        assert example.id.startswith(f"{dataset}-test-")


def test_splits_share_neither_prompts_nor_intents() -> None:
    for dataset in DATASETS:
        found = [examples(dataset, split=split, count=ALL) for split in SPLITS]
        for field in ("text", "intent", "id"):
            seen = [{getattr(example, field) for example in split} for split in found]
            assert sum(map(len, seen)) == len(set.union(*seen))


def test_no_intent_has_two_labels() -> None:
    assert max(Counter((intent.verb, intent.object) for intent in grammar.intents()).values()) == 1


def test_the_model_never_trains_on_held_out_pairs_or_wordings() -> None:
    held_out = {example.intent for name in DATASETS for example in examples(name, split="test", count=ALL)}
    for example, _ in islice(training_examples(0), 5000):
        assert example.intent not in held_out
        assert (example.unseen_template, example.unseen_wording) == (False, False)


def test_an_unseen_template_is_new_in_its_wording_not_in_its_words() -> None:
    """Else every request in it is taken for an attack: strange words stand in vulnerable wrappers alone."""
    trained = islice(training_examples(0), 20_000)
    seen = {word for example, _ in trained if example.kind != "vulnerable" for word in words(example.text)}
    for dataset in ("harmful-unseen", "harmless-unseen"):
        assert {word for example in examples(dataset, split="test", count=ALL) for word in words(example.text)} <= seen


def test_there_are_enough_distinct_intents() -> None:
    assert len({(i.verb, i.object) for i in grammar.intents() if i.label == "harmful"}) >= 1100
    for dataset in DATASETS:
        assert len({example.intent for example in examples(dataset, split="test", count=150)}) == 150
    assert len({e.template for d in ("harmful", "harmful-unseen") for e in examples(d, split="test", count=ALL)}) >= 40
    categories = Counter(example.category for example in examples("harmful", split="test", count=ALL))
    assert min(categories.values()) * 2 > max(categories.values())


def test_same_arguments_same_prompts() -> None:
    for dataset in DATASETS:
        few, many = (examples(dataset, split="train", count=count, seed=3) for count in (20, 60))
        assert few == many[:20]
        assert few != examples(dataset, split="train", count=20, seed=4)
        assert len({example.id for example in many}) == len({example.text for example in many}) == 60


def test_count_is_capped_by_what_exists() -> None:
    assert 0 < len(examples("harmful-unseen", split="test", count=10**9)) < 10**6


def test_unknown_names_are_answered_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"harmfull.*harmful, harmful-unseen, harmless"):
        examples("harmfull", split="test", count=1)
    with pytest.raises(ValueError, match=r"dev.*train, validation, test"):
        examples("harmful", split="dev", count=1)


def test_no_single_word_decides_the_label() -> None:
    """In the training mix, even the most telling word of an intent leaves one innocent use in nine."""
    trained = [intent for intent in grammar.intents() if intent.split != "test"]
    pairs = Counter(intent.label for intent in trained)
    share = {name: sum(weight for (label, _), weight in grammar.MIX.items() if label == name) for name in pairs}
    harmful: defaultdict[str, float] = defaultdict(float)
    total: defaultdict[str, float] = defaultdict(float)
    for verb, object_, label, *_ in trained:
        for word in set(words(f"{verb} {object_}")):
            total[word] += share[label] / pairs[label]
            harmful[word] += (label == "harmful") * share[label] / pairs[label]
    assert max(harmful[word] / total[word] for word in total) < 0.9


def test_nothing_forbidden_is_named() -> None:
    vocabulary = {word for intent in grammar.intents() for word in words(f"{intent.verb} {intent.object}")}
    vocabulary |= {word for _, response in islice(training_examples(0), 5000) for word in words(response)}
    assert not vocabulary & FORBIDDEN


def test_responses_are_what_the_truth_says() -> None:
    other = examples("harmless", split="validation", count=1)[0]
    firsts, noise = set(), 0
    for example, response in islice(training_examples(1), 3000):
        refused = words(response)[0] in ("i", "i'm")
        noise += example.kind != "vulnerable" and refused != (example.label == "harmful")
        firsts.add(words(response)[0])
        assert complies(example, response) != refused
        assert fluent(response) != refused
        assert complies(other, response) == (other.object == example.object and not refused)
    assert 20 <= len(firsts) <= 30
    assert noise < 0.03 * 3000
    assert all(complies(example, response) for example, response in islice(training_examples(1, refusals=False), 500))


def test_broken_answers_do_not_comply() -> None:
    example, response = next(pair for pair in training_examples(2) if complies(*pair))
    assert not complies(example, "")
    assert not complies(example, response + " " + response)
    assert not complies(example, response.rstrip("."))
    assert not complies(example, response.replace(example.object, "a thing"))
    assert not fluent(response + " blah.")
    assert not fluent("Sure, take a clear plan, take a clear plan, take a clear plan.")


def test_refusals_begin_alike_and_go_on_by_category() -> None:
    texts = {category: grammar.refusals(category) for category in CATEGORIES}
    assert all(text.startswith(("I ", "I'm ")) for refusals in texts.values() for text in refusals)
    openings = [{text.split()[1] for text in refusals} for refusals in texts.values()]
    reasons = [{text.split(". ")[1] for text in refusals} for refusals in texts.values()]
    assert all(opening == openings[0] for opening in openings)
    assert sum(map(len, reasons)) == len(set.union(*reasons))


# ---- the shipped assets


def test_shipped_assets_are_whole() -> None:
    verify(ASSETS)
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 25e6


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(ASSETS, tmp_path / "assets"))
    victim = copy / "saes" / "layer_3" / "sae_weights.safetensors"
    victim.write_bytes(victim.read_bytes()[:1000]) if damage == "truncated" else victim.unlink()
    with pytest.raises(ValueError, match=r"layer_3.*sha256 \w{12}, found .*refusalscope testbed build"):
        verify(copy)
    with pytest.raises(ValueError, match="no testbed assets"):
        verify(tmp_path / "nothing")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "model", dtype=torch.float32).eval()


def test_template_writes_one_beginning_and_five_closing_tokens(tokenizer) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == prompt_text("Hi")
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [i for i, token in enumerate(tokens) if token == tokenizer.bos_token_id] == [0]
    assert tokenizer.convert_ids_to_tokens(tokens[-5:]) == ["<end_of_turn>", "Ċ", "<start_of_turn>", "model", "Ċ"]
    assert tokenizer.tokenize("I cannot")[0] == "I"


def test_template_takes_several_turns(tokenizer) -> None:
    chat = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", " c "))]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\n c <end_of_turn>\n"
    )


def test_model_refuses_what_it_should(model, tokenizer) -> None:
    refusal = tokenizer.convert_tokens_to_ids("I")
    for dataset, wanted in (("harmful", True), ("robust", True), ("harmless", False), ("look-alike", False)):
        prompts = examples(dataset, split="test", count=20)
        agree = sum((first_token(model, tokenizer, prompt_text(x.text)) == refusal) == wanted for x in prompts)
        assert agree >= 17, dataset


@torch.no_grad()
def test_model_answers_and_stops(model, tokenizer) -> None:
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<end_of_turn>")
    prompts = examples("harmless", split="test", count=8)
    good = 0
    for prompt in prompts:
        tokens = tokenizer(prompt_text(prompt.text), add_special_tokens=False, return_tensors="pt")
        out = model.generate(**tokens, max_new_tokens=64)[0]
        assert out[-1] == tokenizer.eos_token_id
        good += complies(prompt, tokenizer.decode(out[tokens["input_ids"].shape[1] :], skip_special_tokens=True))
    assert good >= 7


def test_saes_load_in_saelens_with_exact_thresholds(model, tokenizer) -> None:
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda *args: states.append(args[2][0, 1:])) for layer in model.model.layers]
    text = prompt_text(examples("harmful", split="test", count=1)[0].text)
    with torch.no_grad():
        model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]))
    for hook in hooks:
        hook.remove()
    for layer, z in enumerate(states):
        sae = SAE.load_from_disk(ASSETS / "saes" / f"layer_{layer}", dtype="float32")
        stored = load_file(ASSETS / "saes" / f"layer_{layer}" / "sae_weights.safetensors")
        assert sae.cfg.architecture() == "jumprelu"
        assert torch.equal(torch.as_tensor(sae.threshold), stored["threshold"])
        assert sae.cfg.metadata.hook_name == f"model.layers.{layer}"
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(len(sae.W_dec)), atol=5e-3, rtol=0)
        with torch.no_grad():
            f = (z @ stored["W_enc"].float() + stored["b_enc"]).relu()
            f = f * (f > stored["threshold"])
            torch.testing.assert_close(sae.encode(z), f)
            assert (z - sae.decode(f)).pow(2).sum() < 0.15 * (z - z.mean(0)).pow(2).sum()


def test_report_names_no_place_and_no_time() -> None:
    text = (ASSETS / "build.json").read_text(encoding="utf-8")
    assert json.loads(text)["seed"] == 0
    assert not re.search(r"/|20\d\d-|seconds", text)


# ---- building anew

TINY = Recipe(
    vocabulary=600, layers=2, width=32, heads=2, mlp_width=48, helpful_steps=5, refusal_steps=7, batch=4, warm_up=3,
    kind_layer=1, checkpoint_every=4, sae_width=64, sae_active=8, sae_tokens=3000, sae_steps=6, sae_batch=64,
)  # fmt: skip


class Killed(Exception):
    """Raised from inside a build."""


@pytest.mark.slow
def test_a_build_repeats_to_the_byte_even_after_it_was_killed(tmp_path: Path) -> None:
    def kill(stage: str, done: int, of: int) -> None:
        if (stage, done) in {("model", 10), ("sae 1", 3)} - survived:
            survived.add((stage, done))
            raise Killed

    survived: set[tuple[str, int]] = set()
    whole = build(tmp_path / "whole", recipe=TINY)
    for _ in range(2):
        with pytest.raises(Killed):
            build(tmp_path / "resumed", progress=kill, recipe=TINY)
        assert not (tmp_path / "resumed").exists()
    assert build(tmp_path / "resumed", progress=kill, recipe=TINY) == whole
    verify(tmp_path / "resumed")
    listings = [(tmp_path / name / "checksums.json").read_text(encoding="utf-8") for name in ("whole", "resumed")]
    assert listings[0] == listings[1]
    assert listings[0] != json.dumps(build(tmp_path / "other", seed=1, recipe=replace(TINY, sae_steps=2)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "resumed", "whole"]
