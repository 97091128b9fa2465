"""The average of the weights follows its law, and a run keeps to it."""

import pytest
import torch
import yaml
from torch import nn

import tiny
from semtok import UserError
from semtok.commands.run_folder import RECIPE_FILE
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.recipe import parse_recipe
from semtok.settings import read_yaml
from semtok.training.ema import ModelEMA


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_by_hand(warmup):
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average, expected = ModelEMA(module, 0.5, warmup=warmup), 0.0
    for n, value in enumerate([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0]):
        nn.init.constant_(module.weight, value)
        average.update()
        decay = min(0.5, (1 + n) / (10 + n)) if warmup else 0.5
        expected = decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)


class Counting(nn.Module):
    """With a buffer of numbers and one of counts."""

    def __init__(self, averages_buffers: bool) -> None:
        super().__init__()
        self.averages_buffers = averages_buffers
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_buffers_are_copied_and_averaged_where_their_module_asks_for_it():
    module = nn.ModuleList([Counting(False), Counting(True)])
    average = ModelEMA(module, 0.75, warmup=False)
    for value in (1, 2):
        for each in module:
            each.mean.fill_(value)
            each.count.fill_(value)
        average.update()
    copied, averaged = average.module
    assert copied.mean.tolist() == [2, 2] and copied.count == averaged.count == 2
    assert averaged.mean.tolist() == [0.25 * 0.75 + 2 * 0.25] * 2
    average.restart()
    assert averaged.mean.tolist() == [2, 2]


def train(folder, *, resume: bool = False, **settings) -> None:
    content = tiny.content({"name": "vae"}, schedule="constant", **settings)
    train_tokenizer(parse_recipe(content, "tiny"), folder, resume=resume)


def test_a_run_averages_as_its_recipe_says_and_goes_on_so(tmp_path):
    settings = {"ema_warmup": False, "checkpoint_every": 1, "keep_last": 9, "steps": 2}
    train(tmp_path / "run", **settings)
    train(tmp_path / "run", resume=True, **settings | {"steps": 4})
    weights: list[torch.Tensor] = []
    for step in range(1, 5):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        tensors = tiny.tensors_of(folder)
        key = "encoder.conv_in.weight"
        average, own = tensors[f"ema.{key}"], tensors[f"learners.autoencoder.autoencoder.{key}"]
        if weights:
            torch.testing.assert_close(average, 0.9 * weights[-1] + 0.1 * own)
        weights.append(average)
    with pytest.raises(UserError, match="train.ema_warmup was False and is now True"):
        train(tmp_path / "run", resume=True, **settings | {"ema_warmup": True})


def test_an_average_that_is_not_there_can_not_be_said_to_warm_up():
    with pytest.raises(UserError, match="ema_warmup takes effect with train.ema_decay only"):
        parse_recipe(tiny.content(ema_warmup=False, ema_decay=None), "tiny")
    parse_recipe(tiny.content(ema_decay=None), "tiny")


def test_a_run_from_before_a_setting_was_there_goes_on_by_its_default(tmp_path):
    train(tmp_path / "run", steps=1, warmup_steps=0)
    file = tmp_path / "run" / RECIPE_FILE
    content = read_yaml(file)
    for name in ("ema_warmup", "export_at", "memory"):
        del content["train"][name]
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="train.ema_warmup was True and is now False"):
        train(tmp_path / "run", resume=True, steps=2, warmup_steps=0, ema_warmup=False)
    train(tmp_path / "run", resume=True, steps=2, warmup_steps=0)
