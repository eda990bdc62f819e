def forward(w: int, b: int, x: int, y: int, out: int, into: int, flags: int, /) -> None: ...
def pull(
    w: int,
    b: int,
    x: int,
    z: int,
    y: int,
    d: int,
    m: int,
    out: int,
    into: int,
    flags: int,
    alpha: float,
    beta: float,
    limit: float,
    /,
) -> bool: ...
def norm(x: int, n: int, flags: int, /) -> float: ...
def chain_forward(layers: int, n: int, x: int, inner: int, y: int, flags: int, /) -> None: ...
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
    flags: int,
    limit: float,
    /,
) -> int: ...
