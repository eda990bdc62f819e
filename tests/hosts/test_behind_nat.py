"""Hosts that nobody can connect to, on a network of WireGuard by way of the head. Oracles: the
in-process engine; a connection that does not come about.

Needs wg, nft and wireguard-go (Debian: wireguard-tools, nftables, wireguard-go).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from hosts.namespaces import hosts, why_not
from hosts.test_across_hosts import ACROSS, EACH

MISSING = [c for c in ("wg", "nft", "wireguard-go") if shutil.which(c) is None]

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(reason := why_not()), reason=reason or "hosts can be made"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}"),
    pytest.mark.timeout(300),
]

PORT = 51820
# What comes in only as an answer, or through the tunnel:
WALL = """
add table inet wall
add chain inet wall input { type filter hook input priority 0; policy drop; }
add rule inet wall input ct state established,related accept
add rule inet wall input iif lo accept
add rule inet wall input iifname wg0 accept
"""
UP = """
mkdir -p /run/wireguard && mount -t tmpfs tmpfs /run/wireguard
[ -e wall ] && nft -f wall || echo 1 > /proc/sys/net/ipv4/ip_forward
WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD=1 wireguard-go wg0
wg setconf wg0 wg.conf
ip addr add $1/24 dev wg0 && ip link set wg0 mtu 1380 up
"""
KNOCK = "import socket, sys; socket.create_connection((sys.argv[1], 6701), 3)"


def key():
    """A private and a public key."""
    made = [subprocess.run(["wg", "genkey"], capture_output=True, check=True).stdout]
    made += [subprocess.run(["wg", "pubkey"], input=made[0], capture_output=True).stdout]
    return [one.decode().strip() for one in made]


def configurations(head, addresses):
    """Of the head, which listens, and of hosts that keep a tunnel to it open."""
    keys = [key() for _ in addresses]
    peers = "".join(
        f"[Peer]\nPublicKey={public}\nAllowedIPs={address}/32\n"
        for (_, public), address in list(zip(keys, addresses, strict=True))[1:]
    )
    yield f"[Interface]\nPrivateKey={keys[0][0]}\nListenPort={PORT}\n{peers}"
    way = f"Endpoint={head}:{PORT}\nAllowedIPs=10.88.0.0/24\nPersistentKeepalive=25\n"
    for private, _ in keys[1:]:
        yield f"[Interface]\nPrivateKey={private}\n[Peer]\nPublicKey={keys[0][1]}\n{way}"


def test_equal_where_no_connection_comes_in():
    with hosts(3, ray=False) as h:
        outside, h.net = [h.ip(i) for i in range(3)], "10.88.0."
        inside = [h.ip(i) for i in range(3)]
        for i, text in enumerate(configurations(outside[0], inside)):
            (h.home(i) / "wg.conf").write_text(text)
            if i:
                (h.home(i) / "wall").write_text(WALL)
            h.run(i, ["sh", "-ec", f"cd {h.home(i)}; {UP}", "up", inside[i]])
        h.start_ray(0, wait=False)
        h.await_head()
        for i in (1, 2):
            h.start_ray(i)
        with pytest.raises(RuntimeError, match="timed out"):
            h.python(1, KNOCK, outside[2])
        h.python(1, KNOCK, inside[2])  # (Ray's own port)
        paths = [str(ACROSS.parents[1]), *(path for path in sys.path if path)]
        command = [sys.executable, str(ACROSS), h.address, json.dumps([("trace", EACH)])]
        text = h.run(0, command, seconds=200, PYTHONPATH=os.pathsep.join(paths))
    assert "trace: equal on 3 actors" in text
