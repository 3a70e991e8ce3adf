"""The pieces of examples/adamixer, against values worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from adamixer import boxes, losses, photos, sampling
from adamixer.decoder import Attention, position_encoding
from adamixer.mixing import Generator, Mixing
from adamixer_helpers import SETTING, tiny_objects
from torch import Tensor, nn

# Boxes


def test_xyzr_is_centre_size_and_aspect() -> None:
    # 32 wide and 8 high: the geometric mean is 16 = 2^4, the aspect ratio 8/32 = 2^-2.
    corners = torch.tensor([10.0, 20.0, 42.0, 28.0])
    xyzr = boxes.xyzr_of(corners)
    assert xyzr.tolist() == [26.0, 24.0, 4.0, -2.0]
    torch.testing.assert_close(boxes.corners_of(xyzr), corners)
    torch.testing.assert_close(boxes.size_of(xyzr), torch.tensor([32.0, 8.0]))


def test_refine_moves_by_the_size_of_the_box() -> None:
    moved = boxes.refine(torch.tensor([26.0, 24, 4, -2]), torch.tensor([0.5, -1, 1, 0.5]))
    assert moved.tolist() == [34.0, 8.0, 5.0, -1.5]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1.0),
        # Overlap 1, union 7, hull 9: 1/7 - 2/9.
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7 - 2 / 9),
        # Apart: union 2, hull 3 x 1.
        ([0, 0, 1, 1], [2, 0, 3, 1], -1 / 3),
        # One inside the other: the hull is the union.
        ([0, 0, 4, 4], [1, 1, 3, 3], 4 / 16),
    ],
)
def test_giou_by_hand(a: list[float], b: list[float], expected: float) -> None:
    found = boxes.giou(torch.tensor(a).float(), torch.tensor(b).float())
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_iof_is_the_fraction_of_the_first() -> None:
    found = boxes.iof(torch.tensor([[0.0, 0, 4, 4], [2, 0, 4, 2], [9, 9, 10, 10]]))
    expected = torch.tensor([[1, 4 / 16, 0], [1, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(found, expected)


# Sampling


def ramps(stride: int, size: int = 32) -> Tensor:
    """A map whose two channels are the x and y of each cell's centre, in pixels."""
    centres = (torch.arange(size // stride) + 0.5) * stride
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y])[None]


def test_sampling_a_ramp_gives_the_coordinates() -> None:
    points = torch.tensor([[10.0, 14.0], [6.5, 20.25]]).view(1, 1, 1, 2, 2)
    found = sampling.sample_map(ramps(4), points, 4)
    torch.testing.assert_close(found, points)


def test_groups_read_their_own_channels() -> None:
    points = torch.tensor([[9.0, 13.0], [5.0, 7.0]]).view(1, 1, 2, 1, 2)
    found = sampling.sample_map(ramps(4), points, 4)
    assert found.flatten().tolist() == [9.0, 7.0]  # group 0 holds x, group 1 holds y


def test_outside_of_the_image_is_zero() -> None:
    points = torch.tensor([[-40.0, 8.0], [8.0, 300.0]]).view(1, 1, 1, 2, 2)
    assert not sampling.sample_map(ramps(4), points, 4).any()


def test_level_weights_by_hand() -> None:
    # At the height of stride 8, the distances to 4, 8, 16, 32 are 1, 0, 1, 2: exp(-d^2 / 2).
    raw = torch.tensor([math.exp(-0.5), 1, math.exp(-0.5), math.exp(-2)])
    found = sampling.level_weights(torch.tensor([3.0]), (4, 8, 16, 32))[0]
    torch.testing.assert_close(found, raw / raw.sum())


def test_all_levels_agree_on_a_ramp() -> None:
    points = torch.tensor([16.0, 16.0, 3.3]).view(1, 1, 1, 1, 3)
    found = sampling.sample_3d([ramps(s) for s in (4, 8)], points, (4, 8))
    torch.testing.assert_close(found.flatten(), torch.tensor([16.0, 16.0]))


