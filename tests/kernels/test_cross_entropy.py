"""linear_cross_entropy against torch's own projection and loss in float64, with gradients."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rowmax.kernels import linear_cross_entropy
from rowmax.kernels.backends import fused_cross_entropy
from rowmax.kernels.testing import CrossEntropyCase, named_cases, peak_bytes
from rowmax.kernels.testing.cases import Draw
from rowmax.kernels.testing.cross_entropy import KINDS, cross_entropy_case

from .backends import device_of, dtype_name, is_interpreted
from .support import DTYPES, assert_parity


def draw(tokens: int, columns: int, vocabulary: int, **options: object) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x, weight = (
        torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        for rows in (tokens, vocabulary)
    )
    return x, weight, torch.randint(vocabulary, (tokens,), generator=generator)


def run(case: CrossEntropyCase, backend: str) -> None:
    kernel = partial(linear_cross_entropy, backend=backend)
    assert_parity(case.run(kernel, device_of(backend)), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_named_cases(dtype: torch.dtype, backend: str) -> None:
    cases = named_cases("linear_cross_entropy", dtype)
    assert {case.kind for case in cases} == set(KINDS)
    for named in cases:
        case = named.case()
        assert isinstance(case, CrossEntropyCase)
        run(case, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("kind", ["smoothing", "ignored", "sum"])
def test_several_chunks(
    kind: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_cross_entropy, "_MIN_CHUNK", 16)
    monkeypatch.setattr(fused_cross_entropy, "_CHUNK_LOGITS", {"cpu": 1})
    monkeypatch.setattr(fused_cross_entropy, "_CHUNK_LOGITS_GPU", 1)
    run(cross_entropy_case(kind, (50, 24, 70), Draw(5, dtype)), backend)


def test_leading_dimensions_and_strides(backend: str) -> None:
    x, weight, target = draw(12, 8, 9)
    x, weight = x.float(), weight.float()
    apart = x.new_zeros(12, 17)[:, 1::2].copy_(x).view(3, 4, 8)
    turned = weight.t().contiguous().t()
    device = device_of(backend)
    got = linear_cross_entropy(
        apart.to(device), turned.to(device), target.view(3, 4).to(device), backend=backend
    )
    expected = F.cross_entropy(F.linear(x.double(), weight.double()), target)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("x", "weight")], ids="+".join)
def test_one_gradient_alone(wanted: tuple[str, ...], backend: str) -> None:
    x, weight, target = (tensor.to(device_of(backend)) for tensor in draw(9, 4, 6))
    leaves = {"x": x, "weight": weight}
    leaves |= {name: leaves[name].clone().requires_grad_() for name in wanted}
    loss = linear_cross_entropy(leaves["x"], leaves["weight"], target, 0.1, backend=backend)
    inputs = [leaves[name] for name in wanted]
    expected = F.cross_entropy(F.linear(leaves["x"], leaves["weight"]), target, label_smoothing=0.1)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    )


def test_gradients_may_be_asked_for_twice(backend: str) -> None:
    x, weight, target = (tensor.to(device_of(backend)) for tensor in draw(9, 4, 6))
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, target, backend=backend)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(3 * loss, x, retain_graph=True)
    torch.testing.assert_close(second, 3 * kept)
    torch.testing.assert_close(first, kept)
    loss.backward()
    torch.testing.assert_close(x.grad, kept)


def test_gradients_are_nobody_elses(backend: str) -> None:
    """Each backward pass has memory of its own, which may be changed, and no graph."""
    device = device_of(backend)
    x, weight, target = (tensor.to(device) for tensor in draw(9, 4, 6))
    x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, weight), target), (x, weight))
    loss = linear_cross_entropy(x, weight, target, backend=backend)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    for gradient, right in zip(first, expected, strict=True):
        torch.testing.assert_close(gradient, right)
        assert not gradient.requires_grad
        gradient.mul_(7)
    second = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    torch.testing.assert_close(second, expected)
    for count in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(weight.grad, count * expected[1])
    torch.nn.utils.clip_grad_norm_([x, weight], 1e-4)
    torch.testing.assert_close(second, expected)
    x.grad.zero_()
    loss.backward()
    torch.testing.assert_close(x.grad, expected[0])


def test_a_weight_that_is_an_embedding_too(backend: str) -> None:
    _, weight, target = (tensor.to(device_of(backend)) for tensor in draw(9, 4, 6))
    weight.requires_grad_()
    tokens = target.roll(1)
    loss = linear_cross_entropy(weight[tokens], weight, target, backend=backend)
    naive = F.cross_entropy(F.linear(weight[tokens], weight), target)
    torch.testing.assert_close(
        torch.autograd.grad(loss, weight), torch.autograd.grad(naive, weight)
    )


def test_half_gradients_are_rounded_once(backend: str) -> None:
    """A large gradient of the loss, as a loss scaler's, meets gradients that are not yet small."""
    device = device_of(backend)
    tokens = 2048
    x, weight, target = draw(tokens, 8, 12)
    x = (12 * weight[target]).half()  # a model that is sure: p - q is about 1e-4
    leaves = x.to(device).requires_grad_(), weight.half().to(device).requires_grad_()
    loss = linear_cross_entropy(*leaves, target.to(device), backend=backend)
    found = torch.autograd.grad(loss, leaves, torch.tensor(2.0**16, device=device))
    wide, naive = (
        [leaf.detach().cpu().to(dtype).requires_grad_() for leaf in leaves]
        for dtype in (torch.float64, torch.float16)
    )
    exact = torch.autograd.grad(F.cross_entropy(F.linear(*wide), target) * 2.0**16, wide)
    theirs = torch.autograd.grad(F.cross_entropy(F.linear(*naive).float(), target) * 2.0**16, naive)
    for got, other, right in zip(found, theirs, exact, strict=True):
        error, allowed = ((each.cpu().double() - right).norm() for each in (got, other))
        assert error <= 1.5 * allowed


