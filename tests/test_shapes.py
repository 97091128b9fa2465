"""The embedded data."""

import pytest
import torch
import torch.nn.functional as F

from semtok.data.images.shapes import ATTRIBUTES, Shapes, ShapesConfig, hash_uniform, render_scenes


def shapes(train: bool = True, **settings) -> Shapes:
    return Shapes(ShapesConfig(**({"size": 32, "num_images": 100} | settings)), train=train)


def test_an_image_is_the_same_alone_in_a_batch_and_in_any_order():
    source = shapes()
    together = source.load([5, 17, 3])
    for place, index in enumerate([5, 17, 3]):
        alone = source.load([index])
        assert torch.equal(alone.images[0], together.images[place])
        assert alone.labels[0] == together.labels[place]


def test_seeds_and_splits_give_other_scenes():
    one = shapes().load(range(20)).images
    assert not torch.equal(one, shapes(seed=1).load(range(20)).images)
    held_out = shapes(train=False).load(range(20)).images
    assert not (one[:, None] == held_out[None]).flatten(2).all(dim=2).any()


def test_every_category_occurs_about_equally_often_and_attributes_are_independent():
    attributes = shapes(num_images=9000).load(range(9000)).attributes
    for name, categories in ATTRIBUTES.items():
        counts = attributes[name].bincount(minlength=len(categories))
        assert (counts > 0.85 * 9000 / len(categories)).all(), name
    pairs = torch.stack([attributes[name].float() for name in ATTRIBUTES])
    correlations = torch.corrcoef(pairs) - torch.eye(len(pairs))
    assert correlations.abs().max() < 0.05


def test_labels_name_the_attributes_they_combine():
    source = shapes(classes=("shape", "ground"))
    assert source.num_classes == 24
    batch = source.load(range(50))
    for i in range(50):
        names = [ATTRIBUTES[a][batch.attributes[a][i]] for a in ("shape", "ground")]
        assert source.class_names[batch.labels[i]] == " ".join(names)


@pytest.mark.parametrize("size", [16, (32, 48), (40, 17)])
def test_any_size_is_rendered(size):
    source = shapes(size=size)
    batch = source.load(range(4))
    assert batch.images.shape[2:] == source.image_size
    assert batch.images.dtype == torch.uint8


def test_edges_are_anti_aliased():
    index = torch.arange(40)
    small, _ = render_scenes(index, seed=0, image_size=(32, 32))
    large, _ = render_scenes(index, seed=0, image_size=(128, 128))
    supersampled = F.avg_pool2d(large.float(), 4)
    difference = (small.float() - supersampled).abs().mean()
    nearest = (large[:, :, 2::4, 2::4].float() - supersampled).abs().mean()
    assert difference < 0.6 * nearest


def test_colours_are_what_the_labels_say():
    batch = shapes(num_images=12_000).load(range(12_000))
    a = batch.attributes
    chosen = (a["fill"] == 0) & (a["size"] == 2) & (a["position"] == 4) & (a["shape"] == 1)
    assert chosen.sum() > 5
    centre = batch.images[chosen][:, :, 16, 16].float()
    ground = batch.images[chosen][:, :, 0, 0].float()
    order = {"red": 0, "green": 1, "blue": 2}
    for name, channel in order.items():
        hue = ATTRIBUTES["hue"].index(name)
        rows = centre[a["hue"][chosen] == hue]
        assert (rows.argmax(dim=1) == channel).all()
        rows = ground[a["ground_hue"][chosen] == hue]
        assert (rows.argmax(dim=1) == channel).all()


def test_hashed_numbers_are_uniform_and_uncorrelated():
    u = hash_uniform(3, torch.arange(20_000), 4)
    assert u.min() >= 0 and u.max() < 1
    assert (u.mean(dim=0) - 0.5).abs().max() < 0.01
    assert (u.var(dim=0) - 1 / 12).abs().max() < 0.003
    neighbours = torch.corrcoef(torch.stack([u[:-1, 0], u[1:, 0], u[:-1, 1]]))
    assert (neighbours - torch.eye(3)).abs().max() < 0.03


def test_unknown_class_attributes_are_an_error():
    with pytest.raises(ValueError, match="data.classes"):
        shapes(classes=("colour",))


@pytest.mark.parametrize("classes", [(), ("shape", "colour"), ("Shape",)])
def test_class_settings_that_name_no_attributes_list_the_known_ones(classes):
    with pytest.raises(ValueError, match="data.classes.*choose from shape, hue"):
        shapes(classes=classes)


