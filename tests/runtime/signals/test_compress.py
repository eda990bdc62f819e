"""Codecs of signals. Oracles: hand-made tables of rounded numbers; bounds in closed form; the sum
property of error feedback."""

from __future__ import annotations

import math

import pytest
import torch

from hamdist.config import Compress
from hamdist.dynamics.modules.subspace import Subspace, hadamard, rotated, rotated_back
from hamdist.runtime.signals.codec import Codec, Decoder, Encoder

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CODES = ["fp16", "bf16", "int8", "int4", "delta", "codebook", "topk"]


def codec(name, row, dtype=F32, **options):
    return Codec(Compress(name), dtype, tuple(row), **options)


def through(c, x):
    return c.decode(c.encode(x))


@pytest.mark.parametrize(
    ("name", "exact", "decoded"),
    [
        # 11 bits: half-way cases go to the even neighbour; the smallest number is 2^-24
        (
            "fp16",
            [1 + 2**-11, 1 + 3 * 2**-11, 2049.0, 2**-24, 2**-26],
            [1, 1 + 2**-9, 2048, 2**-24, 0],
        ),
        # 8 bits, and float32's range
        (
            "bf16",
            [1 + 2**-8, 1 + 3 * 2**-8, 257.0, 2.0**100, -3.0],
            [1, 1 + 2**-6, 256, 2.0**100, -3],
        ),
    ],
)
def test_halves(name, exact, decoded):
    c = codec(name, [5])
    sent = c.encode(torch.tensor([exact]))
    assert sent.nbytes == c.nbytes(1) == 10
    assert torch.equal(c.decode(sent), torch.tensor([decoded], dtype=F32))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_int8_by_hand(dtype):
    """Rows of the scales 1, 1/2, 0 and 2^-40, whatever is beside them."""
    exact = torch.tensor(
        [
            [127.0, -63.6, 0.4, 1.5],  # 1.5 goes to the even 2
            [-63.5, 0.2, 0.3, 0.0],
            [0.0, 0.0, 0.0, 0.0],
            [127 * 2.0**-40, -(2.0**-41), -3 * 2.0**-41, 2.0**-42],
        ],
        dtype=dtype,
    )
    decoded = torch.tensor(
        [
            [127.0, -64.0, 0.0, 2.0],
            [-63.5, 0.0, 0.5, 0.0],
            [0.0, 0.0, 0.0, 0.0],
            [127 * 2.0**-40, 0.0, -(2.0**-39), 0.0],
        ],
        dtype=dtype,
    )
    c = codec("int8", [4], dtype)
    sent = c.encode(exact)
    assert sent.dtype == torch.int8
    assert sent.nbytes == c.nbytes(4) == 4 * (4 + dtype.itemsize)
    assert torch.equal(c.decode(sent), decoded)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("row", [(50,), (3, 5, 4)])
def test_int8_is_off_by_half_a_scale_at_most(dtype, row):
    generator = torch.Generator().manual_seed(1)
    sizes = 10.0 ** torch.arange(-20, 20, 5).view(-1, *[1] * len(row))
    x = (torch.randn(8, *row, generator=generator) * sizes).to(dtype)
    found = through(codec("int8", row, dtype), x)
    assert found.shape == x.shape
    assert found.dtype == dtype
    apart = (found.double() - x.double()).abs().flatten(1).amax(1)
    largest = x.double().abs().flatten(1).amax(1)
    rounding = {F32: 1e-6, F64: 1e-14, BF16: 2**-8}[dtype] * largest
    assert (apart <= largest / 254 + rounding).all()
    assert (apart > largest / 2540).all()  # and it is int8, no finer


def test_the_numbers_of_a_row_do_not_depend_on_its_neighbours():
    c = codec("int8", [6])
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    x[1] *= 1e6
    for b in range(4):
        assert torch.equal(through(c, x)[b : b + 1], through(c, x[b : b + 1]))


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_as_it_is(name, odd):
    x = torch.ones(2, 8)
    x[1, 3] = odd
    c = codec(name, [8])
    assert c.encode(x) is x
    assert c.decode(x) is x
    encoder = Encoder(codec(name, [8], feedback=name != "delta"))
    encoder(torch.full((2, 8), 0.3))
    kept = encoder.error, encoder.received
    assert encoder(x) is x
    assert (encoder.error, encoder.received) == kept


