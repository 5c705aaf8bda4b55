# Chooses the network interface that NCCL and gloo use between nodes. To be sourced, by bash:
#
#   source launch/network.sh MASTER_ADDRESS
#
# In:  MASTER_ADDRESS        name or address of node 0, as this node sees it
#      NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   what is set already stays as it is
# Out: both variables, exported: the interface whose own address this node speaks from when it
#      speaks to node 0. On node 0 that is the interface which carries the address. Where its name
#      means a loopback address (some /etc/hosts have 127.0.1.1, some job operators "localhost"), it
#      is the interface of the default route. A line on stderr says what was chosen and why.
#      Status 1 and one line if there is none.

# Prints the interface; on stderr, why or why not.
spectral_ds_interface() {
    "$(command -v python || command -v python3)" - "$1" <<'PY'
import ipaddress
import socket
import sys

try:
    import psutil
except ImportError:
    sys.exit("network: python has no psutil, which comes with deepspeed: install that, or set "
             "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME")

# Where the default route would lead; nothing is sent there.
ELSEWHERE = ("192.0.2.1", "2001:db8::1")


def own_address(to):
    """The address that this node speaks from."""
    error = None
    for family, kind, _, _, place in socket.getaddrinfo(to, 1, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as probe:
                probe.connect(place)
                return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
        except OSError as problem:
            error = error or problem
    raise error


def interface(address):
    for name, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family in (socket.AF_INET, socket.AF_INET6):
                if ipaddress.ip_address(each.address.partition("%")[0]) == address:
                    return name
    raise OSError(f"no interface has the address {address}")


master, way = sys.argv[1], "the way to node 0"
try:
    address = own_address(master)
    if address.is_loopback:
        for elsewhere in ELSEWHERE:
            try:
                address = own_address(elsewhere)
            except OSError:
                continue
            way = "the default route"
            break
    name = interface(address)
except OSError as error:
    reason = error.strerror or error
    sys.exit(f"network: no way to node 0, {master} ({reason}): correct the address, or set "
             "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME")
print(f"network: {name} ({address}), {way}, {master}", file=sys.stderr)
print(name)
PY
}

if [[ -z ${NCCL_SOCKET_IFNAME:-} || -z ${GLOO_SOCKET_IFNAME:-} ]]; then
    spectral_ds_chosen=$(spectral_ds_interface "${1:?network: needs the name or address of node 0}") || return 1
    # NCCL takes a bare name for a prefix.
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-=$spectral_ds_chosen}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$spectral_ds_chosen}
    unset spectral_ds_chosen
fi
unset -f spectral_ds_interface
