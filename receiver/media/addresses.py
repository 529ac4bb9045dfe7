"""The addresses to which a download may not connect.

`ipaddress.is_global` would allow too much: it is true for multicast, and for the NAT64 and 6to4 spellings of
127.0.0.1.
"""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network

# Every IPv6 address outside of global unicast is forbidden: loopback, v4-compatible, both NAT64 prefixes,
# discard-only, SRv6, unique local, link-local, site-local, multicast. The table lists the forbidden networks
# inside it.
_V6_GLOBAL = IPv6Network("2000::/3")
_FORBIDDEN = {
    ip_network(network): why
    for network, why in {
        "0.0.0.0/8": "this host",
        "10.0.0.0/8": "private",
        "100.64.0.0/10": "carrier-grade NAT",
        "127.0.0.0/8": "loopback",
        "169.254.0.0/16": "link-local",
        "172.16.0.0/12": "private",
        "192.0.0.0/24": "protocol assignments",
        "192.0.2.0/24": "documentation",
        "192.31.196.0/24": "AS112",
        "192.52.193.0/24": "AMT",
        "192.88.99.0/24": "6to4 relay",
        "192.168.0.0/16": "private",
        "192.175.48.0/24": "AS112",
        "198.18.0.0/15": "benchmarking",
        "198.51.100.0/24": "documentation",
        "203.0.113.0/24": "documentation",
        "224.0.0.0/4": "multicast",
        "240.0.0.0/4": "reserved",
        "2001::/23": "protocol assignments, Teredo, benchmarking, ORCHID",
        "2001:db8::/32": "documentation",
        "2002::/16": "6to4",
        "2620:4f:8000::/48": "AS112",
        "3ffe::/16": "6bone",
        "3fff::/20": "documentation",
    }.items()
}


def forbidden(address: IPv4Address | IPv6Address) -> str | None:
    """Return the reason why `address` is forbidden; None if it is an ordinary public one."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return forbidden(address.ipv4_mapped)
        if address not in _V6_GLOBAL:
            return "not global unicast"
    return next((why for network, why in _FORBIDDEN.items() if address in network), None)
