"""Config files: names, layers, and mistakes, which are reported with file and line."""

from pathlib import Path

import pytest

from amltrain.commands.train import read_run
from amltrain.config.files import find_config, shipped_configs
from amltrain.errors import UserError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"run\.yaml is empty"),
        (b"# nothing but this\n", r"run\.yaml is empty"),
        (b"output: \xff\xfe\n", r"run\.yaml is not text in UTF-8"),
        (b"- seed: 1\n", r"run\.yaml has no keys"),
        (b"seed: 1\nmodel: {name: [\n", r"run\.yaml, line 3 is not valid YAML"),
        (b"seed: 1\noutput: a\nseed: 2\n", r"run\.yaml, line 3: seed is already set in line 1"),
        (b"model:\n  name: a\n  name: b\n", r"run\.yaml, line 3: model\.name is already set in line 2"),
        (b"model: layer.yaml\n", r"run\.yaml, line 1: model is a group of keys, not layer\.yaml; .*`base: \[FILE\]`"),
        (b"evaluation:\n  protocol: x.yaml\n", r"run\.yaml, line 2: evaluation\.protocol is a group of keys"),
        (b"seed: 1\nbase: [gone]\n", r"run\.yaml, line 2, base: no file or shipped config is named gone"),
        (b"base: [models/cris_r10]\n", r"run\.yaml, line 1, base: .* did you mean models/cris_r101"),
        (b"base: {a: 1}\n", r"run\.yaml, line 1, base should be a list of files"),
        (b"base: []\n", r"run\.yaml, line 1, base should be a list of files"),
        (b"base: layer.yaml\n", r"layer\.yaml, line 2: seed is already set in line 1"),
        (b"base: run.yaml\n", r"run\.yaml, line 1, base: these files are each other's base: run\.yaml -> run\.yaml"),
        (b"base: [a, b]\nseed: 1\n", r"c\.yaml, line 1, base: .* each other's base: b\.yaml -> c\.yaml -> b\.yaml"),
        (b"seed: 1\noptim:\n  lrr: 1\n", r"run\.yaml, line 3: unknown key optim\.lrr; did you mean optim\.lr"),
        (b"base: bad.yaml\n", r"bad\.yaml, line 2: optim\.lr: x does not fit"),
        (b"train:\n  log_every: 0\n", r"run\.yaml, line 2: train\.log_every"),
    ],
)
def test_a_mistake_is_reported_with_its_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    (tmp_path / "layer.yaml").write_text("seed: 1\nseed: 2\n")
    (tmp_path / "a.yaml").write_text("output: a\n")
    (tmp_path / "b.yaml").write_text("seed: 1\nbase: c.yaml\n")
    (tmp_path / "c.yaml").write_text("base: [b.yaml]\n")
    (tmp_path / "bad.yaml").write_text("optim:\n  lr: x\n")
    for arguments in (["--config", str(tmp_path / "run.yaml")], [f"--config={tmp_path / 'run.yaml'}", "--seed", "1"]):
        with pytest.raises(UserError, match=message) as error:
            read_run(arguments)
        assert "\n" not in str(error.value)


def test_a_mistake_on_the_command_line_names_no_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optim:\n  lr: 0.1\n")
    with pytest.raises(UserError, match=r"^optim\.lr: x does not fit"):
        read_run(["--config", str(tmp_path / "run.yaml"), "--optim.lr", "x"])


