"""What a published file says of itself beside its weights: the arguments or the configuration of its training.

Every entry decides something, or must agree with the tensors, or says nothing of the network; an entry that asks for
what this library has not is refused by name. What became of each is noted, entries that nobody knows too.
"""

import re
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

import yaml

from semtok.errors import UserError
from semtok.hub.checkpoints import StandIn
from semtok.settings import flatten

Value = TypeVar("Value")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")

BOOKKEEPING = "says nothing of the network"
DIFFERS = "differs from the tensors, which were taken"
UNKNOWN = "unknown setting, not read"
ANOTHER_NETWORK = "one of the two is of another network; if the tensors are right, import them alone as safetensors"
_ENTRIES = ("args", "config")

# Names that only tell how a training was run: paths, logs, batches, optimisers, precision, what only REPA's or
# REPA-E's losses read. The weights mean the same whatever they are.
# fmt: off
ARGUMENTS_OF_RUNS = frozenset((
    "output_dir", "exp_name", "logging_dir", "report_to", "sampling_steps", "resume_step", "fused_attn",
    "ops_head", "data_dir", "batch_size", "allow_tf32", "mixed_precision", "epochs", "max_train_steps",
    "checkpointing_steps", "gradient_accumulation_steps", "learning_rate", "adam_beta1", "adam_beta2",
    "adam_weight_decay", "adam_epsilon", "max_grad_norm", "seed", "num_workers", "proj_coeff", "compile",
    "data_path", "results_dir", "global_batch_size", "global_seed", "log_every", "ckpt_every", "sample_every",
    "cfg_scale", "wandb", "ckpt", "norm_stats", "compression_model_path", "subset", "continue_train_exp_dir",
    "wandb_history_path", "bn_momentum", "vae_ckpt", "disc_pretrained_ckpt", "loss_cfg_path",
    "vae_learning_rate", "disc_learning_rate", "vae_align_proj_coeff", "dino_drop_prob", "cls_cfg_scale",
    "guidance_low", "guidance_high", "num_sample_steps", "projection_layer_type", "proj_kwargs_kernel_size",
    "projection_loss_type", "spnorm_method", "zscore_alpha",
))
# fmt: on
# fmt: off
CONFIG_OF_RUNS = frozenset((
    "ckpt_path", "data.data_path", "data.fid_reference_file", "data.num_workers", "train.max_steps",
    "train.global_batch_size", "train.global_seed", "train.output_dir", "train.exp_name", "train.ckpt",
    "train.log_every", "train.ckpt_every", "train.resume", "train.load_ckpt", "train.weight_init",
    "optimizer.lr", "optimizer.beta2", "optimizer.max_grad_norm", "model.use_checkpoint", "model.use_repa",
    "model.repa_dino_version", "model.repa_feat_depth", "model.repa_weight", "model.repa_mode",
    "sample.per_proc_batch_size", "sample.fid_num",
))
# fmt: on
SEMVAE_OF_RUNS = ("variables.", "data.", "training.")
"""Prefixes: all of it is bookkeeping."""


