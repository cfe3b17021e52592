"""FP8 products by NumPy, tile by tile, from the report's sec. 3.3 and golden C3's rules."""

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
FLOOR, TINY = np.float32(1e-4), np.float32(448 * 2.0**-126)


def quantized(x, block: tuple[int, int], power_of_two: bool = False, floor=FLOOR) -> np.ndarray:
    """Return x [R D] as E4M3 values times scales, one scale per block."""
    x = np.asarray(x, np.float32)
    out = np.zeros_like(x)
    for i in range(0, x.shape[0], block[0]):
        for j in range(0, x.shape[1], block[1]):
            part = x[i : i + block[0], j : j + block[1]]
            scale = max(np.abs(part).max(), floor) / np.float32(448)
            if power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
            values = (part / scale).astype(E4M3).astype(np.float32)
            out[i : i + block[0], j : j + block[1]] = values * scale
    return out


def e5m6(x) -> np.ndarray:
    """x with 6 bits of fraction, ties to even."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return np.ldexp(np.round(fraction * 2**7) / 2**7, exponent).astype(np.float32)


def matmul(x, w, power_of_two: bool = False) -> np.ndarray:
    """Fprop, 128 of the inner dimension at a time, summed in float64."""
    x, w = quantized(x, (1, 128), power_of_two), quantized(w, (128, 128))
    pieces = (slice(k, k + 128) for k in range(0, x.shape[1], 128))
    return sum(x[:, k].astype(np.float64) @ w[k].astype(np.float64) for k in pieces)


def gradients(x, w, grad, power_of_two: bool = False, save_e5m6: bool = False):
    """Dgrad and Wgrad of `matmul`; the input was saved in tiles 1x128, or with 6 bits."""
    d_x = quantized(grad, (1, 128), floor=TINY).astype(np.float64) @ quantized(w, (128, 128)).T
    saved = e5m6(x) if save_e5m6 else quantized(x, (1, 128), power_of_two)
    transposed = quantized(saved, (128, 1), power_of_two).astype(np.float64)
    return d_x, transposed.T @ quantized(grad, (128, 1), floor=TINY)


def swiglu(hidden, gates) -> np.ndarray:
    gate, up = np.split(np.asarray(hidden, np.float64), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up * np.asarray(gates, np.float64)[:, None]
