"""Rules on machines and their network: what makes a host slow, unlike the others, or hard to find."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .finding import Finding, Seen, advice, error

# The kernels' instruction sets, best first, by the flags that Linux shows; see kernels/runtime.py.
_AVX2 = {"avx2", "fma", "f16c"}
_ISAS = (
    ("avx512vnni", _AVX2 | {"avx512_vnni", "avx512bw", "avx512vl"}),
    ("avx2vnni", _AVX2 | {"avx_vnni"}),
    ("avx2", _AVX2),
    ("neondot", {"asimd", "asimddp"}),
    ("neon", {"asimd"}),
)
_GB = 1e9
_LEAST_FREE_MEMORY, _LEAST_FREE_DISK, _MOST_SWAP = 0.5 * _GB, 2 * _GB, 0.25 * _GB
_GOOD_MBIT, _HOT, _BUSY, _MOST_SKEW, _MOST_LOAD = 1000, 80.0, 0.25, 2.0, 0.5
_FREQUENCIES = "/sys/devices/system/cpu/cpu*/cpufreq"
# What vcgencmd get_throttled tells: now, and since the host was started, 16 bits higher.
_THROTTLED = ((0, "undervoltage"), (1, "clock capped"), (2, "throttled"), (3, "at its limit of temperature"))


def isa(host: Seen) -> str | None:
    """Return the best instruction set that kernels can be compiled for on a host; None where flags are not known."""
    flags = host.get("flags")
    if flags is None:
        return None
    return next((name for name, needed in _ISAS if needed <= set(flags)), "generic")


def alike(host: Seen, first: Seen) -> Iterator[Finding]:
    """Unlike processors work together, but wait for the slowest unless weights are shared out by speed."""
    own, other = ((s.get("architecture"), isa(s), s.get("cores")) for s in (host, first))
    if None not in own and None not in other and own != other:
        said = ["{} {}, {} cores".format(*each) for each in (own, other)]
        what = f"{said[0]}; {first.name} has {said[1]}"
        yield advice(host, what, "run with --split auto, which shares out weights by speed")


def ranks(host: Seen, first: Seen) -> Iterator[Finding]:
    """More ranks than cores take turns."""
    cores = host.get("cores")
    if host.ranks is not None and cores is not None and host.ranks > cores:
        yield advice(host, f"{host.ranks} ranks on {cores} cores", f"give it {cores} at most; one with all is fastest")


def clocks(host: Seen, first: Seen) -> Iterator[Finding]:
    """A governor that saves power, or a limit below what the processor can."""
    found = host.get("clocks")
    if found is None:
        return
    slow = {"powersave", "conservative", "ondemand", "userspace"}
    if found["driver"] in ("intel_pstate", "amd-pstate-epp"):  # there powersave means as fast as asked for
        slow = set()
    own = sorted(slow & set(found["governors"]))
    if own:
        run = f"on {host.name} run echo performance | sudo tee {_FREQUENCIES}/scaling_governor"
        yield advice(host, f"governor {', '.join(own)}", run)
    allowed, most = found["allowed"], found["most"]
    if allowed and most and allowed < 0.95 * most:
        run = f"on {host.name} run echo {int(most * 1000)} | sudo tee {_FREQUENCIES}/scaling_max_freq"
        yield advice(host, f"clock limited to {allowed:.0f} MHz of {most:.0f}", run)


def memory(host: Seen, first: Seen) -> Iterator[Finding]:
    """Little memory, or a host that swaps."""
    found = host.get("memory")
    if not found:
        return
    if found["free"] < _LEAST_FREE_MEMORY:
        what = f"{found['free'] / _GB:.2f} GB of {found['total'] / _GB:.2f} GB memory free"
        yield advice(host, what, f"end what takes it: on {host.name} run ps aux --sort=-rss | head")
    swapped = found["swap"] - found["swap_free"]
    if swapped > _MOST_SWAP:
        what = f"{swapped / _GB:.2f} GB lie in swap"
        yield advice(host, what, f"on {host.name} run sudo swapoff -a && sudo swapon -a, with memory free")


def disk(host: Seen, first: Seen) -> Iterator[Finding]:
    """Caches that cannot be written, or have no room."""
    found = host.get("caches") or {}
    user = host.get("user") or "$USER"
    told = set()
    for name, lost in (("weights", "received anew"), ("kernels", "compiled anew")):
        cache = found.get(name)
        if cache is None or cache["path"] in told:
            continue
        told.add(cache["path"])
        if not cache["is_writable"]:
            what = f"{cache['path']} cannot be written by {user}, so that {name} are {lost} at every start"
            own = f"mkdir -p {cache['path']} && sudo chown -R {user} {cache['path']}"
            yield advice(host, what, f"on {host.name} run sudo {own}")
        elif cache["free"] < _LEAST_FREE_DISK:
            what = f"{cache['free'] / _GB:.2f} GB free for {cache['path']}"
            clear = f"{host.get('python', 'path') or 'python'} -m dllama_mpi cache clear"
            yield advice(host, what, f"make room, or on {host.name} run {clear}")


def heat(host: Seen, first: Seen) -> Iterator[Finding]:
    """Heat, and a supply that is too weak."""
    degrees, bits = host.get("temperature"), host.get("throttled") or 0
    if degrees is not None and degrees >= _HOT:
        yield advice(host, f"{degrees:.0f} degrees Celsius", "cool it: a fan or heat sink")
    now = [name for bit, name in _THROTTLED if bits >> bit & 1]
    before = [name for bit, name in _THROTTLED if bits >> bit + 16 & 1 and name not in now]
    said = [", ".join(now) + " now"] * bool(now) + [", ".join(before) + " since its start"] * bool(before)
    if said:
        weak = bool(bits & 0x10001)
        yield advice(
            host,
            "; ".join(said),
            "use the maker's power supply and a short cable" if weak else "cool it: a fan or heat sink",
        )


def huge_pages(host: Seen, first: Seen) -> Iterator[Finding]:
    """Weights ask for huge pages."""
    if host.get("huge_pages") == "never":
        run = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        yield advice(host, "transparent huge pages are off; weights are read slower", f"on {host.name} run {run}")


def load(host: Seen, first: Seen) -> Iterator[Finding]:
    """Other programs that take processors' time."""
    busiest, load_now, cores = host.get("busiest"), (host.get("load") or [0.0])[0], host.get("cores") or 1
    if busiest and busiest["cores"] >= _BUSY:
        what = (
            f"{busiest['name']} of {busiest['user']} (process {busiest['pid']}) takes {busiest['cores']:.0%} of a core"
        )
        yield advice(host, what, f"if it may end, on {host.name} run kill {busiest['pid']}")
    elif load_now > _MOST_LOAD * cores:
        yield advice(host, f"load {load_now:.2f} on {cores} cores", f"on {host.name} look with top what runs")


