// Sums over neighbours and their first derivatives, one atom at a time: everything about a pair stays in registers.
// Compiled at run time with the model's sizes (FEATURES, RADIAL, ANGULAR_D) and precision (REAL); see pair_kernel.py.
//
//   S_i = sum_j g_s s_j,  P_i = sum_j Y1_ij g_p p_j,  D_i = sum_j Y2_ij g_d d_j,  g = rho_ij W
//
// Arrays: rbf (atoms, slots, RADIAL), f (atoms, slots), y1 (atoms, 3, slots), y2 (atoms, ANGULAR_D, slots),
// spd (atoms, 3 FEATURES), w (RADIAL, 3 FEATURES), index (atoms, slots). Pairs with f = 0 (padding, or beyond the
// cutoff) are skipped.
#include <cstdint>
#include <cstring>

namespace {
constexpr int F = FEATURES, K = RADIAL, ND = ANGULAR_D;

// g[F] = sum_k rho[k] w[k][0..F) for one of the three blocks of features
inline void radial(const REAL* __restrict__ rho, const REAL* __restrict__ w, REAL* __restrict__ g) {
    REAL sum[F];
    for (int x = 0; x < F; ++x) sum[x] = 0;
    for (int k = 0; k < K; ++k)
        for (int x = 0; x < F; ++x) sum[x] += rho[k] * w[k * 3 * F + x];
    for (int x = 0; x < F; ++x) g[x] = sum[x];
}

// out[K] = sum_x h[x] t[x][0..K); four partial sums, so that additions do not wait for one another
inline void project(const REAL* __restrict__ h, const REAL* __restrict__ t, REAL* __restrict__ out) {
#if (RADIAL & (RADIAL - 1)) == 0
    typedef REAL Row __attribute__((vector_size(K * sizeof(REAL)), aligned(sizeof(REAL))));
    Row part[4] = {};
    int x = 0;
    for (; x + 4 <= 3 * F; x += 4)
        for (int q = 0; q < 4; ++q) part[q] += h[x + q] * *reinterpret_cast<const Row*>(t + (x + q) * K);
    for (; x < 3 * F; ++x) part[0] += h[x] * *reinterpret_cast<const Row*>(t + x * K);
    *reinterpret_cast<Row*>(out) = (part[0] + part[1]) + (part[2] + part[3]);
#else
    REAL sum[K] = {0};
    for (int x = 0; x < 3 * F; ++x)
        for (int k = 0; k < K; ++k) sum[k] += h[x] * t[x * K + k];
    for (int k = 0; k < K; ++k) out[k] = sum[k];
#endif
}

inline REAL dot(const REAL* __restrict__ a, const REAL* __restrict__ b) {
    REAL sum = 0;
    for (int x = 0; x < F; ++x) sum += a[x] * b[x];
    return sum;
}

// Sum of rho[k] h[x] over pairs. Four pairs are kept back, so that the sum is read and written once for all of them.
struct Outer {
    REAL* __restrict__ sum;  // (K, 3F)
    alignas(64) REAL rho[4][K], h[4][3 * F];
    int n = 0;

    explicit Outer(REAL* target) : sum(target) {}
    void flush() {
        for (int q = n; q < 4; ++q) {
            for (int k = 0; k < K; ++k) rho[q][k] = 0;
            for (int x = 0; x < 3 * F; ++x) h[q][x] = 0;
        }
        for (int k = 0; k < K; ++k) {
            REAL* __restrict__ row = sum + k * 3 * F;
            const REAL a = rho[0][k], b = rho[1][k], c = rho[2][k], d = rho[3][k];
            for (int x = 0; x < 3 * F; ++x) row[x] += (a * h[0][x] + b * h[1][x]) + (c * h[2][x] + d * h[3][x]);
        }
        n = 0;
    }
    void add(const REAL* radial_functions, const REAL* factor) {
        std::memcpy(rho[n], radial_functions, sizeof rho[0]);
        std::memcpy(h[n], factor, sizeof h[0]);
        if (++n == 4) flush();
    }
};

// w (K, 3F) -> (3F, K)
inline void transpose(const REAL* __restrict__ w, REAL* __restrict__ out) {
    for (int k = 0; k < K; ++k)
        for (int x = 0; x < 3 * F; ++x) out[x * K + k] = w[k * 3 * F + x];
}

inline void add_scaled(REAL* __restrict__ out, REAL y, const REAL* __restrict__ v) {
    for (int x = 0; x < F; ++x) out[x] += y * v[x];
}
}  // namespace