@pytest.mark.parametrize("train", [True, False])
def test_shuffling_and_batching_change_no_image_label_or_attribute(train):
    source = shapes(train, size=(17, 40), num_images=30, num_validation_images=30)
    in_order = source.load(range(30))
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(30, generator=generator)
        parts = [source.load(part.tolist()) for part in order.split(3 + 4 * seed)]
        assert torch.equal(torch.cat([p.images for p in parts]), in_order.images[order])
        assert torch.equal(torch.cat([p.labels for p in parts]), in_order.labels[order])
        for name in ATTRIBUTES:
            values = torch.cat([p.attributes[name] for p in parts])
            assert torch.equal(values, in_order.attributes[name][order]), name


def test_no_scene_of_the_training_set_is_held_out_nor_occurs_twice():
    settings = {"size": 8, "num_images": 300, "num_validation_images": 200}
    images = [shapes(train, **settings) for train in (True, False)]
    images = torch.cat([source.load(range(len(source))).images for source in images])
    assert len(images) == 500 and len(images.flatten(1).unique(dim=0)) == 500


def test_more_training_images_keep_those_that_were_there():
    few, many = (shapes(num_images=n).load(range(20)) for n in (20, 5000))
    assert torch.equal(few.images, many.images)


def test_other_seeds_share_no_scene():
    images = torch.cat([shapes(seed=seed, size=8).load(range(100)).images for seed in range(3)])
    assert len(images.flatten(1).unique(dim=0)) == 300


def bright_object(source: Shapes, num: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Where plain objects, which are brighter than any ground, lie: float (B, H, W)."""
    batch = source.load(range(num))
    plain = batch.attributes["fill"] == ATTRIBUTES["fill"].index("plain")
    mask = (batch.images[plain].amax(dim=1) > 0.75 * 255).float()
    return mask, {name: values[plain] for name, values in batch.attributes.items()}


@pytest.mark.parametrize("size", [32, (32, 48), (40, 17)])
def test_the_object_lies_where_its_position_says(size):
    mask, attributes = bright_object(shapes(size=size), 400)
    area = mask.sum(dim=(1, 2))
    assert (area > 0).all()
    for axis, part in ((1, 0), (2, 1)):
        places = torch.linspace(0, 1, mask.shape[axis])
        centre = (mask.sum(dim=3 - axis) * places).sum(dim=1) / area
        category = torch.stack(
            [attributes["position"] // 3, attributes["position"] % 3],
        )[part]
        lowest, highest = (
            torch.stack([f(centre[category == c]) for c in range(3)])
            for f in (torch.amin, torch.amax)
        )
        # An object's centroid may lie off its centre, so neighbours meet; ends are far apart.
        means = torch.stack([centre[category == c].mean() for c in range(3)])
        assert means[0] < 0.42 and abs(means[1] - 0.5) < 0.06 and means[2] > 0.58
        assert highest[0] < lowest[2]


def test_larger_objects_are_larger():
    mask, attributes = bright_object(shapes(), 1200)
    area = mask.sum(dim=(1, 2))
    for shape in range(len(ATTRIBUTES["shape"])):
        sizes = [
            area[(attributes["shape"] == shape) & (attributes["size"] == size)] for size in range(3)
        ]
        assert sizes[0].mean() < 0.8 * sizes[1].mean() < 0.64 * sizes[2].mean(), shape


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_images_that_are_not_square_do_not_stretch_their_objects(size):
    square, attributes = bright_object(shapes(), 400)
    other, _ = bright_object(shapes(size=size), 400)
    middle = attributes["position"] == 4
    ratio = other[middle].sum(dim=(1, 2)) / square[middle].sum(dim=(1, 2))
    assert middle.sum() > 5 and abs(ratio.mean() - 1) < 0.05


def test_a_small_scene_is_the_large_one_shrunk():
    index = torch.arange(200)
    small, _ = render_scenes(index, seed=3, image_size=(32, 32))
    large, _ = render_scenes(index, seed=3, image_size=(128, 128))
    difference = small.float() - F.avg_pool2d(large.float(), 4)
    assert difference.abs().mean() < 5 and difference.mean().abs() < 1
    shifted = small.roll(1, dims=-1).float() - F.avg_pool2d(large.float(), 4)
    assert difference.abs().mean() < 0.4 * shifted.abs().mean()
