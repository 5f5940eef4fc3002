"""The CRC-32 of bytes that are read in parts by several threads, put together from the CRC-32 of each part.

A CRC is the remainder of a polynomial over GF(2), so that bytes which follow shift the remainder of those before them.
"""

from __future__ import annotations

from functools import lru_cache

POLYNOMIAL = 0xEDB88320  # of zlib.crc32; the highest bit is the coefficient of x**0
ONE, X = 1 << 31, 1 << 30


def joined(first: int, second: int, length: int) -> int:
    """zlib.crc32(a + b), given that of a, that of b, and len(b)."""
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
