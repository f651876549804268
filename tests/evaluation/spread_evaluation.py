"""Run by test_evaluator.py under torchrun: every process scores its share, each writes what it was told in the end."""

import json
import sys
from pathlib import Path

from accelerate import Accelerator

from amltrain.config.schema import Protocol
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.evaluation.results import named_protocol
from tests.evaluation.stand_in import Scenes, SeesBright, loader


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    protocol: Protocol = named_protocol("rela")
    results = evaluate_model(accelerator, SeesBright(head=True), loader(Scenes(empty=(3, 5))), protocol, pictures=3)
    said = results.to_dict() | {"samples": results.samples.tolist(), "kept": [p.sample_id for p in results.predictions]}
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(said))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
