# SPDX-License-Identifier: Apache-2.0
"""Numbers as people read them, and the instance hours that they pay for."""

MIB = 2**20
GIB = 2**30


def show_count(number: float) -> str:
    """Return a whole number in groups of three digits."""
    return f"{number:,.0f}"


def show_large(number: float) -> str:
    """Return three significant digits of millions, billions or trillions, such as 8.19 B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return show_count(number)


def show_share(share: float) -> str:
    """Return a share of 1 in percent, such as 8.3% or 42%."""
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def show_duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(place for place, (number, _) in enumerate(parts) if number)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number)


def count_instance_hours(num_hosts: int, started: float, until: float) -> float:
    """Return the hours that are billed between two times in seconds, for all hosts, also those that only wait."""
    return num_hosts * (until - started) / 3600


def show_number(number: float) -> str:
    """Return four significant digits, or from a thousand on a whole number in groups of three digits."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def show_bytes(size_bytes: float) -> str:
    """Return a size such as 9.6 GiB, 80 GiB or 64 MiB."""
    if size_bytes < GIB:
        return f"{size_bytes / MIB:.0f} MiB"
    return f"{size_bytes / GIB:.1f}".removesuffix(".0") + " GiB"
