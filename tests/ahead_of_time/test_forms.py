"""Every form in the table of Triton attention kernels, compiled for its GPU without one.

Run with TRITON_INTERPRET=0: what is interpreted can't be compiled in the same process.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from rowmax.bench import ahead_of_time
from rowmax.kernels.gpu_triton.configurations import Configuration, Key, lookup, table

ARCHS = sorted({key.arch for key in table()})


@pytest.mark.parametrize("key", sorted(table()), ids=lambda key: "/".join(map(str, key)))
def test_a_form_fits_its_gpu(key: Key) -> None:
    """No spilled register, shared memory within the limit, Hopper's matrix instructions overlap."""
    ahead_of_time.pretend(key.arch)
    problem = ahead_of_time.problem_of(key.bits, key.dim, key.features)
    compiled = ahead_of_time.compile_kernel(key.kernel, problem, table()[key])
    assert compiled.fits(key.arch), compiled
    if key.arch == "sm_90" and key.bits == 16 and min(table()[key][:2]) >= 64:
        assert compiled.wgmma > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_a_form_that_spills_is_seen(arch: str) -> None:
    ahead_of_time.pretend(arch)
    problem = ahead_of_time.problem_of(16, 128, "plain")
    compiled = ahead_of_time.compile_kernel("key_gradients", problem, Configuration(128, 128, 4, 2))
    assert not compiled.fits(arch)


def test_what_the_table_lacks() -> None:
    """A smaller head takes the next larger one's form, a newer GPU an older one's."""
    key = Key("sm_90", "forward", 16, 128, "plain")
    assert lookup(key._replace(dim=16)) == table()[key._replace(dim=64)]
    assert lookup(key._replace(dim=1024)) == Configuration(32, 32, 4, 1)
    assert lookup(key._replace(arch="gfx", bits=64)) == Configuration(16, 16, 4, 1)
