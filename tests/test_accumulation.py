"""The number of micro-batches follows from memory and processes. That training is the same by any: test_distributed."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from semtok import UserError
from semtok.training.accumulation import device_gb, micro_batches
from semtok.training.train_config import TrainConfig

# Of 4 images at once 9 GB, of 2 at once 5, of one 3.
MEMORY = {"gpu": 6, "fixed": 1, "per_image": 2}


def config(batch_size: int, memory: dict[str, Any] | None, accumulate: Any = "auto") -> TrainConfig:
    settings = {"steps": 0, "batch_size": batch_size, "accumulate": accumulate, "memory": memory}
    return TrainConfig.model_validate_json(json.dumps(settings))


@pytest.mark.parametrize(
    ("batch_size", "num_processes", "gpu", "number", "line"),
    [
        (256, 1, None, 2, "128 images at once need 74 of 80 GB on one process"),
        (256, 2, None, 1, "128 images at once need 74 of 80 GB on each of 2 processes"),
        (256, 8, None, 1, "32 images at once need 26 of 80 GB on each of 8 processes"),
        (256, 1, 24.0, 16, "16 images at once need 18 of 24 GB on one process"),
        (256, 1, 141.0, 2, "128 images at once need 74 of 80 GB on one process"),
        (132, 1, None, 1, "132 images at once need 76 of 80 GB on one process"),
        (134, 1, None, 2, "67 images at once need 43.5 of 80 GB on one process"),
        (251, 1, None, 251, "1 images at once need 10.5 of 80 GB on one process"),
    ],
)
def test_as_few_micro_batches_as_fit(batch_size, num_processes, gpu, number, line):
    """Of which each process takes equally many images; a larger GPU than the stated one changes nothing."""
    memory = {"gpu": 80, "fixed": 10, "per_image": 0.5}
    found = micro_batches(config(batch_size, memory), num_processes, gpu)
    assert found == (number, f"accumulate={number}: {line}")


def test_a_number_stays_and_is_warned_of_where_it_needs_more_than_there_is():
    assert micro_batches(config(8, None, 2), 2, 1e-3) == (2, "")
    assert micro_batches(config(8, MEMORY, 4), 1, None)[1].startswith("accumulate=4: 2 images")
    number, line = micro_batches(config(8, MEMORY, 2), 1, None)
    assert number == 2
    assert line == "warning: accumulate=2: 4 images at once need 9 of 6 GB on one process"


@pytest.mark.parametrize(
    ("settings", "num_processes", "gpu", "message"),
    [
        ((8, MEMORY), 3, None, "train.batch_size: 8 is not divisible by 3 processes$"),
        ((8, MEMORY, 3), 1, None, "8 is not divisible by 1 processes times train.accumulate 3"),
        ((8, MEMORY), 8, 3.1, "even one image at once needs 3 GB, and of 3.1 GB 95% are used"),
    ],
)
def test_what_does_not_divide_or_fit_is_one_line(settings, num_processes, gpu, message):
    with pytest.raises(UserError, match=message):
        micro_batches(config(*settings), num_processes, gpu)


def test_a_gpu_is_asked_for_its_memory(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=4 * 10**9)
    )
    assert device_gb(torch.device("cuda", 0)) == 4 and device_gb(torch.device("cpu")) is None
