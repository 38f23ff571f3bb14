# SPDX-License-Identifier: Apache-2.0
"""A user for whom the modes of files hold: this one, or root without the right to pass over them.

Root keeps its id, because Python itself may lie where no other user may enter.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

COMMAND = [] if os.getuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]  # stands before another
DAC_BITS = 1 << 1 | 1 << 2  # of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, linux/capability.h
VERSION = 0x20080522  # of the structures that the kernel takes


def drop_rights() -> None:
    """Give up root's right to pass over modes, in this thread alone."""
    if os.getuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for number in range(3):  # effective, permitted and inheritable
        sets[number] &= ~DAC_BITS
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def call_as_user(function: Callable[[], Result]) -> Result:
    """Return what a function returns in a thread that has no right to pass over modes."""
    with ThreadPoolExecutor(1, initializer=drop_rights) as pool:
        return pool.submit(function).result()