def test_too_large_for_the_type_goes_as_it_is():
    large = torch.full((1, 8), 70_000.0)
    assert codec("fp16", [8]).encode(large) is large
    huge = torch.full((1, 8), 1e300, dtype=F64)
    assert codec("bf16", [8], F64).encode(huge) is huge
    assert through(codec("int8", [8], F64), huge).allclose(huge)
    assert through(codec("int8", [8]), torch.full((1, 8), 3e38)).allclose(torch.tensor(3e38))


def test_the_smallest_numbers_stay_in_range():
    """A scale that is rounded to 2^-149, or to nothing: nothing changes its sign or its size."""
    for n in (1, 60, 64, 100, 127, 190, 191):
        x = torch.tensor([[n, -n, 1, 0]], dtype=F64).mul(2.0**-149).to(F32)
        found = through(codec("int8", [4]), x)
        assert ((found == 0) | (found.sign() == x.sign())).all()
        assert found.abs().max() <= 2 * x.abs().max()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_to_compress(shape):
    empty = torch.empty(shape)
    for name in CODES:
        c = codec(name, shape[1:])
        assert c.encode(empty) is empty
        assert c.decode(empty) is empty


@pytest.mark.parametrize(
    ("name", "row", "dtype", "pays"),
    [
        ("fp16", [1], F32, True),
        ("fp16", [9], torch.float16, False),
        ("fp16", [9], BF16, False),
        ("bf16", [9], F64, True),
        ("bf16", [9], torch.int64, False),
        ("int8", [1], F32, False),  # 5 bytes for 4
        ("int8", [2], F32, True),
        ("int8", [4], BF16, False),
        ("int8", [5], BF16, True),
        ("int8", [1], F64, False),
        ("int8", [2], F64, True),
        ("int8", [], F32, False),
        ("int8", [0], F32, False),
        ("int8", [9], torch.bool, False),
        ("int4", [1], F32, True),  # 3 bytes for 4
        ("int4", [1], BF16, False),
        ("int4", [9], torch.int64, False),
        ("delta", [9], torch.int32, False),
        ("topk", [1], F32, False),
        ("topk", [2], F32, True),  # 1 of them
    ],
)
def test_what_pays(name, row, dtype, pays):
    assert codec(name, row, dtype).pays is pays


def sylvester(m):
    """The matrix of Walsh and Hadamard, by its definition."""
    return torch.tensor(
        [[(-1.0) ** (i & j).bit_count() for j in range(m)] for i in range(m)], dtype=F64
    ) / math.sqrt(m)


def test_hadamard_is_the_matrix():
    for m in (1, 2, 4, 32):
        assert torch.allclose(hadamard(torch.eye(m, dtype=F64)), sylvester(m), atol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 5, 64, 100, 127])
def test_a_rotation_is_orthonormal_and_spreads_one_number_over_all(n):
    eye = torch.eye(n, dtype=F64)
    turned = rotated(eye, 3)
    assert torch.allclose(turned @ turned.T, eye, atol=1e-14)
    assert torch.allclose(rotated_back(turned.clone(), 3), eye, atol=1e-14)
    if n.bit_count() == 1:
        assert torch.allclose(turned.abs(), torch.full((n, n), n**-0.5, dtype=F64))
    if n > 2:
        assert not torch.equal(turned, rotated(eye, 4))  # the seed draws the signs


def test_int4_by_hand():
    """A rotation of two numbers: x = R^T y for y on the grid of the scale 2 comes back whole, and
    what lies between goes to the nearest level."""
    c = codec("int4", [2], F64, seed=5)
    for y, levels in (([14.0, -6.0], [14, -6]), ([14.0, 2.9], [14, 2]), ([-14.0, 0.9], [-14, 0])):
        x = rotated_back(torch.tensor([y], dtype=F64), 5)
        sent = c.encode(x)
        assert (sent.dtype, sent.nbytes) == (torch.uint8, c.nbytes(1)) == (torch.uint8, 3)
        found = rotated(c.decode(sent), 5)
        assert torch.allclose(found, torch.tensor([levels], dtype=F64), atol=1e-13)


