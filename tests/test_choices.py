"""Which model, size and length follow from data and machine, and that every choice has a reason and a place."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from amltrain import choices
from amltrain.choices import BASES, RULES, Facts, Plan, as_config, choose_base, make_plan, missing
from amltrain.environment import Machine
from amltrain.errors import UserError
from amltrain.models.registry import model_info

CPU = Machine("cpu", 16.0, 2, "a CPU")
CARD = Machine("cuda", 24.0, 8, "a card", bf16=True)
WORDS = {"preprocess.tokenizer": "wordpiece"}
FACTS = Facts(
    name="mine",
    prepared="prepared",
    images=200,
    refs=600,
    sentences=900,
    scored="val",
    scored_samples=500,
    final="val",
    final_refs=150,
    side=0.15,
    photo=(4000, 3000),
    english=1.0,
    texts=("the red cup", "the ball on the left of the cup"),
    findings=(),
)
NAMES = [base.name for base in BASES]


def values(plan: Plan) -> dict[str, Any]:
    return {choice.key: choice.value for choice in plan.choices}


def made(facts: Facts = FACTS, machine: Machine = CPU, name: str = "caris_lite", **options: Any) -> Plan:
    given = WORDS | options.pop("given", {})
    return make_plan(facts, machine, BASES[NAMES.index(name)], Path("runs/mine"), given, **options)


def everything(base: choices.Base) -> str:
    return ""


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (CPU, "caris_lite"),
        (Machine("mps", 64.0, 8, "M"), "caris_lite"),
        (Machine("cuda", 6.0, 8, "c"), "caris_lite"),
        (Machine("cuda", 11.0, 8, "c"), "dual_dinov3_base"),
        (CARD, "caris_swin_base"),
        (Machine("cuda", 80.0, 8, "c"), "sam3"),
    ],
)
def test_the_machine_chooses_the_model(machine: Machine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "missing", everything)
    assert choose_base(machine, None).name == name


def test_a_model_that_is_not_at_hand_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "missing", lambda base: "" if base.name == "caris_lite" else f"{base.name} lacks it")
    assert choose_base(CARD, None).name == "caris_lite"
    with pytest.raises(UserError, match="sam3 cannot start: sam3 lacks it"):
        choose_base(CARD, "sam3")
    assert choose_base(CARD, "sam3", own_weights=True).name == "sam3"
    monkeypatch.setattr(choices, "missing", lambda base: "pip install it")
    with pytest.raises(UserError, match="no pretrained model is available: pip install it"):
        choose_base(CPU, None)


def test_what_is_missing_comes_with_its_line() -> None:
    base = BASES[-1]._replace(needs={"no_such_module": "pip install no-such-module"})
    assert missing(base) == "caris_lite needs the package no_such_module: pip install no-such-module"
    base = BASES[-1]._replace(needs={}, weights=("nobody/nothing",))
    assert "hf download nobody/nothing" in missing(base)  # tests run with HF_HUB_OFFLINE


def test_every_choice_has_a_reason_and_a_key_of_a_run() -> None:
    from amltrain.api import read_config

    plan = made()
    assert all(choice.reason for choice in plan.choices)
    text = as_config(plan)
    assert all(f"# {choice.reason}" in text for choice in plan.choices)
    run = read_config(yaml.safe_load(text.replace("base:", "#")), base="models/caris_lite")
    assert run.train.max_steps == plan.steps and run.data.datasets == ["mine"]


def test_the_run_is_as_long_as_the_data_want_and_the_minutes_allow() -> None:
    whole, short = made(), made(minutes=2.0)
    assert whole.steps == 20 * 600 // 16 and short.steps < whole.steps
    assert whole.minutes is not None and short.minutes == pytest.approx(2.0, rel=0.05)
    assert "2 minutes allow" in str(short)
    assert values(made(FACTS._replace(refs=9)))["train.global_batch_size"] == 2
    assert values(made(FACTS._replace(refs=100_000)))["optim.warmup_steps"] <= 0.1 * made(minutes=60).steps * 1000
    assert made(given={"train.epochs": 3}).steps == 3 * 600 // 16


@pytest.mark.parametrize("refs", [1, 15, 600, 50_000, 1_000_000])
@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_is_never_longer_than_a_tenth_of_the_run(refs: int, name: str) -> None:
    plan = made(FACTS._replace(refs=refs), CARD, name)
    chosen = values(plan)
    assert chosen["optim.warmup_steps"] <= plan.steps / 10 and chosen["evaluation.every_steps"] <= plan.steps
    assert chosen["preprocess.size"] in BASES[NAMES.index(name)].sizes
    assert chosen["train.global_batch_size"] % chosen["train.micro_batch_size"] == 0


def test_memory_divides_the_batch() -> None:
    small, large = made(machine=Machine("cuda", 8.0, 8, "c"), name="caris_swin_base"), made(machine=CARD)
    assert values(small)["train.micro_batch_size"] < 16 == values(large)["train.micro_batch_size"]
    assert "accumulated" in str(small)


def test_small_objects_get_a_larger_input_and_tiny_ones_a_note() -> None:
    assert [values(made(FACTS._replace(side=side)))["preprocess.size"] for side in (0.3, 0.1, 0.08)] == [192, 256, 320]
    plan = made(FACTS._replace(side=0.02))
    assert "pictures (4000 x 3000) are far larger than the input of 320 px" in str(plan)


def test_sentences_longer_than_the_input_and_words_beyond_the_vocabulary_are_said() -> None:
    long = FACTS._replace(texts=("the cup " * 60,))
    assert "longer than 64 tokens" in str(made(long))
    assert values(made())["preprocess.max_tokens"] == 9 + 1 + RULES.tokens_beyond
    assert "data.augment" not in values(made(FACTS._replace(english=0.1)))


def test_the_models_are_registered_under_their_names() -> None:
    assert [model_info(name).paper != "" for name in NAMES] == [True] * len(BASES)
    cards = [base.card for base in BASES]
    assert cards[-1] is None and cards[:-1] == sorted((c for c in cards if c), reverse=True)