def test_half_sums_beyond_the_type(backend: str) -> None:
    """Of a chunk's tokens, whose mean is an ordinary number."""
    device = device_of(backend)
    count = 4000 if is_interpreted(backend) else 20_000
    x = torch.full((count, 2), 20.0, dtype=torch.float16, device=device)
    weight = torch.zeros(100, 2, dtype=torch.float16, device=device, requires_grad=True)
    target = torch.zeros(count, dtype=torch.int64, device=device)
    linear_cross_entropy(x, weight, target, backend=backend).backward()
    assert weight.grad is not None
    expected = torch.full((2,), -19.8, device=device)
    torch.testing.assert_close(weight.grad[0].float(), expected, rtol=1e-3, atol=0)


def test_no_columns(backend: str) -> None:
    """All logits are 0."""
    x, weight, target = (tensor.to(device_of(backend)) for tensor in draw(5, 0, 4))
    loss = linear_cross_entropy(x, weight, target, backend=backend)
    assert loss.item() == pytest.approx(math.log(4))
    assert linear_cross_entropy(x[:0], weight, target[:0], backend=backend).isnan()


def test_all_ignored(backend: str) -> None:
    x, weight, target = (tensor.to(device_of(backend)) for tensor in draw(5, 4, 6))
    leaves = x.requires_grad_(), weight.requires_grad_()
    ignored = torch.full_like(target, -100)
    loss = linear_cross_entropy(*leaves, ignored, backend=backend)
    assert math.isnan(loss.item())
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient.count_nonzero() == 0
    total = linear_cross_entropy(*leaves, ignored, reduction="sum", backend=backend)
    assert total.item() == 0.0


