// Vectors of the machine's width, the functions that networks need of them, and products of small matrices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

typedef REAL real;

#ifdef __AVX512F__
#define VECTOR_BYTES 64
constexpr int BLOCK_ROWS = 8;
#else
#define VECTOR_BYTES 32
constexpr int BLOCK_ROWS = 4;
#endif

constexpr int LANES = VECTOR_BYTES / sizeof(real);
typedef std::conditional<sizeof(real) == 4, int32_t, int64_t>::type whole;
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef whole ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef real loose_vec __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

static inline vec load(const real* p) { return *reinterpret_cast<const loose_vec*>(p); }
static inline void store(real* p, vec x) { *reinterpret_cast<loose_vec*>(p) = x; }
// x - 0 is x for every x, so that nothing is left of the subtraction
static inline vec splat(real x) { return x - vec{}; }

// lanes of a and b in turn, W at a time, from the lower or the upper halves of blocks of 2W
template <int W, bool UPPER, size_t... I>
static inline vec halves(vec a, vec b, std::index_sequence<I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (I % (2 * W) < W ? I : I - W + LANES) + (UPPER ? W : 0)...);
#else
    return __builtin_shuffle(a, b, ivec{whole((I % (2 * W) < W ? I : I - W + LANES) + (UPPER ? W : 0))...});
#endif
}

// Sums over the lanes of LANES vectors, as the lanes of one; overwrites x.
template <int W = LANES / 2>
static inline vec totals(vec* x) {
    for (int k = 0; k < W; ++k) {
        const auto all = std::make_index_sequence<LANES>();
        x[k] = halves<W, false>(x[k], x[k + W], all) + halves<W, true>(x[k], x[k + W], all);
    }
    if constexpr (W == 1)
        return x[0];
    else
        return totals<W / 2>(x);
}

template <int W = LANES / 2>
static inline real total(vec x) {
    if constexpr (W == 0) {
        return x[0];
    } else {
        const auto all = std::make_index_sequence<LANES>();
        return total<W / 2>(x + halves<W, true>(x, x, all));
    }
}

constexpr int rounded_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory that starts at a cache line; contents are lost when it grows.
template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer(Buffer&& other) noexcept : data_(other.data_), capacity_(other.capacity_) {
        other.data_ = nullptr, other.capacity_ = 0;
    }
    ~Buffer() { std::free(data_); }
    T* resize(size_t n) {
        if (n > capacity_) {
            std::free(data_);
            data_ = nullptr;
            capacity_ = n + n / 8 + 64;
            size_t bytes = (capacity_ * sizeof(T) + 63) / 64 * 64;
            data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
            if (!data_) {
                capacity_ = 0;
                throw std::bad_alloc();
            }
        }
        return data_;
    }
    T* get() { return data_; }
    const T* get() const { return data_; }
    T& operator[](size_t i) { return data_[i]; }
    const T& operator[](size_t i) const { return data_[i]; }
    void zero(size_t n) { std::memset(static_cast<void*>(resize(n)), 0, n * sizeof(T)); }
    size_t bytes() const { return capacity_ * sizeof(T); }

private:
    T* data_ = nullptr;
    size_t capacity_ = 0;
};

// 2^n for whole n within the exponents of normal numbers
static inline vec power_of_two(ivec n) {
    constexpr int bias = sizeof(real) == 4 ? 127 : 1023, mantissa = sizeof(real) == 4 ? 23 : 52;
    ivec bits = (n + bias) << mantissa;
    vec result;
    std::memcpy(&result, &bits, sizeof bits);
    return result;
}

static inline vec clamped(vec x, real low, real high) {
    x = x < low ? splat(low) : x;
    return x > high ? splat(high) : x;
}

// exp(x) = 2^n exp(r), |r| <= ln(2)/2, with the Taylor series of exp(r): rounding errors only
static inline vec exponential(vec x) {
    constexpr real limit = sizeof(real) == 4 ? real(87.0) : real(708.0);
    constexpr real shift = sizeof(real) == 4 ? real(12582912.0) : real(6755399441055744.0);  // 1.5 * 2^mantissa
    x = clamped(x, -limit, limit);
    vec n = (x * real(1.4426950408889634) + shift) - shift;
    vec r, p;
    if constexpr (sizeof(real) == 4) {
        r = (x - n * real(0.693359375)) + n * real(2.12194440e-4);
        p = splat(real(1.0 / 5040));
        for (double c : {1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0}) p = p * r + real(c);
    } else {
        r = (x - n * real(6.93147180369123816490e-01)) - n * real(1.90821492927058770002e-10);
        p = splat(real(1.0 / 6227020800.0));
        for (double c : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                         1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
            p = p * r + real(c);
    }
    return p * power_of_two(__builtin_convertvector(n, ivec));
}

// silu(x) = x / (1 + exp(-x)) and its derivative
static inline vec silu(vec x, vec& derivative) {
    vec s = real(1) / (real(1) + exponential(-x));
    derivative = s * (real(1) + x * (real(1) - s));
    return x * s;
}

// ---- C (m, n) = A (m, k) B (k, n) + what C starts from; n is a multiple of LANES --------------------------------

enum class Start { zero, bias, add };

template <int ROWS, int VECTORS, Start START>
static inline void product_tile(int k, const real* a, int lda, const real* b, int ldb, real* c, int ldc,
                                const real* bias) {
    vec sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECTORS; ++v) {
            if constexpr (START == Start::zero) sum[i][v] = vec{};
            if constexpr (START == Start::bias) sum[i][v] = load(bias + v * LANES);
            if constexpr (START == Start::add) sum[i][v] = load(c + i * ldc + v * LANES);
        }
    for (int p = 0; p < k; ++p) {
        vec row[VECTORS];
        for (int v = 0; v < VECTORS; ++v) row[v] = load(b + static_cast<ptrdiff_t>(p) * ldb + v * LANES);
        for (int i = 0; i < ROWS; ++i) {
            vec x = splat(a[i * lda + p]);
            for (int v = 0; v < VECTORS; ++v) sum[i][v] += x * row[v];
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECTORS; ++v) store(c + i * ldc + v * LANES, sum[i][v]);
}

template <int VECTORS, Start START>
static inline void product_rows(int m, int k, const real* a, int lda, const real* b, int ldb, real* c, int ldc,
                                const real* bias) {
    int i = 0;
    for (; i + BLOCK_ROWS <= m; i += BLOCK_ROWS)
        product_tile<BLOCK_ROWS, VECTORS, START>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, bias);
    if constexpr (BLOCK_ROWS > 4)
        for (; i + 4 <= m; i += 4)
            product_tile<4, VECTORS, START>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, bias);
    for (; i + 2 <= m; i += 2) product_tile<2, VECTORS, START>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, bias);
    for (; i < m; ++i) product_tile<1, VECTORS, START>(k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, bias);
}

template <Start START>
static void product(int m, int k, int n, const real* a, int lda, const real* b, int ldb, real* c, int ldc,
                    const real* bias = nullptr) {
    int j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES)
        product_rows<2, START>(m, k, a, lda, b + j, ldb, c + j, ldc, bias ? bias + j : nullptr);
    for (; j < n; j += LANES) product_rows<1, START>(m, k, a, lda, b + j, ldb, c + j, ldc, bias ? bias + j : nullptr);
}
