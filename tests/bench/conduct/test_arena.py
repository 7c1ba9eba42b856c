"""Tensors whose values change in place and whose storage moves."""

from __future__ import annotations

import torch

from rowmax.bench.conduct.arena import NUDGE, Arena


def arena_of(*sizes: int) -> Arena:
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(sizes, generator=generator).requires_grad_() for _ in range(2))
    return Arena({"q": q, "k": k}, seed=2)


def test_values_change_in_place_and_keep_their_distribution() -> None:
    arena = arena_of(8, 16, 32)
    q, before, version = arena.tensors["q"], arena.tensors["q"].detach().clone(), 0
    seen = [before]
    for _ in range(5):
        arena.renew()
        assert arena.tensors["q"] is q
        assert q._version > version
        assert not any(torch.equal(q, old) for old in seen)
        assert torch.equal(q.detach().flatten().sort().values, before.flatten().sort().values)
        seen, version = [*seen, q.detach().clone()], q._version
    assert q.is_leaf
    assert q.requires_grad


def test_a_key_brings_the_same_values_back() -> None:
    arena = arena_of(3, 4, 5)
    key = arena.key()
    arena.renew(key)
    arena.nudge({"k": (slice(None),) * 3}, key)
    first = {name: tensor.detach().clone() for name, tensor in arena.tensors.items()}
    arena.renew()
    assert not torch.equal(arena.tensors["q"], first["q"])
    arena.move()
    arena.renew(key)
    arena.nudge({"k": (slice(None),) * 3}, key)
    for name, tensor in arena.tensors.items():
        assert torch.equal(tensor, first[name])


def test_a_nudge_changes_a_few_values_of_its_region() -> None:
    arena = arena_of(6, 8, 5)
    before = arena.tensors["k"].detach().clone()
    assert arena.nudge({"k": (slice(2, 3), slice(0, 4), slice(None))}) == "k"
    change = arena.tensors["k"].detach() - before
    assert 1 <= int((change != 0).sum()) <= 4
    assert float(change.max()) >= 0.99 * NUDGE
    assert not change[:2].any()
    assert not change[3:].any()
    assert not change[:, 4:].any()
    assert arena.changed() is None


def test_moved_tensors_lie_elsewhere_and_hold_the_same() -> None:
    arena = arena_of(3, 4, 5)
    old = dict(arena.tensors)
    arena.move(("k",))
    assert arena.tensors["q"] is old["q"]
    assert arena.tensors["k"].data_ptr() != old["k"].data_ptr()
    assert torch.equal(arena.tensors["k"], old["k"])
    assert arena.tensors["k"].is_leaf
    assert arena.tensors["k"].requires_grad
    assert arena.tensors["k"].is_contiguous()


def test_what_a_candidate_changes_is_seen_and_put_back() -> None:
    arena = arena_of(3, 4, 5)
    arena.renew()
    before = arena.tensors["k"].detach().clone()
    assert arena.changed() is None
    with torch.no_grad():
        arena.tensors["k"][1, 2, 3] *= -1.0
    assert arena.changed() == "k"
    arena.put_back()
    assert torch.equal(arena.tensors["k"], before)


def test_a_changed_sign_of_zero_is_a_change() -> None:
    arena = Arena({"x": torch.zeros(4)})
    arena.tensors["x"].neg_()
    assert arena.changed() == "x"


def test_tokens_are_renewed_too() -> None:
    arena = Arena({"tokens": torch.arange(12).view(3, 4)}, seed=1)
    arena.renew()
    tokens = arena.tensors["tokens"]
    assert tokens.flatten().sort().values.tolist() == list(range(12))
    assert tokens.flatten().tolist() != list(range(12))
    assert arena.nudge({"tokens": (slice(None), slice(None))}) is None


def test_stirring_changes_a_few_values_for_others_of_the_same_tensor() -> None:
    arena = arena_of(8, 16, 32)
    before = {name: tensor.detach().clone() for name, tensor in arena.tensors.items()}
    for _ in range(3):
        arena.stir(("k",))
    assert torch.equal(arena.tensors["q"], before["q"])
    changed = arena.tensors["k"].detach() != before["k"]
    assert 1 <= int(changed.sum()) <= 24
    assert bool(torch.isin(arena.tensors["k"].detach(), before["k"]).all())
    arena.renew()
    assert arena.changed() is None