extern "C" void pair_sums_forward(int64_t atoms, int64_t slots, const REAL* rbf, const REAL* f, const REAL* y1,
                                  const REAL* y2, const REAL* spd, const REAL* w, const int64_t* index, REAL* s,
                                  REAL* p, REAL* d) {
    for (int64_t i = 0; i < atoms; ++i) {
        alignas(64) REAL si[F] = {0}, pi[3 * F] = {0}, di[ND * F] = {0};
        for (int64_t n = 0; n < slots; ++n) {
            const int64_t pair = i * slots + n;
            if (f[pair] == 0) continue;
            const REAL *rho = rbf + pair * K, *other = spd + index[pair] * 3 * F;
            alignas(64) REAL g[F];
            radial(rho, w, g);
            for (int x = 0; x < F; ++x) si[x] += g[x] * other[x];
            radial(rho, w + F, g);
            for (int x = 0; x < F; ++x) g[x] *= other[F + x];
            for (int c = 0; c < 3; ++c) add_scaled(pi + c * F, y1[(i * 3 + c) * slots + n], g);
            radial(rho, w + 2 * F, g);
            for (int x = 0; x < F; ++x) g[x] *= other[2 * F + x];
            for (int c = 0; c < ND; ++c) add_scaled(di + c * F, y2[(i * ND + c) * slots + n], g);
        }
        std::memcpy(s + i * F, si, sizeof si);
        std::memcpy(p + i * 3 * F, pi, sizeof pi);
        std::memcpy(d + i * ND * F, di, sizeof di);
    }
}

// Derivatives of a function with derivatives gs, gp, gd with respect to s, p, d. The sum over atoms that receive from
// i is a sum over i's own neighbourhood, because the list holds both directions: g and Y2 are even, Y1 is odd.
// d_w (RADIAL, 3 FEATURES) is left out where it is null.
extern "C" void pair_sums_backward(int64_t atoms, int64_t slots, const REAL* rbf, const REAL* f, const REAL* y1,
                                   const REAL* y2, const REAL* spd, const REAL* w, const int64_t* index,
                                   const REAL* gs, const REAL* gp, const REAL* gd, REAL* d_rbf, REAL* d_y1, REAL* d_y2,
                                   REAL* d_spd, REAL* d_w) {
    alignas(64) static thread_local REAL transposed[3 * F * K];
    transpose(w, transposed);
    Outer outer(d_w);
    for (int64_t i = 0; i < atoms; ++i) {
        alignas(64) REAL mine[3 * F] = {0};
        for (int64_t n = 0; n < slots; ++n) {
            const int64_t pair = i * slots + n;
            if (f[pair] == 0) continue;
            const int64_t j = index[pair];
            const REAL *rho = rbf + pair * K, *other = spd + j * 3 * F;
            alignas(64) REAL g[F], moved[F], h[3 * F], there[F];

            radial(rho, w, g);
            for (int x = 0; x < F; ++x) h[x] = gs[i * F + x] * other[x];
            for (int x = 0; x < F; ++x) mine[x] += g[x] * gs[j * F + x];

            radial(rho, w + F, g);
            for (int x = 0; x < F; ++x) moved[x] = g[x] * other[F + x];
            for (int x = 0; x < F; ++x) h[F + x] = there[x] = 0;
            for (int c = 0; c < 3; ++c) {
                const REAL y = y1[(i * 3 + c) * slots + n];
                d_y1[(i * 3 + c) * slots + n] = dot(moved, gp + (i * 3 + c) * F);
                add_scaled(h + F, y, gp + (i * 3 + c) * F);
                add_scaled(there, -y, gp + (j * 3 + c) * F);
            }
            for (int x = 0; x < F; ++x) h[F + x] *= other[F + x];
            for (int x = 0; x < F; ++x) mine[F + x] += g[x] * there[x];

            radial(rho, w + 2 * F, g);
            for (int x = 0; x < F; ++x) moved[x] = g[x] * other[2 * F + x];
            for (int x = 0; x < F; ++x) h[2 * F + x] = there[x] = 0;
            for (int c = 0; c < ND; ++c) {
                const REAL y = y2[(i * ND + c) * slots + n];
                d_y2[(i * ND + c) * slots + n] = dot(moved, gd + (i * ND + c) * F);
                add_scaled(h + 2 * F, y, gd + (i * ND + c) * F);
                add_scaled(there, y, gd + (j * ND + c) * F);
            }
            for (int x = 0; x < F; ++x) h[2 * F + x] *= other[2 * F + x];
            for (int x = 0; x < F; ++x) mine[2 * F + x] += g[x] * there[x];

            project(h, transposed, d_rbf + pair * K);
            if (d_w) outer.add(rho, h);
        }
        std::memcpy(d_spd + i * 3 * F, mine, sizeof mine);
    }
    if (d_w) outer.flush();
}

