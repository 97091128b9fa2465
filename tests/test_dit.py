"""The diffusion transformer: sizes, parts, positions, and what training it relies on."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from semtok.sampler.architecture import PRESETS, DiTArchitecture, architecture
from semtok.sampler.dit import DiT
from semtok.sampler.embeddings import rotary_table, rotate, sincos_positions
from semtok.sampler.guidance import GuidanceConfig, guided_velocity
from semtok.sampler.latents import LatentSpec, PartSpec
from tiny import awake

TEXTURE = LatentSpec((PartSpec("texture", 4, 8),))
COMPOSITE = LatentSpec(
    (PartSpec("texture", 4, 8), PartSpec("semantic", 6, 8), PartSpec("global", 10, None))
)
SMALL = {
    "sit": DiTArchitecture(depth=2, width=32, heads=2, patch_size=2),
    "lightning": DiTArchitecture(
        depth=2, width=32, heads=2, swiglu=True, rope=True, rms_norm=True, qk_norm=True
    ),
}


def inputs(spec: LatentSpec, batch: int = 3, size: tuple[int, int] = (32, 48)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        part.name: torch.randn(batch, *spec.shape(part.name, size), generator=generator)
        for part in spec.parts
    }


def same_time(x: dict[str, Tensor], t: float = 0.3) -> dict[str, Tensor]:
    return {name: torch.full((len(part),), t) for name, part in x.items()}


# Published parameter counts in millions, of networks for 4x32x32 latents (SiT, table 1, DiT) and
# for 32x16x16 latents (LightningDiT-XL/1, its README).
@pytest.mark.parametrize(
    ("preset", "channels", "millions"),
    [
        ("SiT-S/2", 4, 33),
        ("SiT-B/2", 4, 130),
        ("SiT-L/2", 4, 458),
        ("SiT-XL/2", 4, 675),
        ("LightningDiT-XL/1", 32, 675),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, channels, millions):
    spec = LatentSpec((PartSpec("texture", channels, 8),))
    with torch.device("meta"):
        network = DiT(PRESETS[preset], spec, num_classes=1000)
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.011)


def test_all_published_sizes_are_presets():
    sizes = {"SiT": ["S", "B", "L", "XL"], "LightningDiT": ["S", "B", "L", "XL", "1p0B", "1p6B"]}
    assert all(f"SiT-{size}/{p}" in PRESETS for size in sizes["SiT"] for p in (1, 2, 4, 8))
    assert all(f"LightningDiT-{s}/{p}" in PRESETS for s in sizes["LightningDiT"] for p in (1, 2))
    with pytest.raises(
        ValueError, match=r"no preset 'SiT-B/3'; presets: .*SiT-B/2.*LightningDiT-XL/1"
    ):
        architecture("SiT-B/3")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("spec", [TEXTURE, COMPOSITE], ids=["texture", "composite"])
def test_every_part_gets_a_velocity_of_its_shape_on_any_grid(name, spec):
    network, x = awake(DiT(SMALL[name], spec, num_classes=5)), inputs(spec)
    labels = torch.tensor([0, 4, 5])
    output = network(x, same_time(x), labels, hidden_after=1)
    assert {n: part.shape for n, part in output.velocity.items()} == {
        n: p.shape for n, p in x.items()
    }
    num_patches = (32 // 8 // SMALL[name].patch_size) * (48 // 8 // SMALL[name].patch_size)
    assert output.hidden.shape == (3, num_patches + len(network.vectors), 32)
    # Each part is read and each is written: a change of one input reaches all outputs.
    for changed in x:
        other = network(x | {changed: x[changed] + 1}, same_time(x), labels).velocity
        for part in x:
            assert not torch.allclose(other[part], output.velocity[part], atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_a_fresh_network_predicts_zero_and_its_blocks_change_nothing(name):
    network, x = DiT(SMALL[name], COMPOSITE, num_classes=5), inputs(COMPOSITE)
    labels = torch.zeros(3, dtype=torch.int64)
    first, last = (network(x, same_time(x), labels, hidden_after=k) for k in (1, 2))
    assert not any(part.any() for part in first.velocity.values())
    assert torch.equal(first.hidden, last.hidden)


def test_patches_go_back_to_where_they_came_from():
    """With an identity in place of the blocks a patch's output depends on that patch alone."""
    network = awake(
        DiT(DiTArchitecture(depth=1, width=32, heads=2, patch_size=2), TEXTURE, num_classes=1)
    )
    network.blocks = torch.nn.ModuleList()
    x = inputs(TEXTURE, 1)
    labels = torch.zeros(1, dtype=torch.int64)
    before = network(x, same_time(x), labels).velocity.texture
    x["texture"][0, :, 2:4, 4:6] += 1  # the patch in row 1, column 2
    changed = (network(x, same_time(x), labels).velocity.texture != before).any(dim=1)[0]
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(changed, expected)


