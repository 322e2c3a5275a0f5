"""Index arithmetic and the random stream of csrc/work.h and csrc/philox.h, on their own."""

import ctypes

import pytest
import torch
from emulator import LIBRARY
from hypothesis import given, settings
from hypothesis import strategies as st

from lilora_kernels.ops.philox import keep_mask, philox, threshold


@pytest.fixture(scope="module")
def library():
    found = ctypes.CDLL(str(LIBRARY))
    found.index_tile_range.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]
    found.index_shares_for.argtypes = [ctypes.c_int64, *[ctypes.c_int] * 4]
    found.philox_keep_bits.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_uint, ctypes.c_uint]
    found.philox_keep_bits.restype = ctypes.c_uint
    return found


def numbers(function, *arguments, count=2):
    out = (ctypes.c_int64 * count)()
    function(*arguments, out)
    return list(out)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(total=st.integers(0, 10**12), size=st.sampled_from((16, 128, 192, 512, 2048)), data=st.data())
def test_tiles_cover_everything_once(library, total, size, data):
    tiles = -(-total // size)
    if tiles > 2**31 - 1 or tiles == 0:
        return
    index = data.draw(st.integers(0, tiles - 1))
    first, count = numbers(library.index_tile_range, index, size, total)
    assert first == index * size
    assert count == min(size, total - first)
    assert count > 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(total=st.integers(0, 100_000), step=st.sampled_from((1, 32, 64)), shares=st.integers(1, 40))
def test_shares_follow_each_other_in_whole_steps(library, total, step, shares):
    """So a sum over the shares, in order, is a sum over everything, in order."""
    end = 0
    for index in range(shares):
        first, count = numbers(library.index_share_range, index, shares, step, total)
        assert first == end
        assert first % step == 0 or count == 0
        assert count >= 0
        end = first + count
    assert end == total


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    tiles=st.integers(0, 2000),
    blocks=st.integers(1, 300),
    steps=st.integers(0, 400),
    least=st.integers(1, 8),
    most=st.integers(1, 400),
)
def test_the_number_of_shares_gives_the_busiest_block_the_fewest_steps(library, tiles, blocks, steps, least, most):
    def taken(shares):
        items = [-(-steps // shares)] * (tiles * shares)
        return max((sum(items[at::blocks]) for at in range(blocks)), default=0)

    enough = -(-2 * blocks // max(tiles, 1))
    allowed = [n for n in range(1, min(most, enough, 40) + 1) if n == 1 or -(-steps // n) >= least]
    shares = library.index_shares_for(tiles, blocks, steps, least, min(most, 40))
    assert shares == min(allowed, key=lambda n: (taken(n), n))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(first=st.integers(0, 300), second=st.integers(1, 300), third=st.integers(1, 300), data=st.data())
def test_coordinates_are_those_of_a_grid(library, first, second, third, data):
    b, c = data.draw(st.integers(0, second - 1)), data.draw(st.integers(0, third - 1))
    item = (first * second + b) * third + c
    assert numbers(library.index_coordinates, item, second, third, count=3) == [first, b, c]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    row=st.integers(0, 2**40),
    block=st.integers(0, 2**28),
    p=st.floats(0.0, 0.9999),
)
def test_draws_are_those_of_the_reference(library, seed, row, block, p):
    """Counters beyond 32 bits included: rows of a batch of any size."""
    low = 0xFFFFFFFF
    words = philox(
        tuple(torch.tensor(c) for c in (row & low, row >> 32, block, 0)),
        tuple(torch.tensor(k) for k in (seed & low, seed >> 32 & low)),
    )
    draws = [int(half) for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = library.philox_keep_bits(seed, row, block, threshold(p))
    assert [bits >> j & 1 for j in range(8)] == [int(draw >= threshold(p)) for draw in draws]


def test_draws_of_a_whole_mask(library):
    seed, p = 0x0123_4567_89AB_CDEF, 0.3
    mask = keep_mask(torch.tensor([seed]), 20, 64, p)
    for row in range(20):
        for block in range(8):
            bits = library.philox_keep_bits(seed, row, block, threshold(p))
            assert [bool(bits >> j & 1) for j in range(8)] == mask[row, 8 * block : 8 * block + 8].tolist()