// Derivatives of M = <v_rbf, d_rbf> + <v_y1, d_y1> + <v_y2, d_y2> + <v_spd, d_spd>, with d_* as above, by everything
// that they were computed from. With a = g, b = rho_v W, s = spd_j, t = v_spd_j, u = sum_c Y_c G_c,
// v = sum_c Y_v,c G_c (G = gs, gp, gd of atom i), each pair and block of features adds sum_x (b s u + a t u + a s v).
extern "C" void pair_sums_second(int64_t atoms, int64_t slots, const REAL* rbf, const REAL* f, const REAL* y1,
                                 const REAL* y2, const REAL* spd, const REAL* w, const int64_t* index, const REAL* gs,
                                 const REAL* gp, const REAL* gd, const REAL* v_rbf, const REAL* v_y1,
                                 const REAL* v_y2, const REAL* v_spd, REAL* e_rbf, REAL* e_y1, REAL* e_y2, REAL* e_spd,
                                 REAL* e_w, REAL* e_gs, REAL* e_gp, REAL* e_gd) {
    alignas(64) static thread_local REAL transposed[3 * F * K];
    transpose(w, transposed);
    Outer outer(e_w);
    for (int64_t i = 0; i < atoms; ++i) {
        for (int64_t n = 0; n < slots; ++n) {
            const int64_t pair = i * slots + n;
            if (f[pair] == 0) continue;
            const int64_t j = index[pair];
            alignas(64) REAL by_a[3 * F], by_b[3 * F];
            for (int block = 0; block < 3; ++block) {
                const int first = block * F, terms = block == 0 ? 1 : block == 1 ? 3 : ND;
                const REAL *s = spd + j * 3 * F + first, *t = v_spd + j * 3 * F + first;
                const REAL *y = (block == 1 ? y1 : y2) + i * terms * slots + n;
                const REAL *yv = (block == 1 ? v_y1 : v_y2) + i * terms * slots + n;
                const REAL* gradient = (block == 0 ? gs : block == 1 ? gp : gd) + i * terms * F;
                REAL* e_gradient = (block == 0 ? e_gs : block == 1 ? e_gp : e_gd) + i * terms * F;
                alignas(64) REAL a[F], b[F], u[F], v[F], moved[F];
                radial(rbf + pair * K, w + first, a);
                radial(v_rbf + pair * K, w + first, b);
                for (int x = 0; x < F; ++x) moved[x] = b[x] * s[x] + a[x] * t[x];
                if (block == 0) {
                    for (int x = 0; x < F; ++x) {
                        u[x] = gradient[x];
                        v[x] = 0;
                        e_gradient[x] += moved[x];
                    }
                } else {
                    alignas(64) REAL still[F];
                    for (int x = 0; x < F; ++x) still[x] = a[x] * s[x];
                    for (int x = 0; x < F; ++x) u[x] = v[x] = 0;
                    REAL* e_y = (block == 1 ? e_y1 : e_y2) + i * terms * slots + n;
                    for (int c = 0; c < terms; ++c) {
                        add_scaled(u, y[c * slots], gradient + c * F);
                        add_scaled(v, yv[c * slots], gradient + c * F);
                        add_scaled(e_gradient + c * F, y[c * slots], moved);
                        add_scaled(e_gradient + c * F, yv[c * slots], still);
                        e_y[c * slots] = dot(gradient + c * F, moved);
                    }
                }
                REAL* e_s = e_spd + j * 3 * F + first;
                for (int x = 0; x < F; ++x) {
                    e_s[x] += b[x] * u[x] + a[x] * v[x];
                    by_a[first + x] = t[x] * u[x] + s[x] * v[x];
                    by_b[first + x] = s[x] * u[x];
                }
            }
            project(by_a, transposed, e_rbf + pair * K);
            outer.add(rbf + pair * K, by_a);
            outer.add(v_rbf + pair * K, by_b);
        }
    }
    outer.flush();
}