@pytest.mark.parametrize("row", [(50,), (63,), (3, 64), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_int4_is_off_by_half_a_scale_in_the_rotated_vector(row, dtype):
    generator = torch.Generator().manual_seed(1)
    sizes = 10.0 ** torch.arange(-20, 20, 5).view(-1, *[1] * len(row))
    x = (torch.randn(8, *row, generator=generator) * sizes).to(dtype)
    c = codec("int4", row, dtype, seed=9)
    n = row[-1] if row[-1] == 64 else math.prod(row)
    sent = c.encode(x)
    assert sent.nbytes == c.nbytes(8) == 8 * (math.prod(row) // n) * ((n + 1) // 2 + 2)
    decoded = c.decode(sent)
    assert (decoded.shape, decoded.dtype) == (x.shape, dtype)
    exact, found = (rotated(t.double().reshape(-1, n), 9) for t in (x, decoded))
    largest = exact.abs().amax(1)
    apart = (found - exact).abs().amax(1)
    assert (apart <= largest * (1 / 14 + 2**-7)).all()  # (the scale has 8 bits)
    assert (apart > largest / 100).all()


def test_the_signs_do_not_depend_on_the_batch_or_the_process():
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
    c = codec("int4", [100], seed=1)
    for b in range(4):
        assert torch.equal(through(c, x)[b : b + 1], through(c, x[b : b + 1]))
    first = rotated(torch.ones(1, 2), 1)  # signs, and so 0 and +-sqrt 2 in some order
    assert sorted(first.abs().flatten().tolist()) == [0.0, pytest.approx(math.sqrt(2))]


def test_topk_by_hand():
    c = codec("topk", [8], share=0.25)
    x = torch.tensor([[0.5, -3.0, 0.0, 2.0, 1.5, -0.25, 0.0, 0.0], [0.0] * 7 + [257.0]])
    sent = c.encode(x)
    assert (sent.dtype, sent.nbytes) == (torch.uint8, c.nbytes(2)) == (torch.uint8, 16)
    found = c.decode(sent)
    assert torch.equal(found[0], torch.tensor([0.0, -3, 0, 2, 0, 0, 0, 0]))
    assert torch.equal(found[1], torch.tensor([0.0] * 7 + [256]))  # numbers are bfloat16
    wide = codec("topk", [2**15 + 1], share=1e-9)  # a place beyond two bytes
    x = torch.zeros(1, 2**15 + 1)
    x[0, -1] = 2
    assert wide.nbytes(1) == 6
    assert torch.equal(through(wide, x), x)


def test_topk_with_feedback_sends_what_waited_longest():
    """Of constant [4, 1] one number: after four of the large one the small one has grown to 5."""
    encoder = Encoder(codec("topk", [2], F64, feedback=True, share=0.5))
    x = torch.tensor([[4.0, 1.0]], dtype=F64)
    found = [encoder.codec.decode(encoder(x))[0].tolist() for _ in range(5)]
    assert found == [[4, 0], [4, 0], [4, 0], [4, 0], [0, 5]]


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_delta_receives_what_the_sender_knows_and_closes_in_on_a_still_signal(dtype):
    """Both ends add up alike; of a signal that stands still 1/14 of the difference is left at most
    (half a level of seven), of each difference again."""
    c = codec("delta", [64], dtype)
    encoder, decoder = Encoder(c), Decoder(c)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    left = []
    for _ in range(5):
        seen = decoder(encoder(x))
        assert torch.equal(seen, encoder.received)
        left.append((seen.double() - x.double()).norm().item())
    size = x.double().norm().item()
    assert left[0] < size / 3
    assert left[1] < left[0] / 3
    assert left[4] < size * {F32: 1e-4, F64: 1e-4, BF16: 2**-6}[dtype]
    decoder(encoder(x[:2]))  # another batch: from zero
    assert (encoder.received.double() - x[:2].double()).norm() > size / 100


def test_delta_steps_over_what_goes_as_it_is():
    c = codec("delta", [8], F64)
    encoder, decoder = Encoder(c), Decoder(c)
    x = torch.ones(1, 8, dtype=F64)
    decoder(encoder(x))
    odd = torch.full_like(x, math.nan)
    assert decoder(encoder(odd)) is odd
    assert torch.equal(decoder(encoder(x)), encoder.received)
    assert torch.allclose(encoder.received, x, atol=1e-2)


def clusters(count=50, rows=64, places=12, n=64, spread=0.01):
    """Thirty signals: one of `count` vectors, one for the place, and little else."""
    generator = torch.Generator().manual_seed(3)
    kinds, own = (torch.randn(k, n, generator=generator) for k in (count, places))
    for _ in range(30):
        kind = torch.randint(count, (rows, places), generator=generator)
        rest = torch.randn(rows, places, n, generator=generator)
        yield kinds[kind] + 0.3 * own + spread * rest


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_a_codebook_learns_what_repeats_at_both_ends(dtype):
    """What is left of the error is int4's of the rest, about 1/8 of it (and of bf16's rounding)."""
    c = codec("codebook", [12, 64], dtype)
    encoder, decoder = Encoder(c), Decoder(c)
    for x in clusters():
        sent = encoder(x.to(dtype))
        assert sent.nbytes == c.nbytes(64) == 64 * 12 * (32 + 1 + 1)
        seen = decoder(sent)
        assert torch.equal(encoder.received, decoder.received)
        off = (seen.double() - x.double()).norm() / x.double().norm()
    first = through(codec("int4", [12, 64], dtype), x.to(dtype)).double()
    assert (first - x).norm() / x.norm() > 0.08
    assert off < (0.006 if dtype is not BF16 else 0.01)


def test_a_codebook_by_loops():
    """The table after each signal, written down once more vector by vector."""
    c = codec("codebook", [2], F64, seed=4)  # rows of 2: one place, vectors of 2
    encoder = Encoder(c)
    book, place = [[0.0, 0.0, 0.0] for _ in range(256)], [0.0, 0.0, 0.0]
    generator = torch.Generator().manual_seed(5)
    for rows in (3, 300, 1300, 1300, 1300, 20):
        sent = encoder(torch.randn(rows, 2, generator=generator, dtype=F64))
        decoded = c.decode(sent, encoder_before(encoder, book, place))
        v = [[d - p for d, p in zip(row, place, strict=False)] for row in decoded.tolist()]
        chosen = [[] for _ in book]
        for row, j in zip(v, sent[:, -1].tolist(), strict=True):
            chosen[j].append(row)
        forget = max(0.5, 1 - rows / 4096)
        for j, entry in enumerate(book):
            mine = chosen[j]
            entry[2] = entry[2] * forget + len(mine)
            for k in range(2):
                change = sum(row[k] - entry[k] for row in mine)
                entry[k] += change / max(entry[2], 1)
        unused = [entry for entry in book if entry[2] < 0.5][:rows]
        for i, entry in enumerate(unused):
            entry[:] = [*v[i * (rows // len(unused))], 1.0]
        place[2] = place[2] * 19 / 20 + 1
        for k in range(2):
            place[k] += (sum(row[k] for row in v) / rows) / place[2]
        assert torch.allclose(encoder.received, torch.tensor([*book, place], dtype=F64), atol=1e-12)


def encoder_before(encoder, book, place):
    """The table of which the latest signal was encoded: as the loops have it, once there is one."""
    return torch.tensor([*book, place], dtype=F64) if place[2] else None


def test_scales_of_a_codebook_have_a_byte():
    """Three bits behind the first; from 2^-20 to below 2^12, beyond it signals go as they are."""
    c = codec("codebook", [64])
    for scale, near in ((2.0**-20, 1e-4), (0.8125, 1e-4), (1.875 * 2**11, 1e-4), (1.11, 0.02)):
        x = scale * torch.tensor([7.0] + 63 * [0.0]).repeat(1, 1)
        x = rotated_back(x, 0)  # so that the rotated vector has one number of 7 scales
        assert torch.allclose(through(c, x), x, rtol=near, atol=1e-30)
    large = torch.full((1, 64), 8 * 2.0**12)
    assert c.encode(large) is large
    tiny = torch.full((1, 64), 2.0**-60)
    assert (through(c, tiny) - tiny).abs().max() <= 7 * 2.0**-20
    assert torch.equal(through(c, 0 * tiny), 0 * tiny)


def test_a_subspace_is_a_projection_of_its_rank():
    for width, rank in ((8, 3), (20, 20), (50, 7)):
        p = Subspace(width, rank, seed=2, dtype=F64).projection
        assert torch.allclose(p @ p, p, atol=1e-14)
        assert torch.allclose(p, p.T, atol=1e-14)
        assert torch.linalg.matrix_rank(p) == rank
    with pytest.raises(ValueError, match="rank is 9: a subspace of 8 dimensions has 1 to 8"):
        Subspace(8, 9)


@pytest.mark.parametrize("feedback", [False, True])
def test_behind_a_subspace_coefficients_are_sent(feedback):
    """Of states within it nothing is lost, of messages what the block's projection drops."""
    p = Subspace(24, 5, seed=3, dtype=F64)
    x = torch.randn(4, 6, 24, dtype=F64, generator=torch.Generator().manual_seed(1))
    options = {"rank": 5, "basis": 3}
    c = codec("subspace", [6, 24], F64, **options)
    encoder, decoder = Encoder(c), Decoder(c)
    for signal in (x, p(x)):
        sent = encoder(signal)
        assert sent.nbytes == c.nbytes(4) == 4 * 6 * 5 * 8
        assert torch.allclose(decoder(sent), p(x), atol=1e-13)
    assert encoder.result().saved == 2 * 4 * 6 * 19 * 8
    rough = codec("int8", [6, 24], F64, feedback=feedback, **options)
    assert rough.nbytes(4) == 4 * (6 * 5 + 8)
    encoder, decoder = Encoder(rough), Decoder(rough)
    for _ in range(3):
        assert (decoder(encoder(x)) - p(x)).norm() < p(x).norm() / 50
    odd = torch.full_like(x, math.nan)
    assert decoder(encoder(odd)) is odd


def test_feedback_by_hand():
    """0.4 beside 127: every fifth signal the debts are paid, two units for five times 0.4."""
    encoder = Encoder(codec("int8", [2], F64, feedback=True))
    x = torch.tensor([[127.0, 0.4]], dtype=F64)
    found = [encoder.codec.decode(encoder(x))[0, 1].item() for _ in range(10)]
    assert found == [0, 1, 0, 1, 0, 0, 1, 0, 1, 0]
    plain = Encoder(codec("int8", [2], F64))
    assert [plain.codec.decode(plain(x))[0, 1].item() for _ in range(10)] == [0] * 10


@pytest.mark.parametrize("name", ["int8", "int4", "topk"])
@pytest.mark.parametrize("row", [(30,), (2, 3, 5)])
def test_with_feedback_the_sum_is_exact_but_for_the_last_error(row, name):
    encoder = Encoder(codec(name, row, F64, feedback=True))
    generator = torch.Generator().manual_seed(4)
    exact, decoded = torch.zeros(3, *row, dtype=F64), torch.zeros(3, *row, dtype=F64)
    largest = 0.0
    for _ in range(50):
        x = torch.randn(3, *row, dtype=F64, generator=generator)
        largest = max(largest, x.abs().max().item())
        exact += x
        decoded += encoder.codec.decode(encoder(x))
    assert (exact - decoded - encoder.error).abs().max() < 1e-12
    if name == "int8":
        assert encoder.error.abs().max() <= largest / 127


def test_the_error_begins_anew_with_another_batch():
    encoder = Encoder(codec("int8", [3], feedback=True))
    x = torch.tensor([[127.0, 0.4, -0.3]])
    encoder(x.repeat(2, 1))
    assert torch.equal(encoder.codec.decode(encoder(x)), torch.tensor([[127.0, 0.0, 0.0]]))
    assert encoder.error.shape == (1, 3)


def test_what_is_reported():
    """Of [3, 4] ones are off by nothing; rows [127, 0.4]: 0.4 of a norm of about 127."""
    encoder = Encoder(codec("int8", [2]))
    for x in ([[127.0, 0.4]], [[0.0, 0.0]], [[127.0, 2.0]], [[math.inf, 1.0]]):
        encoder(torch.tensor(x))
    done = encoder.result()
    off = 0.4 / math.hypot(127, 0.4)
    assert (done.codec, done.feedback, done.signals) == ("int8", False, 4)
    assert done.sent == 3 * 6 + 8
    assert done.saved == 3 * 2
    assert done.mean == pytest.approx(off / 2, rel=1e-5)
    assert done.worst == pytest.approx(off, rel=1e-5)


def test_nobody_writes_to_the_signal():
    x = torch.randn(4, 6)
    before = x.clone()
    for name in CODES:
        encoder = Encoder(codec(name, [6], feedback=name in ("int8", "int4", "topk")))
        encoder(x)
        encoder(x)
        assert torch.equal(x, before)
