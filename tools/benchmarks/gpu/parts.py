"""What ``benchmark gpu`` does, the most important first: checks by name, and measurements as words of ``benchmark``."""

from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parents[3] / "recipes"
_FAST = ("train.precision=bf16", "train.compile=inductor")
_USABLE = 0.9  # of a GPU's memory; the rest is for its context and the allocator's gaps
_NETWORK = ("--network", "SiT-T/8", "--batch-size=1", "--rounds=1")  # of a rehearsal


@dataclass(frozen=True)
class Part:
    """A check, or a measurement.

    Attributes:
        words: of a measurement; ``BATCH`` in them is its batch. None: it is a check of ``checks.CHECKS``.
        tiny: the words of a rehearsal.
        batch_size: of a measurement.
        gb: of a GPU's memory that this batch needs, by ``benchmark memory``, in GB (10^9 bytes).
    """

    name: str
    words: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()
    batch_size: int = 0
    gb: float = 0.0

    def share(self, gpu_gb: float) -> float:
        """Of the batch that a GPU has memory for: 1, 1/2, 1/4 and so on, of one image at least."""
        share = 1.0
        while share * self.gb > _USABLE * gpu_gb and share * self.batch_size > 1:
            share /= 2
        return share

    def command(self, share: float, *, tiny: bool) -> list[str]:
        """The words of ``benchmark``, with this share of the batch."""
        size = str(max(1, int(share * self.batch_size)))
        return [word.replace("BATCH", size) for word in (self.tiny if tiny else self.words)]


def _tokenizer(recipe: str, *words: str, switch: str = "") -> tuple[str, ...]:
    """Steps of a tokenizer's recipe; with a switch, on against off."""
    settings = ("train.batch_size=BATCH", *words)
    sides = (f"{switch}=true", "--against", *settings, f"{switch}=false") if switch else ()
    file = str(RECIPES / "imagenet256" / recipe)
    return ("tokenizer", file, "--random", "--rounds=5", *settings, *sides)


def _dit(network: str, latents: str, *words: str) -> tuple[str, ...]:
    shape = ("--network", network, "--latents", latents)
    return ("dit", *shape, "--batch-size=BATCH", "--rounds=7", *_FAST, *words)


def _tiny_dit(latents: str, *words: str) -> tuple[str, ...]:
    return ("dit", "--latents", latents, *_NETWORK, *words)


def _reglue(network: str) -> tuple[str, ...]:
    return ("reglue", "--network", network, "--batch-size=BATCH", "--rounds=5", *_FAST)


_TINY_REGLUE = ("reglue", "--network", "SiT-T/2", "--batch-size=1", "--rounds=1")
_TINY_VAE = ("tokenizer", str(RECIPES / "vae.yaml"), "--rounds=1", "train.batch_size=2")
_SAMPLING = ("precision=bf16", "compile=inductor", "--against", "precision=tf32")
_TRICKS = ("tricks", "--network", "SiT-XL/2", "--batch-size=BATCH", "--precision", "bf16")
_NO_WAIT = ("train.precision=fp32", "--against", "train.precision=tf32")


def _switched(name: str) -> Part:
    words = _tokenizer("vae_f8d4.yaml", "method.adversarial.start_step=0", switch=f"train.{name}")
    sides = (f"train.{name}=true", "--against", "train.batch_size=2", f"train.{name}=false")
    return Part(name, words, (*_TINY_VAE, *sides), 32, 55)


PARTS = (
    Part("synchronisation"),
    Part("precision"),
    Part("compile"),
    Part("memory"),
    Part("nccl"),
    Part("reglue SiT-B/2", _reglue("SiT-B/2"), _TINY_REGLUE, 256, 65),
    Part("dit SiT-XL/2", _dit("SiT-XL/2", "sit"), _tiny_dit("sit"), 256, 112),
    Part(
        "tokenizer send_vae",
        _tokenizer("send_vae.yaml", "method.vae=f16d32", "train.accumulate=1"),
        ("tokenizer", str(RECIPES / "send_vae.yaml"), "--rounds=1", "train.batch_size=2"),
        32,
        55,
    ),
    Part(
        "tokenizer reglue",
        _tokenizer("reglue.yaml", "train.accumulate=1"),
        ("tokenizer", str(RECIPES / "reglue.yaml"), "--rounds=1", "train.batch_size=2"),
        256,
        8,
    ),
    Part(
        "sampling SiT-XL/2",
        ("sampling", "--network", "SiT-XL/2", "--batch-size=BATCH", "--rounds=3", *_SAMPLING),
        ("sampling", *_NETWORK, "sampler.steps=2"),
        64,
        15,
    ),
    Part("transfer"),
    Part("pipeline"),
    Part(
        "dit SiT-B/2 reglue",
        _dit("SiT-B/2", "reglue", "--against", "train.precision=bf16"),
        _tiny_dit("reglue", *_NO_WAIT),
        256,
        50,
    ),
    Part(
        "dit LightningDiT-XL/1",
        _dit("LightningDiT-XL/1", "lightningdit", "train.accumulate=2"),
        _tiny_dit("lightningdit"),
        256,
        90,
    ),
    Part("reglue SiT-XL/2", _reglue("SiT-XL/2"), _TINY_REGLUE, 128, 110),
    _switched("channels_last"),
    _switched("cudnn_benchmark"),
    Part(
        "tricks SiT-XL/2",
        _TRICKS,
        ("tricks", *_NETWORK, "--compiler", "aot_eager"),
        64,
        80,
    ),
    Part(
        "cache",
        ("cache", "--num-images=20000", "--num-encoded=1024"),
        ("cache", "--num-images=300", "--num-encoded=2"),
    ),
    Part(
        "cache with targets",
        ("cache", "--num-images=4000", "--num-encoded=1024", "--targets"),
        ("cache", "--num-images=300", "--num-encoded=2", "--targets"),
    ),
)
"""In the order in which they are done."""