def link(host: Seen, first: Seen) -> Iterator[Finding]:
    """Wi-Fi, half duplex, and links below a gigabit."""
    found = host.get("link")
    if not found:
        return
    name, mbit = found["interface"], found["mbit"]
    if found["is_wifi"]:
        yield advice(host, f"{name} is Wi-Fi, whose latency each layer pays for twice", "use a cable")
    elif found["duplex"] == "half":
        run = f"sudo ethtool -s {name} autoneg on"
        yield advice(host, f"{name} is half duplex", f"on {host.name} run {run}; else change cable or switch port")
    elif mbit is not None and mbit < _GOOD_MBIT:
        yield advice(host, f"{name} runs at {mbit} Mbit/s", "use a gigabit switch and cables of category 5e or better")


def skew(host: Seen, first: Seen) -> Iterator[Finding]:
    """Clocks: certificates, pip and files' times need them."""
    seconds = host.get("skew") or 0.0
    if abs(seconds) > _MOST_SKEW:
        what = f"its clock is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} this host's"
        yield advice(host, what, f"on {host.name} run sudo timedatectl set-ntp true")


def names(host: Seen, first: Seen) -> Iterator[Finding]:
    """Every host has to know the others' names: MPICH's launcher is called back by the name of rank 0's host."""
    found = host.get("resolves") or {}
    root = next(iter(found), None)
    for name, address in found.items():
        if address is None:
            is_needed = name == root and first.get("mpi", "kind") != "Open MPI"
            remedy = f"add a line ADDRESS {name} to /etc/hosts on {host.name}"
            yield (error if is_needed else advice)(host, f"cannot resolve {name}", remedy)
    if root is not None and host.get("boot") != first.get("boot") and (found[root] or "").startswith("127."):
        yield error(host, f"takes {root} for itself ({found[root]})", f"correct {root} in /etc/hosts on {host.name}")


RULES = (alike, ranks, clocks, memory, disk, heat, huge_pages, load, link, skew, names)


def twins(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Hosts of one name, whose ranks would divide one host's cores; one machine under two names."""
    for at, host in enumerate(seen):
        for other in seen[:at]:
            if (own := host.get("boot")) is None or (boot := other.get("boot")) is None:
                continue
            name = host.get("hostname")
            if own != boot and name == other.get("hostname"):
                what = f"is named {name} like {other.name}: their ranks take each other for neighbours and share cores"
                yield error(host, what, f"on {host.name} run sudo hostnamectl set-hostname NAME, a name of its own")
                break
            if own == boot and name == other.get("hostname"):
                yield advice(host, f"is the same machine as {other.name}", "keep one of the names")
                break