def test_a_key_may_be_set_again_in_another_group_or_file(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("seed: 1\ndata: {shapes: {seed: 2}}\nmodel: {kwargs: {seed: 3}}\n")
    (tmp_path / "two.yaml").write_text("seed: 4\n")
    config = read_run(["--config", str(tmp_path / "one.yaml"), "--config", str(tmp_path / "two.yaml")])
    assert (config.seed, config.data.shapes.seed, config.model.kwargs) == (4, 2, {"seed": 3})


def test_bases_are_layered_in_order_below_the_file(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("seed: 1\noutput: low\noptim: {lr: 1e-4, power: 1.5}\n")
    (tmp_path / "middle.yaml").write_text("output: middle\noptim: {weight_decay: 0.5}\n")
    (tmp_path / "top.yaml").write_text("base: [low, middle.yaml, models/caris_tiny]\noptim: {power: 2}\n")
    config = read_run(["--config", str(tmp_path / "top.yaml")])
    optim = config.optim
    assert (config.seed, config.output, config.model.name) == (1, "middle", "caris_tiny")
    assert (optim.lr, optim.weight_decay, optim.power, optim.warmup_steps) == (5e-4, 0.01, 2, 50)


def test_shipped_configs_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "recipes/paper/refcoco+_aml_tau_0.2", "models/caris_tiny"):
        for spelling in (name, f"{name}.yaml", f"configs/{name}.yaml"):
            assert find_config(spelling, "--config") == shipped_configs()[name]
    assert read_run(["--config", "recipes/paper/refcoco+_aml_tau_0.2"]).method_options.tau == 0.2


def test_an_existing_path_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.yaml").write_text("seed: 7\n")
    assert read_run(["--config", "quickstart"]).seed == 7


def test_an_unknown_name_lists_close_matches() -> None:
    with pytest.raises(UserError, match=r"did you mean quickstart or quickstart_aml\?"):
        read_run(["--config", "quickstar"])
    with pytest.raises(UserError, match=r"did you mean recipes/barleria/refcoco_aml or .*recipes/paper/refcoco_aml"):
        find_config("refcoco_aml", "--config")


VARIED = """# A run.

output: runs/mine
seed: 3
optim: {lr: 1.0e-3}

variants:
  # The same, slower. Twice.
  # More about it.
  slow:
    optim: {lr: 1.0e-4}
  elsewhere:
    output: there
"""


def test_a_variant_is_its_file_with_a_few_changes(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(VARIED)
    plain, slow, elsewhere = (
        read_run(["--config", str(tmp_path / name)]) for name in ("mine", "mine_slow", "mine_elsewhere.yaml")
    )
    assert (plain.output, plain.optim.lr, plain.seed) == ("runs/mine", 1e-3, 3)
    assert (slow.output, slow.optim.lr, slow.seed) == ("runs/mine_slow", 1e-4, 3)
    assert (elsewhere.output, elsewhere.optim.lr) == ("there", 1e-3)
    (tmp_path / "top.yaml").write_text("base: mine_slow\nseed: 5\n")
    above = read_run(["--config", str(tmp_path / "top")])
    assert (above.output, above.optim.lr, above.seed) == ("runs/mine_slow", 1e-4, 5)
    assert find_config(str(tmp_path / "mine_slow"), "x").title == "The same, slower. Twice."
    assert find_config(str(tmp_path / "mine"), "x").title == "A run."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("variants:\n  slow: 3\n", r"mine\.yaml, line 2: variant slow has no keys"),
        ("seed: 1\nvariants:\n  slow:\n    optimm: {lr: 1}\n", "optimm"),
        ("seed: 1\nvariants:\n  slow:\n    seed: 1\n    seed: 2\n", "line 5: seed is already set in line 4"),
        ("variants:\n  slow: {seed: 1}\n  slow: {seed: 2}\n", r"line 3: variant slow is already there in line 2"),
        ("variants:\n  slow:\n    base: [other]\n", r"line 3: variant slow cannot hold base; write a file of its own"),
        ("variants:\n  slow:\n    variants: {a: {seed: 1}}\n", r"line 3: variant slow cannot hold variants"),
        ("seed: 1\nvariants: {slower: {seed: 1}}\n", r"did you mean .*mine_slower"),
        ("seed: 1\nvariants: [slow]\n", "no file or shipped config is named"),
        ("seed: 1\nvariants: {}\n", "no file or shipped config is named"),
    ],
)
def test_variants_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_run(["--config", str(tmp_path / "mine_slow")])


def test_a_variant_of_a_file_without_output_does_not_share_its_bases_folder(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("output: runs/low\n")
    (tmp_path / "mine.yaml").write_text("base: [low]\nvariants:\n  slow: {seed: 1}\n")
    outputs = [read_run(["--config", str(tmp_path / name)]).output for name in ("mine", "mine_slow")]
    assert outputs == ["runs/low", "runs/low_slow"]


def test_a_file_does_not_hide_a_variant_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1\nvariants:\n  fast: {seed: 2}\n")
    (tmp_path / "mine_fast.yaml").write_text("seed: 3\n")
    with pytest.raises(
        UserError, match=r"mine_fast\.yaml and the variant fast of \S*mine\.yaml; write .*mine_fast\.yaml"
    ):
        find_config(str(tmp_path / "mine_fast"), "--config")
    assert read_run(["--config", str(tmp_path / "mine_fast.yaml")]).seed == 3
    (tmp_path / "mine_fast.yaml").unlink()
    assert read_run(["--config", str(tmp_path / "mine_fast")]).seed == 2


def test_a_file_says_what_is_wrong_with_its_variants(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1\nvariants: [slow]\n")
    with pytest.raises(UserError, match=r"mine\.yaml, line 2: variants should hold names"):
        read_run(["--config", str(tmp_path / "mine.yaml")])


def test_every_shipped_variant_is_a_run_of_its_own() -> None:
    variants = {name: found for name, found in shipped_configs().items() if found.variant}
    assert len(variants) > 50
    outputs = [read_run(["--config", name]).output for name in variants]
    assert len(set(outputs)) == len(outputs)
    assert all(found.title for found in variants.values())
