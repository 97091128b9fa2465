"""Devices and processes."""

import contextlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed import distributed_c10d

from semtok.errors import UserError
from semtok.processes import PATIENCE
from semtok.speed import Precision, allow_tf32, autocast_dtype
from semtok.training.accumulation import device_gb, micro_batches
from semtok.training.train_config import TrainConfig

PATIENCE_OF_JOINING = timedelta(minutes=10)
"""How long a process waits for the others to start, and to check what it has checked."""
TOLD_AFTER = 10.0
"""After how long it says that it waits."""

_HAS_MUON = hasattr(torch.optim, "Muon")

# What `accelerate launch` and its configuration file ask for by these variables, and the loop does not do.
_USES_FSDP = "ACCELERATE_USE_FSDP"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sharded parallelism",
}
# What it asks of FSDP, with the values that are as we do it, and what to do about others. Its further variables are
# of FSDP1 or of transformers' models alone.
_FSDP = {
    "FSDP_VERSION": (("2",), "pass --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": (("false",), "what is shared out stays on the GPUs"),
    "FSDP_RESHARD_AFTER_FORWARD": (
        ("true", "full_shard"),
        "blocks are shared out again after use; pass true",
    ),
    "FSDP_AUTO_WRAP_POLICY": (("transformer_based_wrap",), "blocks are shared out one by one"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (("block",), "they are of the class Block"),
    "FSDP_STATE_DICT_TYPE": (("sharded_state_dict",), "checkpoints are in parts"),
    "FSDP_FORWARD_PREFETCH": (("false",), "blocks are asked for in turn"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "pass diffusion.checkpointing=true"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "activations stay on the GPUs"),
    "FSDP_IGNORED_MODULES": ((), "all of a transformer is shared out"),
}


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")


def _check_fsdp(sharding: str) -> None:
    """Refuses what a launcher asks of FSDP where the recipe shares out nothing, or otherwise."""
    if not _is_set(_USES_FSDP):
        return
    if sharding != "fsdp2":
        raise UserError(
            f"{_USES_FSDP}: this recipe shares out no network; pass train.sharding=fsdp2 for a diffusion transformer, "
            "or launch by accelerate launch --multi_gpu or torchrun"
        )
    for variable, (agreed, way_out) in _FSDP.items():
        value = os.environ.get(variable, "")
        if value and value.lower() not in agreed:
            raise UserError(
                f"{variable}: {value} is not as train.sharding=fsdp2 does it: {way_out}; leave the option out, or "
                "launch by torchrun"
            )


@contextlib.contextmanager
def _without_fsdp_of_accelerate() -> Iterator[None]:
    """Within this context accelerate takes processes for what they are, and leaves it to ``Sharding`` to share out."""
    asked = os.environ.pop(_USES_FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[_USES_FSDP] = asked


def _check_launcher(precision: Precision | Literal["auto"], sharding: str) -> None:
    """Refuses what would share out the networks otherwise, or change the loss or the networks in silence."""
    _check_fsdp(sharding)
    for variable, name in _REFUSED.items():
        if _is_set(variable):
            raise UserError(
                f"{variable}: {name} is not supported; launch by accelerate launch --multi_gpu or torchrun, or leave "
                "it out in accelerate config; train.sharding=fsdp2 shares out diffusion transformers"
            )
    for variable, harmless, way_out in (
        (
            "GRADIENT_ACCUMULATION_STEPS",
            "1",
            "would divide the loss once more; pass train.accumulate={}",
        ),
        (
            "MIXED_PRECISION",
            "bf16" if precision == "bf16_matmul" else precision,
            f"is not train.precision, {precision}; pass train.precision={{}}",
        ),
        ("DYNAMO_BACKEND", "no", "would compile whole learners; pass train.compile={}"),
    ):
        value = os.environ.get(f"ACCELERATE_{variable}", "").lower()
        if value not in ("", "no", harmless):
            told = way_out.format(value)
            raise UserError(
                f"ACCELERATE_{variable}: {value} {told}, and leave the launcher's option out"
            )


def check_launch(config: TrainConfig) -> None:
    """Checks that this machine and the processes that a launcher has started can train so; joins no process.

    Raises:
        UserError: a precision or a tracker that this machine can't give, sizes that don't divide, or
            a launcher that asks for what the loop does not do (DeepSpeed and the like).
    """
    _check_launcher(config.precision, config.sharding)
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: fp16 needs a GPU; use fp32 or bf16 here")
    if config.optimiser is not None and config.optimiser.name == "muon" and not _HAS_MUON:
        raise UserError(
            f"train.optimiser.name: muon needs torch 2.9, and {torch.__version__} is installed; update torch, or "
            "use adamw"
        )
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise UserError(
            f"train.tracker: {config.tracker} is not installed; pip install {config.tracker}"
        )
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    gpu = None
    if torch.cuda.is_available():
        gpu = device_gb(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    micro_batches(config, num_processes, gpu)


def join_processes() -> None:
    """Meets the processes that a launcher has started; alone, or where they have met, it does nothing.

    Raises:
        UserError: the others did not come.
    """
    num, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    if num == 1 or dist.is_initialized():
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        return
    told = f"process {rank} of {num} (RANK, WORLD_SIZE): waiting for the others to start"
    teller = threading.Timer(TOLD_AFTER, print, [told], {"file": sys.stderr, "flush": True})
    teller.daemon = True
    teller.start()
    try:
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE_OF_JOINING)
    except dist.DistError:
        PartialState._reset_state()
        minutes = PATIENCE_OF_JOINING.total_seconds() / 60
        raise UserError(
            f"process {rank} of {num} (RANK, WORLD_SIZE): the others did not start within {minutes:g} minutes; see "
            "what they printed, and start all again"
        ) from None
    finally:
        teller.cancel()
    if dist.is_initialized():  # what follows may last longer
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        set_timeout(PATIENCE)
        distributed_c10d._get_default_store().set_timeout(PATIENCE)


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Devices and processes as the launcher set them up; one process on what there is otherwise.

    Raises:
        UserError: see ``check_launch``; or a precision that this machine can't give.
    """
    assert config.precision != "auto", "see precision.settled"
    check_launch(config)
    allow_tf32(config.precision)
    dtype = autocast_dtype(config.precision)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    # accelerate keeps one precision per process; a second run in this process may have another.
    AcceleratorState._reset_state()
    try:
        with _without_fsdp_of_accelerate():
            return Accelerator(
                cpu=not torch.cuda.is_available(),
                mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no"),
                log_with=None if config.tracker == "none" else config.tracker,
                project_dir=str(folder),
                kwargs_handlers=[
                    # Buffers are the same everywhere (see agreement.py); nothing needs broadcasting.
                    DistributedDataParallelKwargs(broadcast_buffers=False),
                    InitProcessGroupKwargs(timeout=PATIENCE),
                ],
            )
    except (ValueError, ImportError) as error:
        raise UserError(f"train: {error}") from None
