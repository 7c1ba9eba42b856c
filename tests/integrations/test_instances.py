"""The class of a swapped instance, where torch's libraries and users change classes as well."""

from __future__ import annotations

import abc
import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from rowmax.kernels import swap, swapped
from rowmax.kernels.integrations.torch_modules.instances import Swapped

WIDTH = 8


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(module: nn.Module, name: str) -> None:
    parametrize.register_parametrization(module, name, Doubled())


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LayerNorm": (lambda: nn.LayerNorm(WIDTH), "weight"),
    "RMSNorm": (lambda: nn.RMSNorm(WIDTH), "weight"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(WIDTH, 2), "in_proj_weight"),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8), "linear1.weight"),
}
PARAMETRIZATIONS: dict[str, Callable[[nn.Module, str], Any]] = {
    "own": doubled,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}
# All orders in which a swap is followed by its end, and a parametrization too.
ORDERS = sorted(
    {
        order
        for order in itertools.permutations(("swap", "restore", "register", "remove"))
        if order.index("swap") < order.index("restore")
        and order.index("register") < order.index("remove")
    }
)


def build(name: str) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    make, tensor = MODULES[name]
    module = make().double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module, tensor


def call(module: nn.Module) -> Tensor:
    x = torch.randn(3, 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = module(x, x, x) if isinstance(module, nn.MultiheadAttention) else module(x)
    return result[0] if isinstance(result, tuple) else result


def classes(module: nn.Module) -> list[type]:
    return [type(own) for own in module.modules()]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("name", MODULES)
def test_parametrized_before_or_after(name: str, kind: str, order: tuple[str, ...]) -> None:
    """After each step the module does what one does that is never swapped."""
    if kind == "spectral_norm" and name in ("LayerNorm", "RMSNorm"):
        kind = "own"  # a vector has no spectral norm
    module, tensor = build(name)
    twin, before = copy.deepcopy(module), classes(module)
    inside, _, attribute = tensor.rpartition(".")
    report = None
    for step in order:
        if step == "swap":
            report = swap(module)
        elif step == "restore":
            assert report is not None
            report.restore()
            report = None
        for own in (module, twin):
            child = own.get_submodule(inside)
            if step == "register":
                torch.manual_seed(2)  # spectral_norm begins at random vectors
                PARAMETRIZATIONS[kind](child, attribute)
                child.eval()
            elif step == "remove":
                parametrize.remove_parametrizations(child, attribute)
        child = module.get_submodule(inside)
        assert isinstance(module, Swapped) == (report is not None)
        assert parametrize.is_parametrized(child) == parametrize.is_parametrized(
            twin.get_submodule(inside)
        )
        assert type(child).__name__ == type(twin.get_submodule(inside)).__name__
        expected = call(twin)
        torch.testing.assert_close(call(module), expected, rtol=1e-12, atol=1e-12)
        duplicate = copy.deepcopy(module)
        assert isinstance(duplicate, Swapped) == (report is not None)
        torch.testing.assert_close(call(duplicate), expected, rtol=1e-12, atol=1e-12)
    assert classes(module) == before


def test_more_parametrizations_of_a_swapped_module() -> None:
    """One before and one after the swap; another module of the class has none of them."""
    module, other = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
    doubled(module, "weight")
    report = swap(nn.ModuleList([module, other]))
    doubled(module, "bias")
    assert isinstance(other.weight, nn.Parameter)
    parametrize.remove_parametrizations(module, "weight")
    assert isinstance(module, Swapped)
    report.restore()
    parametrize.remove_parametrizations(module, "bias")
    assert type(module) is type(other) is nn.LayerNorm


@pytest.fixture
def mesh() -> Iterator[Any]:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("order", ["swap shard restore", "shard swap restore"])
def test_sharded_by_fsdp(order: str, mesh: Any) -> None:
    """fully_shard derives a class from the instance's, once for each class."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, dtype=torch.float64)
    expected = call(layer)
    sites = (layer.norm1, layer.self_attn, layer)
    report, sharded = None, False
    for step in order.split():
        if step == "swap":
            report = swap(layer)
        elif step == "shard":
            sharded = True
            for module in sites:
                fully_shard(module, mesh=mesh)
        else:
            assert report is not None
            report.restore()
            report = None
        for module in sites:
            assert isinstance(module, FSDPModule) == sharded
            assert isinstance(module, Swapped) == (report is not None)
        out = call(layer)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        out.sum().backward()
    assert [type(module).__mro__[2] for module in sites] == [
        *(nn.LayerNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer),
    ]


def test_a_class_that_a_user_has_set_is_named() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH))
    report = swap(model)
    ours = type(model[1])

    class Theirs(ours):  # type: ignore[misc, valid-type]
        pass

    model[1].__class__ = Theirs
    with pytest.raises(RuntimeError, match=r"restore: 1: its class has been set to .*Theirs since"):
        report.restore()
    assert classes(model)[1:] == [nn.LayerNorm, Theirs, nn.RMSNorm]
    model[1].__class__ = nn.RMSNorm
    with pytest.raises(RuntimeError, match=r"torch.*RMSNorm since the swap; .*to a LayerNorm"):
        report.restore()
    model[1].__class__ = ours
    report.restore()
    report.restore()
    assert classes(model)[1:] == [nn.LayerNorm, nn.LayerNorm, nn.RMSNorm]


def test_the_original_class_set_by_a_user_is_as_restored() -> None:
    module = nn.LayerNorm(WIDTH)
    report = swap(module)
    module.__class__ = nn.LayerNorm
    report.restore()
    assert type(module) is nn.LayerNorm


def test_a_wrapper_around_forward_outlives_the_swap() -> None:
    """It holds the forward that the instance had when it was set, the swapped one."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        *(WIDTH, 2, 16), dropout=0.0, dtype=torch.float64, batch_first=True
    )
    model: Any = nn.TransformerEncoder(layer, 1, nn.RMSNorm(WIDTH, dtype=torch.float64))
    expected = call(model)
    report = swap(model)
    for module in model.modules():
        own = module.forward
        module.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs)
    torch.testing.assert_close(call(model), expected, rtol=1e-12, atol=1e-12)
    report.restore()
    assert torch.equal(call(model), expected)


class Registered(nn.LayerNorm):
    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, name: str) -> None:
        Registered.known.append(name)


class Abstract(nn.LayerNorm, abc.ABC):
    pass


class Shared(nn.LayerNorm):
    """Copies share the parameters."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        duplicate = type(self)(WIDTH)
        duplicate.weight = self.weight
        return duplicate


@pytest.mark.parametrize("kind", [nn.LayerNorm, Abstract, Registered, Shared])
def test_classes_with_ways_of_their_own(kind: type[nn.LayerNorm]) -> None:
    module = kind(WIDTH)
    with swapped(module):
        assert isinstance(module, Swapped)
        made: Any = type(module)(WIDTH)
        assert type(made) is kind
        duplicate: Any = copy.deepcopy(module)
        assert (duplicate.weight is module.weight) == (kind is Shared)
        assert type(pickle.loads(pickle.dumps(module))) is kind
    assert type(module) is kind
    assert not Registered.known