def test_points_move_and_grow_with_the_box() -> None:
    sampler = sampling.Sampler(SETTING)
    sampler.reset()
    nn.init.normal_(sampler.offsets.weight)
    content = torch.randn(1, 1, SETTING.width)
    box = torch.tensor([[[30.0, 20.0, 4.0, 0.5]]])
    here = sampler.points(content, box)
    moved = sampler.points(content, box + torch.tensor([8.0, -4.0, 0, 0]))
    torch.testing.assert_close(moved, here + torch.tensor([8.0, -4.0, 0]))
    larger = sampler.points(content, box + torch.tensor([0, 0, 1.0, 0]))
    centre = torch.tensor([30.0, 20.0])
    torch.testing.assert_close(larger[..., :2] - centre, 2 * (here[..., :2] - centre))
    torch.testing.assert_close(larger[..., 2], here[..., 2] + 1)


def test_scaling_image_and_box_by_two_samples_the_same_one_level_up() -> None:
    maps = [torch.randn(1, 4, 8, 8), torch.randn(1, 4, 4, 4)]
    points = torch.rand(1, 3, 2, 5, 3) * torch.tensor([32.0, 32.0, 2]) + torch.tensor([0, 0, 2])
    twice = torch.cat([2 * points[..., :2], points[..., 2:] + 1], -1)
    torch.testing.assert_close(
        sampling.sample_3d(maps, points, (4, 8)), sampling.sample_3d(maps, twice, (8, 16))
    )


# Attention and mixing


def test_a_query_does_not_see_boxes_apart_from_its_own() -> None:
    attention = Attention(16, 2)
    nn.init.constant_(attention.alpha, 4.0)
    content = torch.randn(1, 2, 16)
    xyzr = boxes.xyzr_of(torch.tensor([[[0.0, 0, 8, 8], [20, 20, 28, 28]]]))
    before = attention(content, xyzr)[:, 0]
    content[:, 1] += 1
    torch.testing.assert_close(attention(content, xyzr)[:, 0], before)
    near = boxes.xyzr_of(torch.tensor([[[0.0, 0, 8, 8], [4, 4, 12, 12]]]))
    assert not torch.allclose(attention(content, near)[:, 0], before)


def test_position_encoding_tells_boxes_apart() -> None:
    found = position_encoding(torch.tensor([[100.0, 50, 5, 0], [300.0, 50, 5, 0]]), 16)
    assert found.shape == (2, 16)
    assert (found[0] - found[1])[:4].abs().max() > 0.1
    assert not (found[0] - found[1])[4:].any()


def test_a_generator_is_a_linear_with_its_bias_as_last_column() -> None:
    generator = Generator(5, groups=2, out=3, inputs=4)
    usual = nn.Linear(5, 24)
    with torch.no_grad():
        generator.linear.weight.copy_(torch.cat([usual.weight, usual.bias[:, None]], 1))
    q = torch.randn(7, 5)
    torch.testing.assert_close(generator(q), usual(q).view(7, 2, 3, 4))


def test_mixing_by_loops() -> None:
    mixing = Mixing(SETTING)
    for parameter in mixing.parameters():
        nn.init.normal_(parameter)
    content, x = torch.randn(1, 1, 16), torch.randn(1, 1, 2, 4, 8)
    parts = []
    for group in range(2):
        channel = mixing.channel_generator(content)[0, 0, group]
        spatial = mixing.spatial_generator(content)[0, 0, group]
        mixed = torch.stack([channel @ row for row in x[0, 0, group]])
        mixed = ((mixed - mixed.mean()) / mixed.std(unbiased=False)).clamp(min=0)
        mixed = spatial @ mixed
        parts.append(((mixed - mixed.mean()) / mixed.std(unbiased=False)).clamp(min=0).flatten())
    expected = content + mixing.projection(torch.cat(parts))
    torch.testing.assert_close(mixing(x, content), expected, atol=1e-3, rtol=1e-3)


# Matching and loss


def test_each_object_gets_the_query_that_fits_it() -> None:
    objects = tiny_objects()[0]
    answers = torch.cat([objects.boxes.flip(0) + 1, torch.tensor([[0.0, 0, 5, 5]])])
    queries, found = losses.match(torch.zeros(3, 3), answers, objects)
    assert dict(zip(queries.tolist(), found.tolist(), strict=True)) == {0: 1, 1: 0}


def test_of_equal_boxes_the_class_decides() -> None:
    objects = tiny_objects()[1]  # one object, of class 1
    logits = torch.tensor([[3.0, -3, -3], [-3, 3, -3], [-3, -3, -3]])
    queries, _ = losses.match(logits, objects.boxes.expand(3, 4), objects)
    assert queries.tolist() == [1]


