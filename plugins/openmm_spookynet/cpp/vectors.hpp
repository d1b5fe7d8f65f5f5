// Vectors of one cache line, products of matrices with few rows, and networks made of them with their derivatives.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

typedef REAL real;
typedef real V __attribute__((vector_size(64), may_alias));
constexpr int L = 64 / sizeof(real);
constexpr int F = FEATURES, M = RANDOM, K = (RADIAL + L - 1) / L * L, ND = 5;
static_assert(F % L == 0 && M % L == 0, "features come in whole vectors");

inline V load(const real* p) { return *reinterpret_cast<const V*>(p); }
inline void store(real* p, V v) { *reinterpret_cast<V*>(p) = v; }
inline V all(real x) { return V{} + x; }

// in halves, which add up faster than one number after the other
inline real sum(V v) {
    typedef real Half __attribute__((vector_size(32)));
    typedef real Quarter __attribute__((vector_size(16)));
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    half[0] += half[1];
    Quarter quarter[2];
    std::memcpy(quarter, half, sizeof half[0]);
    quarter[0] += quarter[1];
    real total = 0;
    for (size_t l = 0; l < 16 / sizeof(real); ++l) total += quarter[0][l];
    return total;
}

// exp by powers of two and a Taylor series on |r| < ln(2) / 2; what would overflow or underflow is clamped
inline V exponential(V x) {
    constexpr bool single = sizeof(real) == 4;
    typedef int32_t I32 __attribute__((vector_size(64)));
    typedef int64_t I64 __attribute__((vector_size(64)));
    typedef std::conditional_t<single, I32, I64> I;
    constexpr real lowest = single ? -87.0 : -708.0, highest = single ? 88.0 : 709.0;
    x = x < lowest ? all(lowest) : x;
    x = x > highest ? all(highest) : x;
    const V scaled = x * real(1.4426950408889634074);
    const I n = __builtin_convertvector(scaled + (scaled < 0 ? all(-0.5) : all(0.5)), I);
    const V whole = __builtin_convertvector(n, V);
    // ln 2 in two parts, the first of which has trailing zeros
    constexpr real high = single ? 0.693359375 : 6.93147180369123816490e-01;
    constexpr real low = single ? -2.12194440e-4 : 1.90821492927058770002e-10;
    const V r = (x - whole * high) - whole * low;
    constexpr int terms = single ? 7 : 13;
    constexpr double inverse[] = {1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
                                  1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
    V p = all(real(inverse[terms]));
    for (int k = terms - 1; k >= 0; --k) p = p * r + real(inverse[k]);
    const I bits = (n + (single ? 127 : 1023)) << (single ? 23 : 52);
    return p * reinterpret_cast<const V&>(bits);
}

// y (rows, B) = x (rows, inner) w (inner, B) + (what is in y, or the bias, or nothing); x by strides, w with row length
// ldw
template <int B, int R>
inline void some_rows(int inner, const real* x, int sr, int sk, const real* w, int ldw, const real* bias, bool add,
                      real* y, int ldy) {
    constexpr int NV = B / L;
    V total[R][NV];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v)
            total[r][v] = add ? load(y + r * ldy + v * L) : bias ? load(bias + v * L) : V{};
    for (int k = 0; k < inner; ++k)
        for (int v = 0; v < NV; ++v) {
            const V column = load(w + k * ldw + v * L);
            for (int r = 0; r < R; ++r) total[r][v] += x[r * sr + k * sk] * column;
        }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < NV; ++v) store(y + r * ldy + v * L, total[r][v]);
}

template <int B>
inline void product(int rows, int inner, const real* x, int sr, int sk, const real* w, int ldw, const real* bias,
                    bool add, real* y, int ldy) {
    constexpr int NV = B / L, R = NV <= 2 ? 8 : NV <= 4 ? 6 : NV <= 8 ? 3 : NV <= 12 ? 2 : 1;
    int r = 0;
    for (; r + R <= rows; r += R) some_rows<B, R>(inner, x + r * sr, sr, sk, w, ldw, bias, add, y + r * ldy, ldy);
    for (; r < rows; ++r) some_rows<B, 1>(inner, x + r * sr, sr, sk, w, ldw, bias, add, y + r * ldy, ldy);
}

