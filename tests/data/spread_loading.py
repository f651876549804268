"""Run by test_loaders under torchrun: which samples each process gets, in order, mapped and streamed.

python spread_loading.py PREPARED OUTPUT GLOBAL_BATCH MICRO_BATCH FIRST_STEP
writes OUTPUT/{mapped,streamed}-RANK.jsonl, a line [sample ids, random keys] for every micro-batch
"""

import json
import sys
from pathlib import Path

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import InitProcessGroupKwargs

from amltrain.config.schema import DataConfig
from amltrain.data.loaders import build_train_loader
from tests.data.stand_in import shapes_dataset


def main(prepared: str, output: str, *numbers: str) -> None:
    total, micro, first_step = map(int, numbers)
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    for way in ("mapped", "streamed"):
        streaming = way == "streamed"
        dataset = shapes_dataset(prepared, names=("refshapes", "refshapes+"), unit="referent", streaming=streaming)
        loader = build_train_loader(
            dataset,
            DataConfig(datasets=["refshapes", "refshapes+"], workers=1),
            seed=5,
            global_batch_size=total,
            micro_batch_size=micro,
            total_steps=6,
            first_step=first_step,
        )
        with (Path(output) / f"{way}-{accelerator.process_index}.jsonl").open("w") as file:
            for batch in accelerator.prepare_data_loader(loader):
                file.write(json.dumps([batch.sample_id.tolist(), batch.random_key.tolist()]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
