// Messages of one convolution, summed over neighbours, and their first derivatives; see messages.py.
// Compiled at run time with the model's number of features (FEATURES) and precision (REAL).
//
//   out_i[k] = sum_j w_p sum_m A_ij[k, m] h_j[m]          for every path p; all but A are vectors of FEATURES numbers
//
// Arrays: h (atoms, rows, F), w (atoms, slots, paths, F), a (atoms, slots, couplings), active (atoms, slots),
// index (atoms, slots), out (atoms, outputs, F). Pairs with active = 0 (padding, or beyond the cutoff) are skipped.
// A path is six numbers: first row in h, 2a+1, 2c+1, first number in a, first row in out, rows from one k to the next.
#include <cstdint>
#include <cstring>

namespace {
constexpr int F = FEATURES;

struct Path {
    int64_t row, inner, outer, coupling, out, step;
};

template <int M, int K>
inline void send(const REAL* __restrict__ h, const REAL* __restrict__ w, const REAL* __restrict__ a, int64_t step,
                 REAL* __restrict__ out) {
    for (int k = 0; k < K; ++k)
        for (int x = 0; x < F; ++x) {
            REAL sum = 0;
            for (int m = 0; m < M; ++m) sum += a[k * M + m] * h[m * F + x];
            out[k * step * F + x] += w[x] * sum;
        }
}

// t: derivatives with respect to out
template <int M, int K>
inline void send_back(const REAL* __restrict__ h, const REAL* __restrict__ w, const REAL* __restrict__ a, int64_t step,
                      const REAL* __restrict__ t, REAL* __restrict__ d_h, REAL* __restrict__ d_w,
                      REAL* __restrict__ d_a) {
    alignas(64) REAL weighted[K][F];
    for (int x = 0; x < F; ++x) {
        REAL total = 0;
        for (int k = 0; k < K; ++k) {
            REAL sum = 0;
            for (int m = 0; m < M; ++m) sum += a[k * M + m] * h[m * F + x];
            total += t[k * step * F + x] * sum;
            weighted[k][x] = w[x] * t[k * step * F + x];
        }
        d_w[x] = total;
    }
    for (int m = 0; m < M; ++m)
        for (int x = 0; x < F; ++x) {
            REAL sum = 0;
            for (int k = 0; k < K; ++k) sum += a[k * M + m] * weighted[k][x];
            d_h[m * F + x] += sum;
        }
    for (int k = 0; k < K; ++k)
        for (int m = 0; m < M; ++m) {
            REAL sum = 0;
            for (int x = 0; x < F; ++x) sum += weighted[k][x] * h[m * F + x];
            d_a[k * M + m] += sum;
        }
}
}  // namespace

#define CASES(CALL)                        \
    switch (p.inner * 10 + p.outer) {      \
        case 11: CALL(1, 1); break;        \
        case 13: CALL(1, 3); break;        \
        case 15: CALL(1, 5); break;        \
        case 31: CALL(3, 1); break;        \
        case 33: CALL(3, 3); break;        \
        case 35: CALL(3, 5); break;        \
        case 51: CALL(5, 1); break;        \
        case 53: CALL(5, 3); break;        \
        case 55: CALL(5, 5); break;        \
    }

extern "C" void messages_forward(int64_t atoms, int64_t slots, int64_t rows, int64_t paths, int64_t couplings,
                                 int64_t outputs, const REAL* h, const REAL* w, const REAL* a, const REAL* active,
                                 const int64_t* index, const Path* table, REAL* out) {
    std::memset(out, 0, sizeof(REAL) * atoms * outputs * F);
    for (int64_t i = 0; i < atoms; ++i)
        for (int64_t n = i * slots; n < (i + 1) * slots; ++n) {
            if (active[n] == 0) continue;
            for (int64_t q = 0; q < paths; ++q) {
                const Path& p = table[q];
#define SEND(M, K)                                                                                             \
    send<M, K>(h + (index[n] * rows + p.row) * F, w + (n * paths + q) * F, a + n * couplings + p.coupling, p.step, \
               out + (i * outputs + p.out) * F)
                CASES(SEND)
            }
        }
}

extern "C" void messages_backward(int64_t atoms, int64_t slots, int64_t rows, int64_t paths, int64_t couplings,
                                  int64_t outputs, const REAL* h, const REAL* w, const REAL* a, const REAL* active,
                                  const int64_t* index, const Path* table, const REAL* gradient, REAL* d_h, REAL* d_w,
                                  REAL* d_a) {
    std::memset(d_h, 0, sizeof(REAL) * atoms * rows * F);
    std::memset(d_w, 0, sizeof(REAL) * atoms * slots * paths * F);
    std::memset(d_a, 0, sizeof(REAL) * atoms * slots * couplings);
    for (int64_t i = 0; i < atoms; ++i)
        for (int64_t n = i * slots; n < (i + 1) * slots; ++n) {
            if (active[n] == 0) continue;
            for (int64_t q = 0; q < paths; ++q) {
                const Path& p = table[q];
                const int64_t from = (index[n] * rows + p.row) * F, pair = (n * paths + q) * F;
                const int64_t block = n * couplings + p.coupling;
#define SEND_BACK(M, K)                                                                                         \
    send_back<M, K>(h + from, w + pair, a + block, p.step, gradient + (i * outputs + p.out) * F, d_h + from, d_w + pair, \
                    d_a + block)
                CASES(SEND_BACK)
            }
        }
}
