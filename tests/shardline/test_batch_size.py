import pytest
import torch

from shardline.batch_size import num_left, num_rows


def test_rows_are_those_of_the_first_tensor() -> None:
    assert num_rows(["a", torch.tensor(1.0), torch.ones(3, 2), torch.ones(5)]) == 3
    assert num_rows([torch.tensor(1.0), "a"]) == num_rows([]) == 0


@pytest.mark.parametrize(
    ("batch", "left"),
    [
        (torch.ones(3, 2), 3),
        ([torch.ones(3, 2), torch.ones(3)], 3),
        ({"x": torch.ones(2, 4), "y": torch.ones(2), "names": ["a", "b"]}, 2),
        ([torch.ones(4, 2), torch.ones(4)], 4),
        ([torch.ones(8, 2), torch.ones(8)], 4),  # two views of each sample
        ([torch.ones(3, 4), torch.ones(3, 4)], 4),  # three time steps of four samples
        ([torch.ones(3, 4), torch.ones(12)], 4),
        ([torch.ones(1, 2)] * 4, 4),  # a list of samples
        ((["image"] * 3, ["label"] * 3), 4),
        (torch.tensor(2.0), 4),
        (torch.ones(0, 2), 4),
        ("text", 4),
    ],
)
def test_dropped_samples_show_where_all_tensors_are_shorter_than_the_batch(
    batch: object, left: int
) -> None:
    assert num_left(batch, 4) == left
