// Swish with learnable scale and slope, y = a x s(b x) with s the logistic function, and its first and second
// derivatives in one pass each. Compiled at run time for one precision (REAL); see activation_kernel.py.
//
// Arrays: x (groups, rows, F), or (rows, F) for all groups alike (stride 0); a, b (groups, F); y, g (groups, rows, F).
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {
#if SINGLE
// exp by 2^k and Taylor's series to the seventh power on |r| <= ln(2)/2, which is exact to rounding in single precision
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    const float k = std::nearbyint(x * 1.44269504f);
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}
#else
inline double exponential(double x) { return std::exp(x); }
#endif
inline REAL logistic(REAL t) { return 1 / (1 + exponential(-t)); }
}  // namespace

extern "C" void swish_forward(int64_t groups, int64_t rows, int64_t features, int64_t stride, const REAL* __restrict__ x,
                              const REAL* __restrict__ a, const REAL* __restrict__ b, REAL* __restrict__ y) {
    for (int64_t m = 0; m < groups; ++m)
        for (int64_t n = 0; n < rows; ++n) {
            const REAL *xs = x + m * stride + n * features, *as = a + m * features, *bs = b + m * features;
            REAL* ys = y + (m * rows + n) * features;
            for (int64_t k = 0; k < features; ++k) ys[k] = as[k] * xs[k] * logistic(bs[k] * xs[k]);
        }
}

// dx is added to, so that groups with one x add up; da and db too
extern "C" void swish_backward(int64_t groups, int64_t rows, int64_t features, int64_t stride, const REAL* __restrict__ x,
                               const REAL* __restrict__ a, const REAL* __restrict__ b, const REAL* __restrict__ g,
                               REAL* __restrict__ dx, REAL* __restrict__ da, REAL* __restrict__ db) {
    for (int64_t m = 0; m < groups; ++m)
        for (int64_t n = 0; n < rows; ++n) {
            const int64_t row = m * stride + n * features, group = m * features;
            const REAL *xs = x + row, *as = a + group, *bs = b + group, *gs = g + (m * rows + n) * features;
            REAL *dxs = dx + row, *das = da + group, *dbs = db + group;
            for (int64_t k = 0; k < features; ++k) {
                const REAL t = bs[k] * xs[k], s = logistic(t), slope = s * (1 - s), u = gs[k] * xs[k];
                dxs[k] += gs[k] * as[k] * (s + t * slope);
                das[k] += u * s;
                dbs[k] += u * as[k] * xs[k] * slope;
            }
        }
}

// derivatives of sum v dx by x, a, b and g
extern "C" void swish_second(int64_t groups, int64_t rows, int64_t features, int64_t stride, const REAL* __restrict__ x,
                             const REAL* __restrict__ a, const REAL* __restrict__ b, const REAL* __restrict__ g,
                             const REAL* __restrict__ v, REAL* __restrict__ ex, REAL* __restrict__ ea,
                             REAL* __restrict__ eb, REAL* __restrict__ eg) {
    for (int64_t m = 0; m < groups; ++m)
        for (int64_t n = 0; n < rows; ++n) {
            const int64_t row = m * stride + n * features, group = m * features, place = (m * rows + n) * features;
            const REAL *xs = x + row, *vs = v + row, *as = a + group, *bs = b + group, *gs = g + place;
            REAL *exs = ex + row, *eas = ea + group, *ebs = eb + group, *egs = eg + place;
            for (int64_t k = 0; k < features; ++k) {
                const REAL t = bs[k] * xs[k], s = logistic(t), slope = s * (1 - s), curve = slope * (1 - 2 * s);
                const REAL d = s + t * slope, vg = vs[k] * gs[k], bend = 2 * slope + t * curve;
                egs[k] = vs[k] * as[k] * d;
                exs[k] += vg * as[k] * bs[k] * bend;
                eas[k] += vg * d;
                ebs[k] += vg * as[k] * xs[k] * bend;
            }
        }
}