def test_a_time_of_its_own_reaches_the_network_only_where_parts_are_timed():
    labels, x = torch.zeros(3, dtype=torch.int64), inputs(COMPOSITE)
    times = same_time(x)
    moved = times | {"semantic": times["semantic"] + 0.4}
    together = awake(DiT(SMALL["sit"], COMPOSITE, num_classes=1))
    assert torch.equal(
        together(x, times, labels).velocity.texture, together(x, moved, labels).velocity.texture
    )
    apart = awake(DiT(SMALL["sit"], COMPOSITE, num_classes=1, timed_parts=("semantic", "texture")))
    assert not torch.allclose(
        apart(x, times, labels).velocity.texture, apart(x, moved, labels).velocity.texture
    )


def test_rotary_attention_sees_only_distances():
    """Scores of rotated queries and keys are the same for any two cells equally far apart."""
    cos, sin = rotary_table((5, 7), 16, 2, torch.device("cpu"))
    assert cos.shape == (2 + 35, 16) and (cos[:2] == 1).all() and not sin[:2].any()

    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 16, generator=generator)
    turned = lambda v, cell: rotate(v, cos[2 + cell], sin[2 + cell])  # noqa: E731
    score = lambda a, b: turned(query, a) @ turned(key, b)  # noqa: E731
    cell = lambda row, column: row * 7 + column  # noqa: E731
    torch.testing.assert_close(
        score(cell(0, 0), cell(2, 3)), score(cell(1, 2), cell(3, 5)), atol=1e-5, rtol=0
    )
    assert not torch.isclose(
        score(cell(0, 0), cell(2, 3)), score(cell(0, 0), cell(3, 2)), atol=1e-3
    )
    assert torch.allclose(turned(query, 12).norm(), query.norm())


def test_checkpointing_changes_memory_and_no_gradient():
    x, labels = inputs(COMPOSITE), torch.zeros(3, dtype=torch.int64)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = awake(DiT(SMALL["lightning"], COMPOSITE, num_classes=1))
        network.checkpointing = checkpointing
        loss = sum(p.square().sum() for p in network(x, same_time(x), labels).velocity.values())
        loss.backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_tokens_after_a_block_are_had_without_what_follows(monkeypatch):
    shape = DiTArchitecture(depth=4, width=32, heads=2, value_residual=True, split=(1, 1))
    network = awake(DiT(shape, TEXTURE, num_classes=3))
    x = {"texture": torch.randn(2, 4, 4, 4)}
    times, labels = {"texture": torch.rand(2)}, torch.tensor([0, 3])
    whole = network(x, times, labels, hidden_after=2).hidden
    called = []
    for number, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    assert torch.equal(network.hidden(x, times, labels, after=2), whole)
    assert called == [0, 1]


def test_norms_compute_in_the_type_of_their_input():
    """A gain of another type keeps kernels from being fused, and makes queries float32 in half precision."""
    attention = DiT(SMALL["lightning"], COMPOSITE, num_classes=1).blocks[0].attn
    torch.nn.init.normal_(attention.q_norm.weight)
    heads = torch.randn(2, 2, 5, 16)
    expected = torch.nn.functional.rms_norm(heads, (16,), attention.q_norm.weight, 1e-6)
    assert torch.equal(attention.q_norm(heads), expected)
    seen = []
    attention.k_norm.register_forward_hook(lambda module, given, made: seen.append(made.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):
            attention(torch.randn(2, 5, 32), None)
    assert seen == [torch.bfloat16]
    half = attention.q_norm(heads.bfloat16())
    torch.testing.assert_close(half.float(), expected, atol=0.03, rtol=0.03)
    names = set(DiT(SMALL["lightning"], TEXTURE, num_classes=1).blocks[0].state_dict())
    assert {"norm1.weight", "norm2.weight", "attn.q_norm.weight", "attn.k_norm.weight"} <= names


@pytest.mark.parametrize("name", SMALL)
def test_blocks_compile_as_one_graph(name):
    network, x = awake(DiT(SMALL[name], COMPOSITE, num_classes=1)), inputs(COMPOSITE)
    labels = torch.zeros(3, dtype=torch.int64)
    expected = network(x, same_time(x), labels).velocity.texture
    for block in network.blocks:
        block.compile(backend="eager", fullgraph=True)  # a graph break is an error
    torch.testing.assert_close(network(x, same_time(x), labels).velocity.texture, expected)


def test_sampling_in_inference_mode_leaves_training_as_it_was():
    """Position tables are kept from one call to the next, whatever mode the first was in."""
    network, size = awake(DiT(SMALL["lightning"], COMPOSITE, num_classes=1)), (8, 104)
    x, labels = inputs(COMPOSITE, size=size), torch.zeros(3, dtype=torch.int64)
    with torch.inference_mode():
        sampled = network(x, same_time(x), labels).velocity
    trained = network(x, same_time(x), labels).velocity
    sum(part.sum() for part in trained.values()).backward()
    assert all(torch.equal(sampled[name], part) for name, part in trained.items())


def test_tensors_without_contents_are_not_kept():
    x, labels = inputs(COMPOSITE, size=(8, 112)), torch.zeros(3, dtype=torch.int64)
    network = awake(DiT(SMALL["lightning"], COMPOSITE, num_classes=1))

    def without_contents() -> None:
        with FakeTensorMode():
            fake = DiT(SMALL["lightning"], COMPOSITE, num_classes=1)
            own = {name: torch.empty(part.shape) for name, part in x.items()}
            output = fake(own, same_time(own), torch.zeros(3, dtype=torch.int64)).velocity
        assert output.texture.shape == x["texture"].shape

    without_contents()
    assert network(x, same_time(x), labels).velocity.texture.isfinite().all()
    without_contents()  # nor are those with contents of use there


def test_tables_are_made_once_and_on_the_host_whatever_the_default_device_is():
    first = rotary_table((3, 29), 16, 1, torch.device("cpu"))
    with torch.device("meta"):
        assert sincos_positions((3, 31), 8).device.type == "cpu"
        assert rotary_table((3, 29), 16, 1, torch.device("cpu"))[0] is first[0]


def test_a_whole_network_compiles_as_one_graph_without_a_warning(recwarn):
    network, x = awake(DiT(SMALL["lightning"], COMPOSITE, num_classes=1)), inputs(COMPOSITE)
    labels = torch.zeros(3, dtype=torch.int64)
    expected = network(x, same_time(x), labels).velocity.texture
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, same_time(x), labels).velocity.texture, expected)
    assert not [str(w.message) for w in recwarn if "cache" in str(w.message)]


