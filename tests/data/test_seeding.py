import torch

from data.seeding import sample_seed, seeded


def test_random_numbers_depend_on_seed_epoch_and_index_alone():
    before = torch.random.get_rng_state()
    draws = {}
    for key in ((5, 1, 3), (5, 1, 4), (5, 2, 3), (6, 1, 3)):
        with seeded(*key):
            draws[key] = float(torch.rand(()))
    assert len(set(draws.values())) == 4
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    with seeded(5, 1, 3):
        assert float(torch.rand(())) == draws[5, 1, 3]


def test_seeds_are_the_same_on_every_machine():
    assert [sample_seed(0, 0, 0), sample_seed(3, 1, 4)] == [15793235383387715774, 3597864690932655003]
