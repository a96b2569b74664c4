"""Any cut of any tensor, taken and put back."""

import json
import random

import pytest
import torch

from parallel.regions import Region, covers, even_range, whole

SHAPES = [(), (1,), (7,), (0,), (5, 3), (4, 0), (1, 6), (6, 1), (3, 4, 5), (2, 3, 2, 3)]


def tensor_of(shape, dtype=torch.float32):
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).reshape(shape)


def cuts_of(shape, dim, degree, packed):
    """One region for each process that a dimension is shared between; `packed` weights have each part cut."""
    blocks = [even_range(shape[dim], packed, block) for block in range(packed)]
    regions = []
    for index in range(degree):
        pairs = [(start, even_range(stop - start, degree, index)) for start, stop in blocks]
        regions.append(Region(shape, dim, tuple((start + a, start + b) for start, (a, b) in pairs)))
    return regions


def flats_of(region, degree):
    """Flat ranges of equal length, as ZeRO pads them; the last ones may be short or empty."""
    size = -(-region.numel // degree)
    starts = [min(index * size, region.numel) for index in range(degree)]
    return [region.flat(start, min(size, region.numel - start)) for start in starts]


def layouts_of(shape):
    """Many ways to share a tensor between processes."""
    uncut = Region(shape)
    layouts = [[uncut], *(flats_of(uncut, degree) for degree in (1, 2, 3, 5))]
    for dim in range(len(shape)):
        for degree in (1, 2, 3):
            for packed in (1, 2, 3):
                cuts = cuts_of(shape, dim, degree, packed)
                layouts.append(cuts)
                layouts += [[flat for cut in cuts for flat in flats_of(cut, data)] for data in (2, 4)]
    return layouts


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_parts_of_every_layout_make_the_whole_again(shape):
    expected = tensor_of(shape)
    for regions in layouts_of(shape):
        rebuilt = torch.zeros(shape)
        for region in random.Random(0).sample(regions, len(regions)):
            part = region.take(expected)
            assert part.shape == ((region.count,) if region.is_flat else region.cut_shape)
            assert part.numel() == region.numel
            region.put(rebuilt, part.clone())
        assert torch.equal(rebuilt, expected), regions
        assert covers(regions), regions


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_putting_a_part_changes_nothing_else(shape):
    for regions in layouts_of(shape):
        for region in regions:
            changed = tensor_of(shape)
            region.put(changed, -region.take(changed).clone())
            assert int((changed < 0).sum()) == region.numel
            assert torch.equal(region.take(changed), -region.take(tensor_of(shape)))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_a_layout_without_one_of_its_parts_does_not_cover_the_tensor(shape):
    for regions in layouts_of(shape):
        for missing in regions:
            if missing.numel:
                assert not covers([region for region in regions if region != missing]), (regions, missing)


def test_replicas_cover_no_more_than_one_of_them_does():
    first, second = cuts_of((4, 6), 1, 2, 1)
    assert not covers([first, first])
    assert covers([first, first, second])
    assert not covers([])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_region_survives_its_way_through_a_file(shape):
    for regions in layouts_of(shape):
        for region in regions:
            read = Region.from_json(json.loads(json.dumps(region.to_json())))
            assert read == region
            assert hash(read) == hash(region)


def test_equal_parts_are_equal_regions():
    assert Region((4, 6), 1, ((0, 6),)) == Region((4, 6)) == Region((4, 6), 1) == whole(torch.zeros(4, 6))
    assert Region((4, 6), 1, ((0, 3),)).flat(2, 5).cut_only == Region((4, 6), 1, ((0, 3),))


def test_packed_ranges_are_held_in_their_order():
    weight = tensor_of((6, 2))
    region = Region((6, 2), 0, ((2, 3), (4, 6)))
    assert region.take(weight).tolist() == [[5, 6], [9, 10], [11, 12]]
    assert region.flat(1, 3).take(weight).tolist() == [6, 9, 10]


@pytest.mark.parametrize(("length", "count"), [(10, 3), (2, 4), (0, 2), (12, 4)])
def test_even_ranges_follow_each_other_and_differ_by_one_at_most(length, count):
    ranges = [even_range(length, count, index) for index in range(count)]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == length
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1
