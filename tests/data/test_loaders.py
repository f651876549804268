"""The order of samples is a function of (seed, epoch): the same however many processes, workers and restarts."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from amltrain.config.schema import DataConfig, EvaluationConfig, Preprocess
from amltrain.data.loaders import (
    build_eval_loaders,
    build_tokenizer,
    build_train_dataset,
    build_train_loader,
    resolve_splits,
)
from amltrain.data.sampler import EpochSampler
from amltrain.errors import UserError
from amltrain.evaluation.results import named_protocol
from tests.data.stand_in import shapes_dataset, word_tokenizer

BOTH = ["refshapes", "refshapes+"]
PREPROCESS = Preprocess(
    size=32, resize="square", normalization="imagenet", tokenizer="wordpiece", max_tokens=12, sentence_field="sent"
)


def sampler(split_sizes: tuple[int, ...] = (50, 23), **options) -> EpochSampler:
    return EpochSampler(split_sizes, **{"seed": 1, "global_batch_size": 8, "total_steps": 40, **options})


def data(prepared: str, **options) -> DataConfig:
    return DataConfig(**{"prepared": prepared, "workers": 0, **options})


def test_every_epoch_holds_every_sample_once() -> None:
    draws = list(sampler())
    assert len(draws) == len(sampler()) == 40 * 8
    for epoch in range(4):
        assert sorted(d.index for d in draws if d.epoch == epoch) == list(range(73))
    assert [d.epoch for d in draws] == sorted(d.epoch for d in draws)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [tuple(sampler(seed=seed).order(epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert list(sampler()) == list(sampler())
    assert list(sampler(global_batch_size=4, total_steps=80)) == list(sampler())


@pytest.mark.parametrize("step", [1, 9, 10, 39, 40])
def test_a_resumed_run_draws_what_was_left(step: int) -> None:
    """9.125 steps are an epoch, so steps 9 and 10 lie on either side of an epoch's end."""
    for options in ({}, {"weights": [1, 3]}, {"row_groups": np.arange(73) // 5}):
        assert list(sampler(first_step=step, **options)) == list(sampler(**options))[step * 8 :]


def test_weights_give_each_data_set_its_share() -> None:
    drawn = sampler((50, 23), weights=[1, 3], total_steps=73).order(0)
    share = Counter(np.where(drawn < 50, 0, 1).tolist())
    assert share == {0: 18, 1: 55}
    repeated = Counter(drawn[drawn >= 50].tolist())
    assert set(repeated.values()) == {2, 3} and len(repeated) == 23  # a small set is repeated evenly
    assert max(Counter(drawn[drawn < 50].tolist()).values()) == 1
    assert set(sampler(weights=[1, 0]).order(0).tolist()) <= set(range(50))


def test_a_sample_that_comes_again_says_so() -> None:
    draws = list(sampler((50, 23), weights=[1, 3], global_batch_size=73, total_steps=2))
    assert len(set(draws)) == 146
    for epoch in (0, 1):
        last = Counter()
        for draw in draws[epoch * 73 : epoch * 73 + 73]:
            assert draw.repeat == last[draw.index]
            last[draw.index] += 1
        assert max(last.values()) == 3
    assert not any(draw.repeat for draw in sampler())


def test_streamed_samples_are_mixed_within_a_window_of_row_groups() -> None:
    groups = np.repeat(np.arange(40), 10)
    order = sampler((400,), row_groups=groups).order(0)
    assert sorted(order.tolist()) == list(range(400))
    windows = groups[order].reshape(5, 80)
    assert all(len(set(window.tolist())) == 8 for window in windows)  # what a reader keeps is enough
    assert len(set(windows[0][:20].tolist())) > 5
    assert not np.array_equal(sampler((400,), row_groups=groups).order(1), order)


def test_a_batch_is_the_draws_of_its_step(prepared: str) -> None:
    dataset = shapes_dataset(prepared, unit="referent")
    options = {"seed": 0, "global_batch_size": 8, "total_steps": 4}
    draws = list(EpochSampler(dataset.split_sizes, **options))
    loader = build_train_loader(dataset, data(prepared), **options, micro_batch_size=4, first_step=1)
    found = [
        (i, k) for batch in loader for i, k in zip(batch.sample_id.tolist(), batch.random_key.tolist(), strict=True)
    ]
    assert found == [(d.index, int(dataset[d].random_key)) for d in draws[8:]]


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_change_nothing(prepared: str, streaming: bool) -> None:
    dataset = shapes_dataset(prepared, unit="referent", streaming=streaming)
    plan = {"seed": 0, "global_batch_size": 8, "micro_batch_size": 4, "total_steps": 5, "first_step": 0}
    one, other = (
        [(b.sample_id.tolist(), b.image.long().sum().item()) for b in build_train_loader(dataset, config, **plan)]
        for config in (data(prepared, workers=0), data(prepared, workers=2))
    )
    assert one == other


@pytest.fixture(scope="module")
def spread(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two real processes under torchrun draw: global batches of 12 as micro-batches of 3, from step 2 of 6 on."""
    folder = tmp_path_factory.mktemp("spread")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    program = [str(Path(__file__).with_name("spread_loading.py")), prepared, str(folder), "12", "3", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.parametrize("way", ["mapped", "streamed"])
def test_two_processes_see_the_global_batches_of_one(prepared: str, spread: Path, way: str) -> None:
    """1 process x 4 accumulated = 2 x 2 micro-batches of 3, also from the middle on; the sampler is the yardstick."""
    dataset = shapes_dataset(prepared, names=tuple(BOTH), unit="referent", streaming=way == "streamed")
    options = {"seed": 5, "global_batch_size": 12, "total_steps": 6, "row_groups": dataset.row_groups()}
    draws = list(EpochSampler(dataset.split_sizes, **options))
    expected = [[d.index for d in draws[step * 12 : step * 12 + 12]] for step in range(2, 6)]
    ranks = [[json.loads(line) for line in (spread / f"{way}-{rank}.jsonl").open()] for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [8, 8]
    together = [
        [i for k in (0, 1) for rank in ranks for i in rank[2 * step + k][0]]  # micro-batches are dealt in turn
        for step in range(4)
    ]
    assert together == expected
    keys = {i: key for rank in ranks for ids, some in rank for i, key in zip(ids, some, strict=True)}
    assert all(int(dataset[d].random_key) == keys[d.index] for d in draws[24:40])


def test_an_epoch_over_several_data_sets_leaves_held_out_images_out(prepared: str) -> None:
    config = data(prepared, datasets=BOTH)
    tokenizer = build_tokenizer(config, PREPROCESS)
    dataset = build_train_dataset(config, PREPROCESS, tokenizer, mask_parts="union", seed=0)
    evaluated = {
        loader.dataset.info(i).image_id
        for loader in build_eval_loaders(
            config,
            PREPROCESS,
            EvaluationConfig(["val", "testA", "testB"]),
            named_protocol("caris"),
            tokenizer,
        ).values()
        for i in range(len(loader.dataset))
    }
    used = {dataset.info(i).image_id for i in range(len(dataset))}
    assert used and not used & evaluated
    unfiltered = build_train_dataset(
        data(prepared, datasets=BOTH, leak_filter=False), PREPROCESS, tokenizer, mask_parts="union", seed=0
    )
    assert len(unfiltered) >= len(dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_sees_every_sentence_in_order(prepared: str, streaming: bool) -> None:
    config = data(prepared, datasets=BOTH, streaming=streaming)
    loaders = build_eval_loaders(
        config,
        PREPROCESS,
        EvaluationConfig(["val", "refshapes:testA"], batch_size=4),
        named_protocol("cgformer"),
        word_tokenizer(),
    )
    assert list(loaders) == ["refshapes:val", "refshapes+:val", "refshapes:testA"]
    for loader in loaders.values():
        batches = list(loader)
        assert [i for b in batches for i in b.sample_id.tolist()] == list(range(len(loader.dataset)))
        assert all(len(b.original_target) == len(b.image) for b in batches)


def test_split_names() -> None:
    assert resolve_splits(["val", "testA"], ["refcoco"], None) == [
        ("refcoco", "val", "val"),
        ("refcoco", "testA", "testA"),
    ]
    assert resolve_splits(["val", "refcoco:testB", "test"], ["refcoco", "refcocog"], None) == [
        ("refcoco", "val", "refcoco:val"),
        ("refcocog", "val", "refcocog:val"),
        ("refcoco", "testB", "refcoco:testB"),
        ("refcocog", "test", "refcocog:test"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1.0]}, "data.weights has 1 numbers for 2 data sets"),
        ({"weights": [1.0, -1.0]}, "data.weights must be 0 or more"),
        ({"train_split": "testC"}, "has no split 'testC'"),
        ({"datasets": ["refcoco", "refshapes"]}, "no refcoco/train"),
        ({"datasets": ["refcoco-unk"]}, "has no split by"),
        ({"prepared": "not-there"}, "amltrain data prepare"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_cannot_be_loaded_is_said(prepared: str, options: dict, message: str, streaming: bool) -> None:
    config = data(**{"prepared": prepared, "datasets": BOTH, "streaming": streaming, **options})
    with pytest.raises(UserError, match=message):
        build_train_dataset(config, PREPROCESS, word_tokenizer(), mask_parts="union", seed=0)


def test_a_split_that_nobody_has_is_said() -> None:
    with pytest.raises(UserError, match=r"no split 'test' .* refcoco: train, val, testA, testB"):
        resolve_splits(["test"], ["refcoco"], None)