def test_infinite_logits(backend: str) -> None:
    """A word that can't be has no probability and no gradient; a NaN is passed on."""
    device = device_of(backend)
    weight = torch.tensor([[1.0], [-torch.inf], [0.5]], device=device)
    x = torch.tensor([[2.0], [1.0]], device=device)
    target = torch.tensor([0, 2], device=device)
    got = linear_cross_entropy(x, weight, target, backend=backend)
    expected = F.cross_entropy(F.linear(x, weight), target)
    torch.testing.assert_close(got, expected)
    x[1] = torch.nan
    assert linear_cross_entropy(x, weight, target, backend=backend).isnan()


@pytest.mark.parametrize("word", [-1, 6, 2**40])
def test_targets_that_are_no_words(word: int, backend: str) -> None:
    x, weight, target = (tensor.to(device_of(backend)) for tensor in draw(5, 4, 6))
    target[3] = word
    if x.is_cpu and backend != "reference":
        with pytest.raises(IndexError, match=f"`target`.*0 to 5.*got {word}"):
            linear_cross_entropy(x, weight, target, backend=backend)
    else:
        assert linear_cross_entropy(x, weight, target, backend=backend).isnan()


def test_half_types_are_summed_in_float32(backend: str) -> None:
    x, weight, target = (tensor.to(device_of(backend)) for tensor in draw(300, 8, 50))
    loss = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), target, backend=backend)
    assert loss.dtype == torch.float32


def test_autocast() -> None:
    x, weight, target = draw(20, 8, 30)
    leaves = x.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*leaves, target)
        expected = F.cross_entropy(F.linear(*leaves), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=1e-2, atol=0)
    for one, other in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=1e-3)


def test_memory() -> None:
    """No tensor of all logits: both gradients, one chunk, and little else."""
    tokens, columns, vocabulary = 2048, 64, 10_000
    x, weight, target = draw(tokens, columns, vocabulary)
    leaves = x.float().requires_grad_(), weight.float().requires_grad_()

    def fused() -> object:
        return torch.autograd.grad(linear_cross_entropy(*leaves, target, 0.1), leaves)

    def unfused() -> object:
        loss = F.cross_entropy(F.linear(*leaves), target, label_smoothing=0.1)
        return torch.autograd.grad(loss, leaves)

    fused()
    chunk = fused_cross_entropy.chunk_tokens(vocabulary, "cpu") * vocabulary
    gradients = sum(leaf.numel() for leaf in leaves)
    most = 4 * (chunk + gradients) + (4 << 20)
    found = peak_bytes(fused, "cpu"), peak_bytes(unfused, "cpu")
    if None in found:
        pytest.skip("the system does not tell a process its peak")
    assert found[0] <= most, found
    assert found[1] > 5 * most, found


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic: bool, backend: str) -> None:
    x, weight, target = (tensor.to(device_of(backend)) for tensor in draw(20, 8, 30))
    leaves = x.requires_grad_(), weight.requires_grad_()

    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return 2 * linear_cross_entropy(x, weight, target, 0.1, backend=backend)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for one, other in zip(
        torch.autograd.grad(compiled(*leaves, target), leaves),
        torch.autograd.grad(loss(*leaves, target), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_derivatives(smoothing: float, reduction: str, backend: str) -> None:
    """First, second and forward-mode derivatives, by differences."""
    x, weight, target = (tensor.to(device_of(backend)) for tensor in draw(5, 3, 4))
    target[2] = -100
    leaves = x.requires_grad_(), weight.requires_grad_()

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, weight, target, smoothing, reduction=reduction, backend=backend
        )

    assert torch.autograd.gradcheck(loss, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_functional_transforms(backend: str) -> None:
    x, weight, target = (tensor.to(device_of(backend)) for tensor in draw(5, 3, 4))

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, 0.1, backend=backend)

    def naive(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target, label_smoothing=0.1)

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(loss)(x, weight), transform(naive)(x, weight))
    many = torch.stack((x, 2 * x))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(loss), (0, None))(many, weight),
        torch.func.vmap(torch.func.grad(naive), (0, None))(many, weight),
    )