@dataclass
class FileSettings:
    """The settings in a file, flat: ``transport.path_type``. Whoever needs one takes it.

    Attributes:
        place: the file; starts every message.
        entry: under which they stand, ``args`` or ``config``; None: there are none.
        values: by name.
        fates: of those that were taken, what became of them.
        of_runs: names, or prefixes that end with a point, of bookkeeping.
    """

    place: str
    entry: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    of_runs: Collection[str] = ()
    fates: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    @property
    def has_network_config(self) -> bool:
        """Whether they are a configuration of LightningDiT's or SFD's training script."""
        return self.entry == "config" and any(n.startswith("transport.") for n in self.values)

    @overload
    def take(self, name: str, kind: type[Value], fate: str) -> Value | None: ...
    @overload
    def take(self, name: str, kind: type[Value], fate: str, default: Value) -> Value: ...
    def take(self, name: str, kind: type[Any], fate: str, default: Any | None = None) -> Any | None:
        """A setting, or the default where it is missing or None.

        Args:
            kind: what it must be; whole numbers are numbers too.
            fate: what becomes of it, for the import's table.

        Raises:
            UserError: it is of another kind.
        """
        value = self.values.get(name)
        if name in self.values:
            self.fates[name] = fate
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.refusal(name, f"expected {kind.__name__}")
        return value

    def check(
        self,
        name: str,
        own: Any,
        *,
        what: str = "its tensors say",
        tensors_decide: bool = False,
    ) -> None:
        """Raises UserError where a setting differs from what is there; where the tensors decide it is told of."""
        if name not in self.values:
            return
        self.fates[name] = "agrees with the tensors"
        value = self.values[name]
        if isinstance(value, bool) != isinstance(own, bool) or value != own:
            if tensors_decide:
                self.fates[name] = DIFFERS
                return
            raise self.refusal(name, f"{what} {own}; {ANOTHER_NETWORK}")

    def only(self, name: str, *admitted: Any, instead: str) -> None:
        """Raises UserError where a setting is another than the ones that this library has.

        Args:
            instead: what is possible, for the message.
        """
        if name not in self.values:
            return
        self.fates[name] = "as everything here is"
        value = self.values[name]
        same = [value == a and isinstance(value, bool) == isinstance(a, bool) for a in admitted]
        if not any(same):
            raise self.refusal(name, f"only {instead} can be imported")

    def one_of(
        self, name: str, options: Mapping[str, Value], fate: str, *, default: Value, instead: str
    ) -> Value:
        """What a word stands for, in any case of letters.

        Raises:
            UserError: none of the options; the message says what can be imported instead.
        """
        word = self.take(name, str, fate)
        if word is None:
            return default
        if word.lower() not in options:
            raise self.refusal(name, f"only {instead} can be imported")
        return options[word.lower()]

    def number(
        self, name: str, fate: str, *, default: float, least: float = 0.0, most: float = 1e6
    ) -> float:
        """A number within bounds.

        Raises:
            UserError: it is none, or not within them.
        """
        value = self.take(name, float, fate, default)
        if not least <= value <= most:
            raise self.refusal(name, f"expected a number between {least:g} and {most:g}")
        return value

    def refusal(self, name: str, reason: str) -> UserError:
        """The error that names a setting of this file."""
        return UserError(
            f"{self.place}: its {self.entry} says {name} {self.values.get(name)!r}; {reason}"
        )

    def became(self) -> dict[str, str]:
        """Of every setting, by its name in the file, what became of it."""

        def fate(name: str) -> str:
            if name in self.fates:
                return self.fates[name]
            runs = [n for n in self.of_runs if name == n or (n[-1] == "." and name.startswith(n))]
            return BOOKKEEPING if runs else UNKNOWN

        return {f"{self.entry}.{name}": fate(name) for name in self.values}


def read_settings(content: Any, place: str) -> FileSettings:
    """The settings in a file: a Namespace, OmegaConf's objects, plain dictionaries, or YAML text."""
    for entry in _ENTRIES:
        value = content.get(entry) if isinstance(content, Mapping) else None
        settings = plain(value)
        if isinstance(settings, str):
            try:
                settings = yaml.safe_load(settings)
            except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: of 2020-13-45
                settings = None
        if not isinstance(settings, dict) or not settings:
            continue
        if isinstance(value, str):
            runs: Collection[str] = SEMVAE_OF_RUNS
        else:
            runs = CONFIG_OF_RUNS if entry == "config" else ARGUMENTS_OF_RUNS
        flat = flatten(settings)
        return FileSettings(place, entry, {n: _resolved(v, flat) for n, v in flat.items()}, runs)
    return FileSettings(place)


def plain(value: Any) -> Any:
    """Without the classes around it: a Namespace is a dictionary, an OmegaConf node its value."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, StandIn):
        inner = vars(value)
        return plain(inner.get("_content", inner.get("_val")))
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def _resolved(value: Any, flat: Mapping[str, Any]) -> Any:
    """What ``${another.setting}`` stands for; of a reference to nothing, the words as they are."""
    for _ in range(8):  # a reference to a reference; never round in a circle
        whole = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if whole is None or whole[1] not in flat:
            break
        value = flat[whole[1]]
    return value
