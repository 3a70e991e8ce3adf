"""Batches of samples of one shape each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from tiedconv.data import Loader
from tiedconv.data.grouping import consecutive, even, numbered


def test_shapes_are_numbered_in_order_and_one_shape_has_no_groups() -> None:
    found = numbered([(3, 4), (3, 5), (3, 4)])
    assert found is not None
    assert found.tolist() == [0, 1, 0]
    assert numbered([(3, 4)] * 5) is None


@pytest.mark.parametrize("size", [1, 3, 50])
def test_each_batch_has_one_group_and_each_sample_comes_once(size: int) -> None:
    random = np.random.default_rng(0)
    groups = random.integers(3, size=20)
    order = random.permutation(20)
    for batches in (consecutive(order, size, groups), even(order, size, groups, random)):
        assert sorted(np.concatenate(batches).tolist()) == list(range(20))
        assert all(len(set(groups[batch])) == 1 for batch in batches)
        assert max(map(len, batches)) <= size


def test_without_groups_no_random_number_is_drawn() -> None:
    random = np.random.default_rng(0)
    even(np.arange(9), 2, None, random)
    assert random.integers(100) == np.random.default_rng(0).integers(100)


class Mixed(Dataset[Any]):
    """Images of three sizes, by turns."""

    groups = np.arange(14) % 3

    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> Any:
        return torch.full((1, 2 + index % 3, 2), float(index)), index


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_reads_groups_apart_whatever_shares_the_work(shuffle: bool) -> None:
    def read(**options: Any) -> list[list[int]]:
        loader = Loader(Mixed(), 3, shuffle=shuffle, workers=0, **options)
        found = [batch.labels.tolist() for batch in loader.epoch(2)]
        assert len(found) == len(loader)
        return found

    whole = read()
    assert sorted(label for batch in whole for label in batch) == list(range(14))
    assert all(len({label % 3 for label in batch}) == 1 for batch in whole)
    halves = [read(part=(rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    loader = Loader(Mixed(), 3, shuffle=shuffle, workers=0)
    sizes = [len(batch.images) for batch in loader.epoch(1)]
    assert sizes == [loader.size(i) for i in range(len(loader))]
