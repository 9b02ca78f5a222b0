import copy
import io

import torch
from torch import nn

from shardline.rows import RowsSeen


class Named(nn.Module):
    def forward(self, scale: float, *, x: torch.Tensor) -> torch.Tensor:
        return scale * x


def test_a_model_reports_the_rows_that_it_computes_gradients_for() -> None:
    model = Named()
    seen: list[int] = []
    rows = RowsSeen(model, seen.append)
    model(2.0, x=torch.ones(3, 2))
    with torch.no_grad():
        model(2.0, x=torch.ones(5, 2))
    rows.close()
    model(2.0, x=torch.ones(7, 2))
    assert seen == [3]


def test_a_copy_of_the_model_reports_nothing() -> None:
    model = nn.Linear(2, 1)
    seen: list[int] = []
    RowsSeen(model, seen.append)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for each in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        each(torch.ones(3, 2))
    assert seen == []
