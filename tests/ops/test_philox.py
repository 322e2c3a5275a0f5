import torch

from lilora_kernels.ops.philox import keep_mask, keep_scale, philox


def test_known_answers_of_random123():
    """Seven rounds, from the vectors that Random123 publishes."""
    pi = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0
    ones = (0xFFFFFFFF,) * 6
    known = {
        (0,) * 6: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        ones: (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
        pi: (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    }
    for words, answer in known.items():
        counter, key = torch.tensor(words[:4]), torch.tensor(words[4:])
        assert tuple(int(w) for w in philox(counter.unbind(), key.unbind())) == answer


def test_mask_depends_on_seed_and_place_only():
    seed = torch.tensor([0x1234_5678_9ABC_DEF])
    mask = keep_mask(seed, 65, 37, 0.3)
    assert torch.equal(mask[:20, :16], keep_mask(seed, 20, 16, 0.3))
    assert not torch.equal(mask, keep_mask(seed + 1, 65, 37, 0.3))
    assert not torch.equal(mask, keep_mask(seed + 2**32, 65, 37, 0.3))


def test_share_and_scale():
    mask = keep_mask(torch.tensor([7]), 2000, 200, 0.05)
    assert abs(mask.double().mean().item() * keep_scale(0.05) - 1) < 5 * (0.05 / 400_000) ** 0.5
    for p in (0.0, 1e-6):
        assert keep_mask(torch.tensor([7]), 50, 50, p).all()
        assert keep_scale(p) == 1