# Guidance ----------------------------------------------------------------------------------------


@pytest.fixture
def guided() -> tuple[DiT, dict[str, Tensor], Tensor]:
    return (
        awake(DiT(SMALL["sit"], COMPOSITE, num_classes=5)).eval(),
        inputs(COMPOSITE),
        torch.tensor([0, 1, 2]),
    )


def test_a_scale_of_one_is_one_forward_without_guidance(guided, monkeypatch):
    network, x, labels = guided
    calls = []
    original = DiT.forward
    monkeypatch.setattr(
        DiT,
        "forward",
        lambda self, x, *a, **k: calls.append(len(x["texture"])) or original(self, x, *a, **k),
    )
    scales = GuidanceConfig(scale=1.0).active({"texture": 0.5, "semantic": 0.5, "global": 0.5})
    ours = guided_velocity(network, x, same_time(x), labels, scales)
    assert calls == [3]
    plain = network(x, same_time(x), labels).velocity
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_guidance_is_by_part_by_interval_and_by_channel(guided):
    network, x, labels = guided
    config = GuidanceConfig(
        scale={"texture": 3.0, "global": 0.5}, interval=(0.2, 0.6), num_channels=3
    )
    assert config.active({"texture": 0.7, "semantic": 0.4, "global": 0.2}) == {"global": 0.5}
    assert config.active({"texture": 1.3, "semantic": 0.1, "global": 0.1}) == {}
    scales = config.active({"texture": 0.4, "semantic": 0.4, "global": 0.4})
    assert scales == {"texture": 3.0, "global": 0.5}
    ours = guided_velocity(network, x, same_time(x), labels, scales, num_channels=3)
    conditional = network(x, same_time(x), labels).velocity
    null = network(x, same_time(x), torch.full((3,), 5)).velocity
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(
        ours["texture"][:, :3],
        (null.texture + 3 * (conditional.texture - null.texture))[:, :3],
        **close,
    )
    torch.testing.assert_close(ours["texture"][:, 3:], conditional.texture[:, 3:], **close)
    torch.testing.assert_close(ours["semantic"], conditional["semantic"], **close)
    torch.testing.assert_close(
        ours["global"], (null["global"] + conditional["global"]) / 2, **close
    )


def test_autoguidance_moves_away_from_the_weak_network(guided):
    network, x, labels = guided
    torch.manual_seed(3)
    weak = awake(DiT(SMALL["lightning"], COMPOSITE, num_classes=5)).eval()
    ours = guided_velocity(network, x, same_time(x), labels, {"texture": 1.5}, weak=weak)["texture"]
    main, other = (n(x, same_time(x), labels).velocity.texture for n in (network, weak))
    torch.testing.assert_close(ours, other + 1.5 * (main - other))


def test_on_a_cpu_attention_is_computed_in_float32_under_autocast_too(monkeypatch):
    network, x = awake(DiT(SMALL["lightning"], COMPOSITE, num_classes=5)), inputs(COMPOSITE)
    attend, seen = F.scaled_dot_product_attention, []

    def see(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append({each.dtype for each in (q, k, v)})
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", see)
    product = torch.bfloat16
    network.blocks[0].attn.proj.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].dtype)
    )
    with torch.autocast("cpu", dtype=product):
        network(x, same_time(x), torch.tensor([0, 1, 5]))
    assert seen == [{torch.float32}, product, {torch.float32}]
