"""What a report and a card say first."""

from amltrain.hub.facts import seconds_trained, training_facts


def test_the_first_screen_tells_what_was_trained_how_and_how_long() -> None:
    recipe = {
        "method": "aml",
        "seed": 7,
        "data": {"datasets": ["one", "two"], "train_split": "train"},
        "optim": {"optimizer": "adamw", "lr": 5e-4, "schedule": "poly", "warmup_steps": 50},
        "train": {"global_batch_size": 16},
    }
    training = {"recipe": recipe, "method_options": {"tau": 0.4}, "commit": "abc", "hardware": "a CPU"}
    rows = [{"step": 10 * n, "lr": 1.0, "epoch": n / 2, "images_per_second": 2.0} for n in (1, 2)]
    rows.insert(1, {"step": 10, "val/oIoU": 50.0})
    facts = training_facts(training, rows)
    assert facts["method"] == "aml (tau 0.4)" and facts["trained on"] == "one + two, split train"
    assert facts["optimizer"] == "adamw, lr 0.0005, poly, 50 warm-up steps" and facts["seed"] == "7"
    assert facts["length"] == "20 steps, 1.0 epochs, 3 min of training"
    assert seconds_trained(rows, 16) == 160 and training_facts(None, rows) == {}