// memory of one evaluation, taken piece by piece in cache lines and given back in the reverse order; grows as needed
class Arena {
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<std::vector<Line>> chunks;
    size_t chunk = 0, used = 0;

public:
    struct Mark {
        size_t chunk, used;
    };
    real* take(size_t n) {
        const size_t lines = (n + L - 1) / L;
        while (chunk < chunks.size() && used + lines > chunks[chunk].size()) ++chunk, used = 0;
        if (chunk == chunks.size()) chunks.emplace_back(lines > (1 << 14) ? lines : (1 << 14));
        real* p = reinterpret_cast<real*>(chunks[chunk].data() + used);
        used += lines;
        return p;
    }
    real* zeros(size_t n) {
        real* p = take(n);
        std::memset(p, 0, n * sizeof(real));
        return p;
    }
    Mark mark() const { return {chunk, used}; }
    void back(Mark to) { chunk = to.chunk, used = to.used; }
};

// -- networks of one width ---------------------------------------------------------------------------------------

struct Linear {
    const real *weight, *transposed, *bias;  // (F, F) each
};
struct Activation {
    const real *alpha, *beta;  // swish: alpha x sigmoid(beta x)
};
struct Block {
    Activation first;
    Linear linear1;
    Activation second;
    Linear linear2;
};
// residual blocks x + W2 s2(W1 s1(x)), and W s(x) behind them if it is no mere stack
struct Network {
    std::vector<Block> blocks;
    bool stack;
    Activation activation;
    Linear linear;
    size_t slopes() const { return 2 * blocks.size() + (stack ? 0 : 1); }
};

// values and slopes of an activation
inline void activate(const Activation& a, int n, const real* x, real* y, real* slope) {
    for (int i = 0; i < n; ++i)
        for (int v = 0; v < F; v += L) {
            const V z = load(x + i * F + v), alpha = load(a.alpha + v), beta = load(a.beta + v);
            const V s = 1 / (1 + exponential(-beta * z));
            store(y + i * F + v, alpha * z * s);
            store(slope + i * F + v, alpha * (s + beta * z * s * (1 - s)));
        }
}

inline void times(int n, const real* factor, real* x) {
    for (int i = 0; i < n * F; i += L) store(x + i, load(x + i) * load(factor + i));
}

inline void dense(int n, const real* x, const real* w, const real* bias, bool add, real* y) {
    product<F>(n, F, x, F, 1, w, F, bias, add, y, F);
}

// y = network(x) for n rows; slopes of all activations are kept for `backward`, `stride` numbers apart
inline void forward(const Network& net, int n, const real* x, real* y, real* slopes, size_t stride, Arena& arena) {
    const Arena::Mark mark = arena.mark();
    const size_t size = size_t(n) * F;
    real *here = arena.take(size), *a = arena.take(size), *h = arena.take(size);
    std::memcpy(here, x, size * sizeof(real));
    for (const Block& b : net.blocks) {
        activate(b.first, n, here, a, slopes);
        dense(n, a, b.linear1.weight, b.linear1.bias, false, h);
        activate(b.second, n, h, a, slopes + stride);
        dense(n, a, b.linear2.weight, nullptr, true, here);
        if (b.linear2.bias)
            for (int i = 0; i < n; ++i)
                for (int v = 0; v < F; v += L) store(here + i * F + v, load(here + i * F + v) + load(b.linear2.bias + v));
        slopes += 2 * stride;
    }
    if (net.stack) {
        std::memcpy(y, here, size * sizeof(real));
    } else {
        activate(net.activation, n, here, a, slopes);
        dense(n, a, net.linear.weight, net.linear.bias, false, y);
    }
    arena.back(mark);
}

// dx (+)= (dy/dx)^T dy for n rows
inline void backward(const Network& net, int n, const real* dy, const real* slopes, size_t stride, bool add, real* dx,
                     Arena& arena) {
    const Arena::Mark mark = arena.mark();
    const size_t size = size_t(n) * F;
    real *here = arena.take(size), *a = arena.take(size), *h = arena.take(size);
    slopes += net.slopes() * stride;
    if (net.stack) {
        std::memcpy(here, dy, size * sizeof(real));
    } else {
        slopes -= stride;
        dense(n, dy, net.linear.transposed, nullptr, false, here);
        times(n, slopes, here);
    }
    for (size_t b = net.blocks.size(); b-- > 0;) {
        const Block& block = net.blocks[b];
        slopes -= 2 * stride;
        dense(n, here, block.linear2.transposed, nullptr, false, a);
        times(n, slopes + stride, a);
        dense(n, a, block.linear1.transposed, nullptr, false, h);
        times(n, slopes, h);
        for (size_t i = 0; i < size; i += L) store(here + i, load(here + i) + load(h + i));
    }
    if (add) {
        for (size_t i = 0; i < size; i += L) store(dx + i, load(dx + i) + load(here + i));
    } else {
        std::memcpy(dx, here, size * sizeof(real));
    }
    arena.back(mark);
}
