import torch
from torch import nn

from pipeline.boundaries import Boundary
from pipeline.forward import forward
from tests.pipeline.worker import Place, run

CPU = torch.device("cpu")


def _model() -> list[nn.Module]:
    torch.manual_seed(5)
    return [nn.Linear(3, 3).double() for _ in range(6)]


def go_through_all_stages(place: Place) -> None:
    group = place.connect()
    model = _model()
    inputs = torch.randn(11, 3, dtype=torch.float64)
    boundaries = [Boundary((4, 3), torch.float64)] * 7
    shapes = {
        "loop": [0, 1, 2, 0, 1, 2],
        "V": [0, 1, 2, 2, 1, 0],
        "blocks": [0, 0, 1, 1, 2, 2],
        "back and forth": [0, 1, 0, 2, 0, 1],
    }
    for workers_of_stages in shapes.values():
        own = {
            stage: model[stage]
            for stage, worker in enumerate(workers_of_stages)
            if worker == place.rank
        }
        given = forward(own, boundaries, inputs.split(4), group, workers_of_stages.__getitem__, CPU)
        with torch.no_grad():
            expected = nn.Sequential(*model[: max(own) + 1])(inputs)
        assert [len(part) for part in given] == [4, 4, 3]
        assert not any(part.requires_grad for part in given)
        torch.testing.assert_close(torch.cat(given), expected)


def test_every_shape_of_pipeline_gives_what_the_model_gives() -> None:
    run(go_through_all_stages, size=3)
