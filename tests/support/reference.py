"""Slow, obvious numpy oracles, written from the definitions."""

import ml_dtypes
import numpy as np


def dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def as_float64(x):
    """Exact; a signalling NaN is no reason for a warning."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x).astype(np.float64)


def codes(name):
    """Every code of a float format, in the order of its bits."""
    bits = ml_dtypes.finfo(dtype(name)).bits
    unsigned = np.uint16 if bits == 16 else np.uint8
    return np.arange(2**bits, dtype=unsigned).view(dtype(name))


def grid(name):
    """The finite values of a format of at most 16 bits, ascending, as float64."""
    kind = dtype(name)
    if kind.kind == "i" or name == "int4":
        info = ml_dtypes.iinfo(kind)
        return np.arange(info.min, info.max + 1, dtype=np.float64)
    values = as_float64(codes(name))
    return np.unique(values[np.isfinite(values)])


def neighbours(x, values):
    """For every element of x the grid values just below (or equal) and just above."""
    x = np.clip(np.asarray(x, np.float64), values[0], values[-1])
    above = np.clip(np.searchsorted(values, x), 0, len(values) - 1)
    below = np.where(values[above] == x, above, np.maximum(above - 1, 0))
    return values[below], values[above]


def round_nearest(x, name):
    """Saturating round to nearest of finite x; a tie goes to the even significand."""
    x = np.asarray(x, np.float64)
    below, above = neighbours(x, grid(name))
    x = np.clip(x, grid(name)[0], grid(name)[-1])
    down, up = x - below, above - x
    # Of two neighbours the even one is a multiple of twice their distance.
    spacing = np.where(above > below, above - below, 1)
    tie = np.where(np.fmod(below, 2 * spacing) == 0, below, above)
    return np.where(down < up, below, np.where(up < down, above, tie))


def block_amax(x, block):
    """One loop over blocks, one slice each."""
    x = np.abs(np.asarray(x, np.float32))
    sizes = [d if b == -1 else b for b, d in zip(block, x.shape, strict=True)]
    counts = [-(-d // b) for b, d in zip(sizes, x.shape, strict=True)]
    out = np.zeros(counts, np.float32)
    for index in np.ndindex(*counts):
        part = tuple(
            slice(i * b, (i + 1) * b) for i, b in zip(index, sizes, strict=True)
        )
        out[index] = x[part].max()
    return out


def spread(scale, shape, block):
    """The scale of every element."""
    out = np.zeros(shape, np.float32)
    sizes = [d if b == -1 else b for b, d in zip(block, shape, strict=True)]
    for index in np.ndindex(*shape):
        at = tuple(i // b for i, b in zip(index, sizes, strict=True))
        out[index] = scale[at]
    return out


def amax_to_scale(amax, name, rounding):
    """By logarithms in float64; amax finite."""
    largest = grid(name)[-1]
    out = np.ones_like(amax, np.float32)
    for index, value in np.ndenumerate(np.asarray(amax, np.float64)):
        if value == 0:
            continue
        if rounding == "exact":
            out[index] = np.float32(value) * np.float32(1 / largest)
        elif rounding == "up":
            out[index] = 2.0 ** np.ceil(np.log2(value / largest))
        else:
            out[index] = 2.0 ** (np.floor(np.log2(value)) - np.floor(np.log2(largest)))
    return out


def quantize(x, name, block, rounding="exact", scale=None):
    """The values in the format (as float64) and the scale of every element."""
    x = np.asarray(x).astype(np.float32)
    if scale is None:
        scale = amax_to_scale(block_amax(x, block), name, rounding)
    scale = spread(scale, x.shape, block)
    return round_nearest(x * (np.float32(1) / scale), name), scale


def fake_quantize(x, name, block, rounding="exact", scale=None):
    """What a quantized x stands for, in float64."""
    values, scale = quantize(x, name, block, rounding, scale)
    return values * scale.astype(np.float64)


def sqnr(exact, approximate):
    """Signal to quantization noise in decibels."""
    exact = as_float64(exact)
    noise = np.linalg.norm(exact - as_float64(approximate))
    return 20 * np.log10(np.linalg.norm(exact) / noise)


def dot_general(lhs, rhs, dimension_numbers):
    """In float64, by einsum: batch, then what is free of lhs, then of rhs."""
    (lc, rc), (lb, rb) = dimension_numbers
    letters = iter("abcdefghijklmnop")
    one = [next(letters) for _ in range(lhs.ndim)]
    two = [next(letters) for _ in range(rhs.ndim)]
    for i, j in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        two[j] = one[i]
    out = [one[i] for i in lb]
    out += [c for i, c in enumerate(one) if i not in (*lb, *lc)]
    out += [c for i, c in enumerate(two) if i not in (*rb, *rc)]
    formula = f"{''.join(one)},{''.join(two)}->{''.join(out)}"
    return np.einsum(formula, np.float64(lhs), np.float64(rhs)), formula


def dot_general_and_gradients(lhs, rhs, grad, dimension_numbers, fakes):
    """Fake-quantized product and gradients, in float64.

    ``fakes`` maps (tensor, product) to a function of the tensor and the axes that the
    product contracts; tensors are "lhs", "rhs", "grad".
    """
    _, formula = dot_general(lhs, rhs, dimension_numbers)
    inputs, out = formula.split("->")
    one, two = inputs.split(",")
    products = {
        "out": ("lhs", one, lhs, "rhs", two, rhs, out),
        "lhs_grad": ("grad", out, grad, "rhs", two, rhs, one),
        "rhs_grad": ("lhs", one, lhs, "grad", out, grad, two),
    }
    results = []
    for product, (a, a_axes, x, b, b_axes, y, target) in products.items():
        summed = set(a_axes) & set(b_axes) - set(target)
        x = fakes[a](x, product, tuple(a_axes.index(c) for c in sorted(summed)))
        y = fakes[b](y, product, tuple(b_axes.index(c) for c in sorted(summed)))
        results.append(np.einsum(f"{a_axes},{b_axes}->{target}", x, y))
    return results
