def chain_forward(
    layers: int, n: int, x: int, inner: int, y: int, rows: int, gemm: int, flags: int, /
) -> None: ...
def chain_pull(
    layers: int,
    n: int,
    x: int,
    inner: int,
    y: int,
    z: int,
    d: int,
    m: int,
    to: int,
    rates: int,
    rows: int,
    gemm: int,
    flags: int,
    limit: float,
    /,
) -> int: ...
def masked(z: int, y: int, d: int, n: int, flags: int, /) -> float: ...
def columns(b: int, d: int, rows: int, n: int, flags: int, beta: float, /) -> None: ...
def norm(x: int, n: int, flags: int, /) -> float: ...
def cross_entropy(
    y: int, classes: int, loss: int, d: int, rows: int, n: int, minus_ignored: int, flags: int, /
) -> bool: ...
