import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.microbatches import Cut

cuts = st.builds(Cut, st.integers(1, 40), st.integers(1, 12))


def test_a_batch_is_cut_into_rows_and_the_rest_repeats_the_last_sample() -> None:
    cut = Cut(batch=5, num_microbatches=4)
    assert cut.rows == 2
    assert [cut.size(i) for i in range(4)] == [2, 2, 1, 0]
    assert cut.shares(torch.ones(5)) == [0.4, 0.4, 0.2, 0.0]
    filled = cut.fill(torch.tensor([[1], [2], [3], [4], [5]]))
    assert filled.flatten().tolist() == [1, 2, 3, 4, 5, 5, 5, 5]


def test_a_batch_that_fits_is_not_copied() -> None:
    batch = torch.ones(6, 2)
    assert Cut(6, 3).fill(batch) is batch


@given(cuts)
def test_every_sample_is_in_one_microbatch_at_its_place(cut: Cut) -> None:
    batch = torch.arange(cut.batch)
    microbatches = cut.fill(batch).split(cut.rows)
    assert len(microbatches) == cut.num_microbatches
    assert all(len(microbatch) == cut.rows for microbatch in microbatches)
    real = [microbatches[i][: cut.size(i)] for i in range(cut.num_microbatches)]
    assert torch.equal(torch.cat(real), batch)
    for i, samples in enumerate(real):
        assert samples.tolist() == batch[cut.start(i) : cut.start(i) + cut.size(i)].tolist()


@given(cuts)
def test_the_weighted_means_of_the_microbatches_are_the_mean_of_the_batch(cut: Cut) -> None:
    batch = torch.linspace(1, 2, cut.batch, dtype=torch.float64)
    shares = cut.shares(batch)
    means = [
        batch[cut.start(i) : cut.start(i) + cut.size(i)].mean() * shares[i]
        for i in range(cut.num_microbatches)
        if cut.size(i)
    ]
    assert abs(float(sum(means)) - float(batch.mean())) < 1e-12


def test_microbatches_count_as_much_as_what_their_targets_weigh() -> None:
    targets = torch.tensor([[1, -100], [2, 3], [-100, -100], [-100, -100], [4, -100]])

    def num_tokens(target: torch.Tensor) -> torch.Tensor:
        return (target != -100).sum()

    cut = Cut(batch=5, num_microbatches=4)
    assert cut.shares(targets, num_tokens) == [0.75, 0.0, 0.25, 0.0]
    assert cut.shares(torch.full((5, 2), -100), num_tokens) == [0.0] * 4
