"""CRC-32, as in zlib and gzip, of bytes, of files, and of files whose parts are read by several threads.

The package isal computes it three to four times as fast as zlib (docs/LOG.md); zlib is the fallback.
"""

from __future__ import annotations

import os
from functools import lru_cache
from io import BufferedReader, FileIO

try:
    from isal.isal_zlib import crc32 as crc32
except ImportError:
    from zlib import crc32 as crc32

READ_BYTES = 1 << 22  # small enough to stay in the CPU caches, large enough that threads seldom wait for the GIL

POLYNOMIAL = 0xEDB88320  # that of zlib.crc32; the highest bit is the coefficient of x**0
ONE, X = 1 << 31, 1 << 30


def file_crc32(file: BufferedReader | FileIO) -> int:
    """CRC-32 of an open file from its current position to its end.

    Raises:
        OSError: the file cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    checksum, buffer = 0, memoryview(bytearray(min(size, READ_BYTES) or 1))  # most files of a run are small
    while count := file.readinto(buffer):
        checksum = crc32(buffer[:count], checksum)
    return checksum


def part_crc32(handle: int, start: int, length: int) -> int:
    """CRC-32 of `length` bytes of an open file, starting at offset `start`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is shorter.
    """
    checksum, end = 0, start + length
    buffer = memoryview(bytearray(min(length, READ_BYTES)))
    while start < end:
        count = os.preadv(handle, [buffer[: end - start]], start)
        if not count:
            raise ValueError("it became shorter while it was read")
        checksum = crc32(buffer[:count], checksum)
        start += count
    return checksum


def joined(first: int, second: int, length: int) -> int:
    """crc32(a + b), given crc32(a), crc32(b) and len(b).

    A CRC is the remainder of a polynomial over GF(2), so appending n bytes multiplies the remainder by x**(8 n).
    """
    return _product(first, _power(8 * length)) ^ second


def _product(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    result = 0
    for place in range(31, -1, -1):
        if a >> place & 1:
            result ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)  # times x
    return result


@lru_cache(maxsize=1024)
def _power(exponent: int) -> int:
    """x**exponent modulo the polynomial."""
    result, square = ONE, X
    while exponent:
        if exponent & 1:
            result = _product(result, square)
        square = _product(square, square)
        exponent >>= 1
    return result
