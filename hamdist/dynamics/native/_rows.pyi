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