def test_one_query_for_an_object_even_where_another_is_as_good() -> None:
    # Greedy choice would give query 0 to the first object and a bad one to the second.
    box = torch.tensor([[10.0, 10, 20, 20], [12, 10, 22, 20]])
    objects = losses.Objects(torch.tensor([0, 0]), box, (64, 64))
    answers = torch.tensor([[11.0, 10, 21, 20], [9.0, 10, 19, 20], [40, 40, 60, 60]])
    queries, found = losses.match(torch.zeros(3, 1), answers, objects)
    assert dict(zip(queries.tolist(), found.tolist(), strict=True)) == {0: 1, 1: 0}


def test_focal_loss_by_hand() -> None:
    logits = torch.tensor([0.0, math.log(3)])  # probabilities 1/2 and 3/4
    found = losses.focal_loss(logits, torch.tensor([1.0, 0.0]))
    assert found.item() == pytest.approx(
        0.25 * 0.25 * math.log(2) + 0.75 * (9 / 16) * math.log(4), abs=1e-6
    )


def test_class_cost_is_the_change_of_the_focal_loss() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([2, 0])
    found = losses.class_cost(logits, labels)
    for q in range(4):
        for j, label in enumerate(labels):
            target = torch.zeros(3)
            target[label] = 1
            change = losses.focal_loss(logits[q], target)
            change -= losses.focal_loss(logits[q], torch.zeros(3))
            torch.testing.assert_close(found[q, j], change)


def test_a_perfect_answer_costs_nothing_but_classes() -> None:
    objects = tiny_objects()[0]
    logits = torch.full((3, 3), -20.0)
    logits[0, 0] = logits[1, 2] = 20.0
    answers = torch.cat([objects.boxes, torch.zeros(1, 4)])
    assert losses.image_loss(logits, answers, objects).item() == pytest.approx(0, abs=1e-4)


def test_images_without_objects_have_a_loss() -> None:
    empty = losses.Objects(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), (64, 64))
    logits = torch.zeros(1, 1, 3, 3, requires_grad=True)
    loss = losses.set_loss(logits, torch.rand(1, 1, 3, 4), [empty])
    loss.backward()
    assert loss.item() == pytest.approx(2 * 9 * 0.75 * 0.25 * math.log(2), rel=1e-5)


# Photos


def test_average_precision_of_known_answers() -> None:
    pytest.importorskip("pycocotools")
    objects = tiny_objects()
    some = [photos.Photo(i, torch.zeros(3, 64, 64), o) for i, o in enumerate(objects, 1)]
    logits, answers = torch.full((2, 4, 3), -9.0), torch.zeros(2, 4, 4)
    answers[..., 2:] = 1.0
    for i, wanted in enumerate(objects):
        for j, (label, box) in enumerate(zip(wanted.labels, wanted.boxes, strict=True)):
            logits[i, j, label], answers[i, j] = 9.0, box
    assert photos.average_precision(some, logits, answers) == pytest.approx((1, 1))
    answers[0, 0] += 20  # of three classes, one is missed
    assert photos.average_precision(some, logits, answers)[1] == pytest.approx(2 / 3, abs=0.01)


def test_photos_are_scaled_and_chosen(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (80, 40), (124, 116, 104)).save(tmp_path / "a.png")
    box = [8, 4, 40, 20]
    entries = [{"id": i, "file_name": "a.png", "width": 80, "height": 40} for i in (7, 3, 5)]
    annotations = [
        {"image_id": i, "category_id": 1, "bbox": b}
        for i, b in ((7, box), (7, box), (3, box), (5, box), (5, [0, 0, 2, 9]))
    ]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({"images": entries, "annotations": annotations}))
    (only,) = photos.load_photos(tmp_path, file, 1, size=160)  # 3 has one object, 5 a small one
    assert only.number == 7
    assert only.image.shape == (3, 160, 160)
    assert only.image[:, :80].abs().max() < 0.02  # the colour is ImageNet's mean
    assert only.objects.boxes[0].tolist() == [16, 8, 96, 48]
    with pytest.raises(ValueError, match="1 such photos, not 2"):
        photos.load_photos(tmp_path, file, 2)
