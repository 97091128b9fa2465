"""Token routing: which tokens the blocks between see, what becomes of them, and what sampling skips."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tiny
from semtok.diffusion.routing import RoutingConfig, kept_at_random, kept_of_cells
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.dit import DiT
from semtok.sampler.draws import Draws
from semtok.sampler.guidance import GuidanceConfig, guided_velocity
from semtok.sampler.latents import LatentSpec, PartSpec
from semtok.sampler.routing import Route
from semtok.sampler.sampling import velocity_function
from semtok.sampler.transport import Schedule

TEXTURE, GLOBAL = PartSpec("texture", 4, 8), PartSpec("global", 6, None)
SPEC = LatentSpec((TEXTURE, GLOBAL))
ROUTED = DiTArchitecture(
    depth=5,
    width=32,
    heads=2,
    rope=True,
    swiglu=True,
    rms_norm=True,
    qk_norm="rms",
    qk_norm_eps=1e-3,
    value_residual=True,
    split=(2, 1),
)
GRID = (4, 6)
LABELS = torch.tensor([0, 3, 1])


def built(shape: DiTArchitecture = ROUTED, spec: LatentSpec = SPEC) -> DiT:
    torch.manual_seed(0)
    network = tiny.awake(DiT(shape, spec, num_classes=3))
    for name, share in network.named_parameters():
        if name.endswith("first_share"):
            nn.init.uniform_(share, 0.2, 0.9)
    return network


def inputs(batch: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = {
        "texture": torch.randn(batch, 4, *GRID, generator=generator),
        "global": torch.randn(batch, 6, generator=generator),
    }
    return x, dict.fromkeys(x, torch.linspace(0.2, 0.8, batch))


def drawn(config: RoutingConfig, num: int = 3, step: int = 0, num_vectors: int = 1) -> Route:
    return config.route(tiny.draws(step, num), GRID, num_vectors, step)


# What the blocks are given, computed once more ----------------------------------------------------


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * gain


def turned(x: Tensor, place: int) -> Tensor:
    """One head's query or key (d,) of the token at a place; place 0 is the vector's."""
    d = len(x)
    row, column = divmod(place - 1, GRID[1]) if place else (0, 0)
    frequency = 10_000.0 ** (-torch.arange(d // 4) / (d / 4))
    angle = torch.cat([row * frequency, column * frequency])
    pairs = torch.view_as_complex(x.view(-1, 2)) * torch.polar(torch.ones(d // 2), angle)
    return torch.view_as_real(pairs).flatten()


def one_block(
    block: nn.Module, x: Tensor, c: Tensor, places: list[int], first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A block on one image's tokens (N, D) that stand at these places; also its values (N, D)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).chunk(6)
    attn, d = block.attn, x.shape[1] // 2
    q, k, v = attn.qkv(rms(x, block.norm1.weight, 1e-6) * (1 + scale1) + shift1).chunk(3, dim=1)
    mixed = v if first is None else attn.first_share * first + (1 - attn.first_share) * v
    heads = []
    for part in (slice(0, d), slice(d, 2 * d)):
        queries, keys = (
            torch.stack(
                [turned(rms(row, norm.weight, 1e-3), p) for row, p in zip(y, places, strict=True)]
            )
            for y, norm in ((q[:, part], attn.q_norm), (k[:, part], attn.k_norm))
        )
        heads.append((queries @ keys.T / d**0.5).softmax(dim=1) @ mixed[:, part])
    x = x + gate1 * attn.proj(torch.cat(heads, dim=1))
    gate, value = block.mlp.w12(rms(x, block.norm2.weight, 1e-6) * (1 + scale2) + shift2).chunk(
        2, dim=1
    )
    return x + gate2 * block.mlp.w3(F.silu(gate) * value), v


def image_by_image(network: DiT, x: dict, times: dict, kept: Tensor, dropped: Tensor) -> Tensor:
    """Tokens (B, N, D) after the last block: the first two blocks on all, two on the kept, the last on all."""
    embedded, _ = network._embed(x)
    conditions = F.silu(network._embed_times(times) + network.label_embed(LABELS))
    everywhere = list(range(embedded.shape[1]))
    done = []
    for tokens, c, own, is_dropped in zip(embedded, conditions, kept, dropped, strict=True):
        dense, first = one_block(network.blocks[0], tokens, c, everywhere, None)
        dense, _ = one_block(network.blocks[1], dense, c, everywhere, first)
        sparse = dense[own]
        for block in (network.blocks[2], network.blocks[3]):
            sparse, _ = one_block(block, sparse, c, own.tolist(), first[own])
        padded = network.fusion.mask_token.repeat(len(dense), 1)
        if not is_dropped:
            padded[own] = sparse
        fused = network.fusion.linear(torch.cat([dense, padded], dim=1))
        done.append(one_block(network.blocks[4], fused, c, everywhere, first)[0])
    return torch.stack(done)


@pytest.mark.parametrize("vectors", ["kept", "routed"])
def test_kept_tokens_keep_their_places_rotations_and_first_values(vectors):
    network, (x, times) = built(), inputs()
    route = drawn(RoutingConfig(vectors=vectors, path_drop=0.5))
    route = replace(route, dropped=torch.tensor([False, True, False]))
    output = network(x, times, LABELS, hidden_after=5, route=route)
    by_hand = image_by_image(network, x, times, route.kept, route.dropped)
    torch.testing.assert_close(output.hidden, by_hand, atol=1e-4, rtol=1e-4)


def test_tokens_between_are_those_that_are_kept():
    network, (x, times) = built(), inputs()
    route = drawn(RoutingConfig())
    hidden = network(x, times, LABELS, hidden_after=3, route=route).hidden
    assert hidden.shape == (3, 7, 32), "the vector, and a quarter of 24"
    everything = network(x, times, LABELS, hidden_after=3).hidden
    assert everything.shape == (3, 25, 32) and not torch.equal(everything[:, :7], hidden)


def test_all_tokens_in_any_order_are_as_without_routing():
    network, (x, times) = built(), inputs()
    kept = torch.stack(
        [torch.randperm(25, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    )
    dense = network(x, times, LABELS).velocity
    routed = network(x, times, LABELS, route=Route(kept)).velocity
    for name, part in dense.items():
        torch.testing.assert_close(routed[name], part, atol=1e-5, rtol=1e-5)


def test_every_weight_has_a_gradient_in_every_step():
    """Processes wait for all gradients, so a step that drops nothing has one of the mask token too."""
    network, (x, times) = built(), inputs()
    for config in (
        RoutingConfig(),
        RoutingConfig(drop=0.0, path_drop=0.0),
        RoutingConfig(path_drop=0.99),
    ):
        network.zero_grad()
        output = network(x, times, LABELS, route=drawn(config))
        sum(part.square().sum() for part in output.velocity.values()).backward()
        assert not [name for name, p in network.named_parameters() if p.grad is None], config
    assert network.fusion.mask_token.grad.any()


def test_what_is_not_finite_in_a_dropped_path_is_nobodys():
    network, (x, times) = built(), inputs()
    with torch.no_grad():
        network.blocks[2].mlp.w3.bias.fill_(float("inf"))
    route = Route(dropped=torch.tensor([True, True, True]))
    assert network(x, times, LABELS, route=route).velocity.texture.isfinite().all()


@pytest.mark.parametrize("value_residual", [False, True])
def test_checkpointing_changes_no_gradient_of_a_routed_network(value_residual):
    shape = ROUTED.model_copy(update={"value_residual": value_residual, "inner_head": 2})
    gradients = []
    for checkpointing in (False, True):
        network, (x, times) = built(shape), inputs()
        network.checkpointing = checkpointing
        output = network(x, times, LABELS, hidden_after=3, route=drawn(RoutingConfig()), inner=True)
        parts = [*output.velocity.values(), *output.inner.values(), output.hidden]
        sum(part.square().sum() for part in parts).backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_blocks_train_alike_over_a_change_of_the_share():
    config = RoutingConfig(drop={0: 0.75, 1: 0.0})
    losses = []
    for compiles in (False, True):
        network, (x, times) = (
            built(ROUTED.model_copy(update={"depth": 3, "split": (1, 1)})),
            inputs(),
        )
        if compiles:
            network.blocks[1].compile(backend="aot_eager", dynamic=False)
        optimiser, own = torch.optim.SGD(network.parameters(), 1e-2), []
        for step in range(2):
            route = drawn(config, step=step)
            assert (route.kept is None) == (step == 1)
            velocity = network(x, times, LABELS, route=route).velocity
            loss = sum(part.square().mean() for part in velocity.values())
            loss.backward()
            optimiser.step()
            own.append(loss.item())
        losses.append(own)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(set(losses[0])) == 2


# The law -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "drop", "kept"), [(257, 0.75, 64), (100, 0.9, 10), (3, 0.9, 1)])
def test_so_many_are_kept_at_random(count, drop, kept):
    numbers = torch.rand(5, count, generator=torch.Generator().manual_seed(0))
    places = kept_at_random(numbers, drop)
    assert places.shape == (5, kept)
    for own, row in zip(places, numbers, strict=True):
        assert len(set(own.tolist())) == kept and row[own].max() <= row.sort().values[kept - 1]


@pytest.mark.parametrize(("drop", "of_four"), [(0.25, 3), (0.5, 2), (0.75, 1)])
def test_equally_many_are_kept_of_each_two_by_two_cells(drop, of_four):
    numbers = torch.rand(64, 24, generator=torch.Generator().manual_seed(0))
    places = kept_of_cells(numbers, GRID, drop)
    rows, columns = places // 6, places % 6
    cells = F.one_hot(rows // 2 * 3 + columns // 2, 6).sum(dim=1)
    assert (cells == of_four).all()
    often = F.one_hot(places, 24).sum(dim=(0, 1)) / 64
    assert (often - (1 - drop)).abs().max() < 0.25, "each as often as another"


def test_vectors_are_kept_or_take_part():
    kept = drawn(RoutingConfig(), num=64, num_vectors=2).kept
    assert (kept[:, :2] == torch.tensor([0, 1])).all() and kept.shape == (64, 2 + 6)
    kept = drawn(RoutingConfig(vectors="routed"), num=64, num_vectors=2).kept
    assert kept.shape == (64, 6)
    assert 0.1 < (kept == 0).any(dim=1).float().mean() < 0.45
    kept = drawn(RoutingConfig(law="grid"), num=8, num_vectors=2).kept
    assert (kept[:, :2] == torch.tensor([0, 1])).all() and (kept[:, 2:] >= 2).all()


def test_shares_hold_from_their_steps_on():
    config = RoutingConfig(drop={0: 0.75, 5: 0.5, 9: 0.0})
    assert [config.drop_at(step) for step in (0, 4, 5, 8, 9, 100)] == [0.75, 0.75, 0.5, 0.5, 0, 0]
    assert drawn(config, step=4).kept.shape[1] == 7 and drawn(config, step=9).kept is None


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_paths_are_dropped_as_often_as_asked_however_a_batch_is_divided(per):
    config = RoutingConfig(path_drop=0.25, path_drop_per=per)
    often = []
    for step in range(200):
        whole = Draws(0, step, 24, 0, 24, torch.device("cpu"))
        route = config.route(whole, GRID, 1, step)
        parts = [
            config.route(replace(whole, first=i, num=6), GRID, 1, step) for i in (0, 6, 12, 18)
        ]
        assert torch.equal(route.dropped, torch.cat([part.dropped for part in parts]))
        assert torch.equal(route.kept, torch.cat([part.kept for part in parts]))
        often.append(route.dropped.float().mean().item())
    assert sum(often) / 200 == pytest.approx(0.25, abs=0.02 if per == "sample" else 0.08)
    assert (set(often) == {0.0, 1.0}) == (per == "batch")


def test_routes_differ_from_step_to_step_and_from_image_to_image():
    one, other = (drawn(RoutingConfig(), step=step).kept for step in (0, 1))
    assert not torch.equal(one, other) and not torch.equal(one[0], one[1])


# Sampling ----------------------------------------------------------------------------------------


def operations(network: DiT, *arguments, **options) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*arguments, **options)
    return counter.get_total_flops()


def test_samples_that_skip_blocks_are_as_with_a_dropped_path_for_fewer_operations():
    network, (x, times) = built(), inputs()
    skipped, dropped = Route(num_skipped=2), Route(dropped=torch.tensor([False, True, True]))
    ours, theirs = (network(x, times, LABELS, route=r).velocity for r in (skipped, dropped))
    for name, part in theirs.items():
        torch.testing.assert_close(ours[name], part, atol=1e-5, rtol=1e-5)
    every = network(x, times, LABELS, route=Route(num_skipped=3)).velocity
    torch.testing.assert_close(every.texture[1:], ours.texture[1:], atol=1e-5, rtol=1e-5)
    counts = [operations(network, x, times, LABELS, route=Route(num_skipped=n)) for n in range(4)]
    saved = {more - fewer for more, fewer in itertools.pairwise(counts)}
    assert len(saved) == 1 and saved.pop() > 0.3 * counts[0] / 3


def test_guidance_asks_for_a_dropped_path_only_where_it_is_on(monkeypatch):
    network, (x, _) = built().eval(), inputs()
    guidance = GuidanceConfig(scale={"texture": 2.0}, interval=(0.3, 0.6), base="dropped_path")
    asked, forward = [], DiT.forward

    def watched(self: DiT, x: dict, *arguments, route: Route, **options):
        asked.append((len(x["texture"]), route.num_skipped))
        return forward(self, x, *arguments, route=route, **options)

    monkeypatch.setattr(DiT, "forward", watched)
    schedule = Schedule.from_leads({"texture": 0.0, "global": 0.0})
    velocity = velocity_function(network, LABELS, schedule, guidance)
    with torch.no_grad():
        guided = {t: velocity(x, t, t) for t in (0.1, 0.5, 0.9)}
    assert asked == [(3, 0), (6, 3), (3, 0)]
    monkeypatch.undo()
    times = dict.fromkeys(x, torch.full((3,), 0.5))
    own = network(x, times, LABELS).velocity
    base = network(x, times, torch.full((3,), 3), route=Route(dropped=torch.ones(3) > 0)).velocity
    wanted = base.texture + 2 * (own.texture - base.texture)
    torch.testing.assert_close(guided[0.5]["texture"], wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(guided[0.5]["global"], own["global"], atol=1e-5, rtol=1e-4)


def test_the_second_head_guides_from_one_forward_with_the_class(monkeypatch):
    network, (x, times) = built(ROUTED.model_copy(update={"inner_head": 2})).eval(), inputs()
    output = network(x, times, LABELS, inner=True)
    sizes, forward = [], DiT.forward

    def watched(self: DiT, x: dict, *arguments, **options):
        sizes.append(len(x["texture"]))
        return forward(self, x, *arguments, **options)

    monkeypatch.setattr(DiT, "forward", watched)
    guided = guided_velocity(network, x, times, LABELS, {"texture": 1.78}, base="inner_head")
    assert sizes == [3]
    second, full = output.inner.texture, output.velocity.texture
    torch.testing.assert_close(guided["texture"], second + 1.78 * (full - second))
    # It reads the tokens after its block, whatever comes later.
    with torch.no_grad():
        network.blocks[3].mlp.w3.bias.add_(1.0)
    later = network(x, times, LABELS, inner=True)
    assert torch.equal(later.inner.texture, second)
    assert not torch.equal(later.velocity.texture, full)
