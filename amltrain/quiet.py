"""Messages of libraries that a user can do nothing about."""

import logging

NO_ACCELERATOR = "Setting accelerator to CPU."


def hush_deepspeed() -> None:
    """Drop what DeepSpeed says when it is imported on a machine without a GPU.

    Accelerate imports it to unwrap any model, also in runs without DeepSpeed. Its other messages stay.
    """
    logging.getLogger("DeepSpeed").addFilter(_not_about_the_cpu)  # adding a filter twice changes nothing


def _not_about_the_cpu(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NO_ACCELERATOR)
