"""CRC32C of joined pieces from the CRC32C of each, so that no byte is read twice for two checksums that cover it. Pure arithmetic.

A CRC is a polynomial over GF(2) modulo the Castagnoli polynomial; appending n bytes multiplies it by x^(8 n).
"""

from functools import lru_cache

POLYNOMIAL = 0x82F63B78  # bit-reversed: the highest bit is the coefficient of x^0
ONE = 1 << 31


def combine(first: int, second: int, second_bytes: int) -> int:
    """CRC32C of A + B, of which `first` and `second` are the checksums and `second_bytes` is the length of B."""
    return _times(_power(second_bytes), first) ^ second


def _times(a: int, b: int) -> int:
    """Product of two polynomials."""
    product, bit = 0, ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(4096)
def _power(num_bytes: int) -> int:
    """x^(8 num_bytes), by squaring."""
    result, factor, exponent = ONE, ONE >> 1, 8 * num_bytes
    while exponent:
        if exponent & 1:
            result = _times(factor, result)
        factor, exponent = _times(factor, factor), exponent >> 1
    return result
