"""The plain line of a step."""

from amltrain.distributed import BatchPlan
from amltrain.training.callbacks import log_line


def test_a_plain_line_tells_how_long_training_will_take() -> None:
    values = {"epoch": 0.5, "loss": 0.25, "lr": 1e-4, "images_per_second": 32.0, "data_wait_percent": 2.0}
    line = log_line(200, 1200, 16, {**values, "memory_gib": 1.5})
    assert line.startswith("step 200/1,200 (17%), epoch 0.50, loss 0.2500, lr 1.0e-04, 32.0 images/s")
    assert line.endswith("1.5 GiB, 0:08:20 left")  # 1,000 steps of 16 images at 32 images/s


def test_a_plan_counts_its_processes() -> None:
    assert str(BatchPlan(1, 8, 2)) == "16 = 1 process x 8 x 2 accumulated"
    assert str(BatchPlan(4, 2, 2)) == "16 = 4 processes x 2 x 2 accumulated"
