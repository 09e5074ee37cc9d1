"""Pages of the KV cache: each is free or held, what is found is what was written, codes are near values."""

from __future__ import annotations

import random

import pytest
import torch
from artifacts import tiny_config

from microlm.engine.cache import codec
from microlm.engine.cache.pages import Chain, PagePool, pages_for, slice_of
from microlm.engine.cache.store import PAGE, KVStore, page_bytes


def digest(name: str) -> bytes:
    return name.encode()


def test_a_pool_gives_each_page_once_and_never_page_zero() -> None:
    pool = PagePool(8)
    pages = pool.take(7)
    assert sorted(pages or ()) == list(range(1, 8))
    assert pool.take(1) is None and pool.free == 0
    pool.give_back([3, 5])
    assert pool.take(3) is None and sorted(pool.take(2) or ()) == [3, 5]


def test_a_shared_page_is_free_when_its_last_holder_leaves() -> None:
    pool = PagePool(4)
    (page,) = pool.take(1) or ()
    pool.remember(page, digest("a"))
    pool.hold(pool.find([digest("a")]))
    pool.give_back([page])
    assert pool.free == 2
    pool.give_back([page])
    assert pool.free == 3 and pool.find([digest("a")]) == [page]


def test_content_is_kept_until_the_page_is_needed_the_oldest_and_last_goes_first() -> None:
    pool = PagePool(5)
    names = [digest(n) for n in ("a1", "a2", "b1", "b2")]
    first, second = pool.take(2) or [], pool.take(2) or []
    for page, name in zip((*first, *second), names, strict=True):
        pool.remember(page, name)
    pool.give_back(first)
    pool.give_back(second)
    assert pool.find(names[:2]) == first and pool.find(names[2:]) == second
    assert pool.take(1) == [first[1]] and pool.find(names[:2]) == [first[0]]
    assert pool.take(1) == [first[0]] and pool.find(names[2:]) == second
    pool.forget(second)
    assert pool.find(names[2:]) == [] and pool.free == 2


def test_a_random_life_keeps_the_books() -> None:
    rng, pool = random.Random(1), PagePool(40)
    held: list[list[int]] = []
    content: dict[int, bytes] = {}
    for step in range(4000):
        if held and rng.random() < 0.45:
            pool.give_back(held.pop(rng.randrange(len(held))))
        elif (pages := pool.take(rng.randrange(1, 6))) is not None:
            for page in pages:
                content[page] = digest(f"{step}:{page}")
                if rng.random() < 0.7:
                    pool.remember(page, content[page])
            held.append(pages)
        if content and rng.random() < 0.3:
            found = pool.find([rng.choice(list(content.values()))])
            assert all(content[page] in pool._page_of for page in found)
            pool.hold(found)
            held.append(found)
        in_use = {page for pages in held for page in pages}
        assert pool.free == pool.pages - len(in_use)
        assert all(pool._digest_of[page] == name for name, page in pool._page_of.items())
    for pages in held:
        pool.give_back(pages)
    assert pool.free == pool.pages == 39


def test_digests_cover_all_that_came_before() -> None:
    tokens = list(range(3 * PAGE + 5))
    whole, split, other, adapted = Chain(), Chain(), Chain(), Chain("a#0")
    whole.cover(tokens, [], len(tokens))
    for length in range(0, len(tokens) + 1, 7):
        split.cover(tokens[:40], tokens[40:], length)
    split.cover(tokens[:40], tokens[40:], len(tokens))
    other.cover([1, *tokens[1:]], [], len(tokens))
    adapted.cover(tokens, [], len(tokens))
    assert whole.digests == split.digests and len(whole.digests) == 3
    assert not set(whole.digests) & ({*other.digests} | {*adapted.digests})
    for start in range(0, 70, 9):
        for stop in range(start, 70, 7):
            assert list(slice_of(tokens[:33], tokens[33:70], start, stop)) == tokens[start:stop]
    assert [pages_for(n) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]


@pytest.mark.parametrize("dtype", ["auto", "int8", "int4"])
def test_what_is_gathered_is_what_was_written(dtype: str) -> None:
    config = tiny_config()
    store = KVStore(config, 7, dtype)  # type: ignore[arg-type]
    assert store.nbytes == 7 * page_bytes(config, dtype, torch.float32)  # type: ignore[arg-type]
    heads, size = config.num_key_value_heads, config.head_dim
    k, v = torch.randn(2, 2 * PAGE, heads, size, generator=torch.Generator().manual_seed(1))
    pages = torch.tensor([5, 2]).repeat_interleave(PAGE)
    offsets = torch.arange(PAGE).repeat(2)
    places = (pages[:, None] * heads + torch.arange(heads)) * PAGE + offsets[:, None]
    store.write(1, places.flatten(), k, v)
    wanted = (torch.tensor([5, 2])[None] * heads + torch.arange(heads)[:, None]).flatten()
    got_k, got_v = store.gather(1, wanted, 1)
    for got, given in ((got_k, k), (got_v, v)):
        if dtype == "auto":
            expected = given
        else:
            expected = codec.decode(*codec.encode(given, shifted=dtype == "int4"), torch.float32)
        assert torch.equal(got[0].transpose(0, 1), expected)
    assert not store.gather(0, wanted, 1)[0].any()
    store.clear([5, 2])
    assert not store.gather(1, wanted, 1)[1].any()


@pytest.mark.parametrize(("shifted", "steps"), [(False, 127), (True, 15)])
def test_codes_are_within_half_a_step_of_their_values(shifted: bool, steps: int) -> None:
    values = torch.randn(200, 64, generator=torch.Generator().manual_seed(2)) * 3 + 1
    codes, scale, zero = codec.encode(values, shifted)
    back = codec.decode(codes, scale, zero, torch.float32)
    span = values.amax(-1) - values.amin(-1) if shifted else values.abs().amax(-1)
    rounding = values.abs().amax(-1) * 2**-8  # of scale and zero, which are bf16
    assert ((back - values).abs().amax(-1) <= 0.5 * span / steps + rounding).all()


@pytest.mark.parametrize("shifted", [False, True])
def test_codes_of_equal_values_and_of_none(shifted: bool) -> None:
    values = torch.stack((torch.zeros(8), torch.full((8,), 0.5), torch.full((8,), -2.0)))
    back = codec.decode(*codec.encode(values, shifted), torch.float32)
    assert torch.allclose(back, values, rtol=2**-8, atol=0)
    broken = torch.ones(2, 8)
    broken[0, 3], broken[1, 3] = float("nan"), float("inf")
    assert not codec.decode(*codec.encode(broken, shifted), torch.float32).isfinite().all(-1).any()
