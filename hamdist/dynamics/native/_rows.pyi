LAYOUT: int

def chain_forward(
    operations: int, n: int, x: int, inner: int, y: int, gemm: int, flags: int, /
) -> bool: ...
def chain_pull(
    operations: int,
    ways: int,
    n: int,
    x: int,
    inner: int,
    y: int,
    z: int,
    d: int,
    m: int,
    apart: int,
    to: int,
    rates: int,
    gemm: int,
    flags: int,
    limit: float,
    /,
) -> int: ...
def norm(x: int, n: int, flags: int, /) -> float: ...
def cross_entropy(
    y: int, classes: int, loss: int, d: int, rows: int, n: int, minus_ignored: int, flags: int, /
) -> bool: ...
