// Energies and forces of a GDML model with inverse distances, in one pass over its training points.
//
// A permutation p of equal atoms moves a pair k of the query to p(k). Many permutations move it to the same place, so
// that a class of pairs that are moved alike has few variants: partial sums of |u|^2 and u.A are made once per class and
// variant, and added up for every permutation. The weights of the forces go the same way back.
//
// Training points lie in blocks of LANES, [block][pair in the order of the classes][lane], padded with zeros, for which
// every sum is zero.

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 8
#define REGISTERS 8 // variants times blocks whose sums are kept at once
#elif defined(__AVX__)
#define LANES 4
#define REGISTERS 4
#else
#define LANES 2
#define REGISTERS 4
#endif
#ifndef TILE
#define TILE 8 // blocks of training points that stay in the first cache between both passes
#endif

typedef double Vec __attribute__((vector_size(8 * LANES)));
typedef int64_t Int __attribute__((vector_size(8 * LANES)));

struct Model {
    int64_t n_atoms, n_pairs, n_blocks, n_permutations, n_classes, n_variants, n_units;
    double sigma, shift;
    const Vec *points;        // [block][pair]
    const Vec *coefficients;  // [block][pair]
    const Vec *energies;      // [block] coefficients of energies, or null
    const int64_t *pairs;     // [class] how many pairs
    const int64_t *variants;  // [class] how many variants
    const int64_t *variant;   // [permutation][class] index among all variants
    const int64_t *members;   // permutations of each variant, one variant after another
    const int64_t *ends;      // [variant] where its members end
    const int32_t *source;    // [unit] pair of the query that stands here; units are [class][pair][variant]
    const double *centre;     // [unit] mean of the training points
    const double *lattice;    // [9] rows, or null
    const double *inverse;    // [9]
    const double *images;     // [n_images][3] lattice vectors whose images a sum may need, or null
    int64_t n_images;
    double power, square;     // sums over images: exponent, and squared cutoff (0: none); power 0 is inverse distances
};

static inline Vec all(double x) {
    return Vec{} + x;
}

static inline double sum(Vec x) {
    double s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

// e^x for x <= 0: x = n log 2 + r, a Taylor series for r, n into the exponent; relative error below 4e-16
static inline Vec exponential(Vec x) {
    x = x > -700.0 ? x : all(-700.0);
    const double magic = 6755399441055744.0; // 1.5 * 2^52: adding it rounds to whole numbers in the low bits
    Vec shifted = x * 1.4426950408889634 + magic;
    Vec n = shifted - magic;
    Vec r = x - n * 0.6931471803691238;
    r = r - n * 1.9082149292705877e-10;
    Vec r2 = r * r, r4 = r2 * r2, r8 = r4 * r4;
    Vec a = (1.0 + r) + r2 * (1.0 / 2 + r * (1.0 / 6));
    Vec b = (1.0 / 24 + r * (1.0 / 120)) + r2 * (1.0 / 720 + r * (1.0 / 5040));
    Vec c = (1.0 / 40320 + r * (1.0 / 362880)) + r2 * (1.0 / 3628800 + r * (1.0 / 39916800));
    Vec d = 1.0 / 479001600 + r * (1.0 / 6227020800);
    Vec y = (a + r4 * b) + r8 * (c + r4 * d);
    Int bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    Int result;
    std::memcpy(&result, &y, sizeof result);
    result += bits << 52;
    std::memcpy(&y, &result, sizeof y);
    return y;
}

static inline Vec root(Vec x) {
#if defined(__AVX512F__)
    return (Vec)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX__)
    return (Vec)_mm256_sqrt_pd((__m256d)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

// partial sums |u|^2 and u.A of one class for V variants and J blocks
template <int V, int J>
static inline void partial_sums(const Model &m, const Vec *x, const Vec *a, const double *query, int64_t pairs,
                                int64_t stride, Vec *q, Vec *v) {
    Vec qs[V][J] = {}, vs[V][J] = {};
    for (int64_t k = 0; k < pairs; k++, query += stride) {
        for (int j = 0; j < J; j++) {
            const Vec xk = x[j * m.n_pairs + k], ak = a[j * m.n_pairs + k];
            for (int i = 0; i < V; i++) {
                const Vec u = query[i] - xk;
                qs[i][j] += u * u;
                vs[i][j] += u * ak;
            }
        }
    }
    for (int i = 0; i < V; i++)
        for (int j = 0; j < J; j++) q[i * TILE + j] = qs[i][j], v[i * TILE + j] = vs[i][j];
}

template <int V>
static void class_sums(const Model &m, const Vec *x, const Vec *a, const double *query, int64_t pairs, int64_t stride,
                       int64_t blocks, Vec *q, Vec *v) {
    constexpr int J = REGISTERS / V < 1 ? 1 : REGISTERS / V < TILE ? REGISTERS / V : TILE;
    int64_t j = 0;
    for (; j + J <= blocks; j += J)
        partial_sums<V, J>(m, x + j * m.n_pairs, a + j * m.n_pairs, query, pairs, stride, q + j, v + j);
    for (; j < blocks; j++)
        partial_sums<V, 1>(m, x + j * m.n_pairs, a + j * m.n_pairs, query, pairs, stride, q + j, v + j);
}

typedef void (*ClassSums)(const Model &, const Vec *, const Vec *, const double *, int64_t, int64_t, int64_t, Vec *,
                          Vec *);
static const ClassSums class_sums_of[9] = {nullptr,       class_sums<1>, class_sums<2>, class_sums<3>, class_sums<4>,
                                           class_sums<5>, class_sums<6>, class_sums<7>, class_sums<8>};

// sum over training points of w1 x + w2 A for K pairs and V variants of one class, added to `out`
template <int K, int V>
static inline void weighted_sums(const Model &m, const Vec *x, const Vec *a, const Vec *w1, const Vec *w2,
                                 int64_t stride, int64_t blocks, Vec *out) {
    Vec s[K][V];
    for (int k = 0; k < K; k++)
        for (int i = 0; i < V; i++) s[k][i] = out[k * stride + i];
    for (int64_t j = 0; j < blocks; j++, x += m.n_pairs, a += m.n_pairs) {
        for (int k = 0; k < K; k++) {
            const Vec xk = x[k], ak = a[k];
            for (int i = 0; i < V; i++) {
                s[k][i] += w1[i * TILE + j] * xk;
                s[k][i] += w2[i * TILE + j] * ak;
            }
        }
    }
    for (int k = 0; k < K; k++)
        for (int i = 0; i < V; i++) out[k * stride + i] = s[k][i];
}

template <int V>
static void class_weights(const Model &m, const Vec *x, const Vec *a, const Vec *w1, const Vec *w2, int64_t pairs,
                          int64_t stride, int64_t blocks, Vec *out) {
    constexpr int K = V < 3 ? 4 : 2;
    int64_t k = 0;
    for (; k + K <= pairs; k += K)
        weighted_sums<K, V>(m, x + k, a + k, w1, w2, stride, blocks, out + k * stride);
    for (; k < pairs; k++) weighted_sums<1, V>(m, x + k, a + k, w1, w2, stride, blocks, out + k * stride);
}

typedef void (*ClassWeights)(const Model &, const Vec *, const Vec *, const Vec *, const Vec *, int64_t, int64_t,
                             int64_t, Vec *);
static const ClassWeights class_weights_of[9] = {
    nullptr,          class_weights<1>, class_weights<2>, class_weights<3>, class_weights<4>,
    class_weights<5>, class_weights<6>, class_weights<7>, class_weights<8>};

// Inverse distances x and their gradients g (three arrays) of all pairs of one geometry.
// sums over images of f = r^-n (1 - r^2/R^2)^3 for pair vectors g, which become -df/dr of their first atoms
static void sum_images(const Model &m, double *x, double *gx, double *gy, double *gz) {
    static const double origin[3] = {};
    const double *images = m.images ? m.images : origin;
    const int64_t n = m.images ? m.n_images : 1;
    const double curvature = m.square ? 1.0 / m.square : 0.0;
    for (int64_t k = 0; k < m.n_pairs; k++) {
        double total = 0, sx = 0, sy = 0, sz = 0;
        for (int64_t i = 0; i < n; i++) {
            const double vx = gx[k] + images[3 * i], vy = gy[k] + images[3 * i + 1], vz = gz[k] + images[3 * i + 2];
            const double s = vx * vx + vy * vy + vz * vz, inside = 1.0 - s * curvature;
            if (inside <= 0) continue;
            const double value = m.power == 3.0 ? 1.0 / (s * std::sqrt(s)) : std::pow(s, -0.5 * m.power);
            const double two = inside * inside, switched = value * two * inside;
            const double slope = m.power * switched / s + 6.0 * curvature * value * two;
            total += switched;
            sx += slope * vx, sy += slope * vy, sz += slope * vz;
        }
        x[k] = total, gx[k] = sx, gy[k] = sy, gz[k] = sz;
    }
}

static void describe(const Model &m, const double *__restrict r, double *__restrict x, double *__restrict gx,
                     double *__restrict gy, double *__restrict gz) {
    int64_t k = 0;
    for (int64_t i = 1; i < m.n_atoms; i++) {
        const double xi = r[3 * i], yi = r[3 * i + 1], zi = r[3 * i + 2];
        for (int64_t j = 0; j < i; j++)
            gx[k + j] = xi - r[3 * j], gy[k + j] = yi - r[3 * j + 1], gz[k + j] = zi - r[3 * j + 2];
        k += i;
    }
    if (m.lattice) {
        const double *l = m.lattice, *n = m.inverse;
        for (k = 0; k < m.n_pairs; k++) {
            const double a = std::rint(gx[k] * n[0] + gy[k] * n[3] + gz[k] * n[6]);
            const double b = std::rint(gx[k] * n[1] + gy[k] * n[4] + gz[k] * n[7]);
            const double c = std::rint(gx[k] * n[2] + gy[k] * n[5] + gz[k] * n[8]);
            gx[k] -= a * l[0] + b * l[3] + c * l[6];
            gy[k] -= a * l[1] + b * l[4] + c * l[7];
            gz[k] -= a * l[2] + b * l[5] + c * l[8];
        }
    }
    if (m.power) {
        sum_images(m, x, gx, gy, gz);
        return;
    }
    for (k = 0; k < m.n_pairs; k++) {
        const double s = gx[k] * gx[k] + gy[k] * gy[k] + gz[k] * gz[k];
        x[k] = 1.0 / std::sqrt(s);
        const double cube = x[k] / s;
        gx[k] *= cube, gy[k] *= cube, gz[k] *= cube;
    }
}

// -dE/dx `f` [pair] of a query x, from weights summed over permutations; returns the energy without the shift
static double descriptor_forces(const Model &m, const double *x, double *f, Vec *work) {
    Vec *q = work, *v = q + m.n_variants * TILE, *w1 = v + m.n_variants * TILE, *w2 = w1 + m.n_variants * TILE;
    Vec *w1_of = w2 + m.n_variants * TILE, *w2_of = w1_of + m.n_permutations * TILE;
    Vec *w1_sum = w2_of + m.n_permutations * TILE, *out = w1_sum + m.n_variants;
    double *query = (double *)(out + m.n_units);
    for (int64_t u = 0; u < m.n_units; u++) query[u] = x[m.source[u]] - m.centre[u];
    std::memset(w1_sum, 0, (m.n_variants + m.n_units) * sizeof(Vec));

    const double s2 = m.sigma * m.sigma, to_d = std::sqrt(5.0) / m.sigma;
    const double c1 = 25.0 / (3.0 * s2 * s2), c2 = 5.0 / (3.0 * s2);
    Vec energy = {};
    for (int64_t start = 0; start < m.n_blocks; start += TILE) {
        const int64_t blocks = m.n_blocks - start < TILE ? m.n_blocks - start : TILE;
        const Vec *points = m.points + start * m.n_pairs, *coefficients = m.coefficients + start * m.n_pairs;
        int64_t pair = 0, unit = 0, variant = 0;
        for (int64_t c = 0; c < m.n_classes; c++) {
            const int64_t n = m.variants[c], parts = (n + REGISTERS - 1) / REGISTERS;
            for (int64_t part = 0, i = 0; part < parts; part++) {
                const int64_t width = (n - i + parts - part - 1) / (parts - part);
                class_sums_of[width](m, points + pair, coefficients + pair, query + unit + i, m.pairs[c], n, blocks,
                                     q + (variant + i) * TILE, v + (variant + i) * TILE);
                i += width;
            }
            pair += m.pairs[c], unit += m.pairs[c] * n, variant += n;
        }
        for (int64_t p = 0; p < m.n_permutations; p++) {
            const int64_t *index = m.variant + p * m.n_classes;
            for (int64_t j = 0; j < blocks; j++) {
                Vec qp = q[index[0] * TILE + j], vp = v[index[0] * TILE + j];
                for (int64_t c = 1; c < m.n_classes; c++) qp += q[index[c] * TILE + j], vp += v[index[c] * TILE + j];
                const Vec d = root(qp) * to_d, e = exponential(-d);
                const Vec second = (1.0 + d) * e * c2;
                Vec first = e * vp * c1;
                energy += second * vp;
                if (m.energies) {
                    const Vec alpha = m.energies[start + j];
                    energy += alpha * (1.0 + d + d * d * (1.0 / 3)) * e;
                    first += alpha * second;
                }
                w1_of[p * TILE + j] = first, w2_of[p * TILE + j] = second;
            }
        }
        const int64_t *member = m.members;
        for (int64_t i = 0; i < m.n_variants; i++) {
            const int64_t *end = m.members + m.ends[i], *begin = member;
            for (int64_t j = 0; j < blocks; j++) {
                Vec first = {}, second = {};
                for (member = begin; member < end; member++) first += w1_of[*member * TILE + j], second += w2_of[*member * TILE + j];
                w1[i * TILE + j] = first, w2[i * TILE + j] = second;
                w1_sum[i] += first;
            }
        }
        pair = unit = variant = 0;
        for (int64_t c = 0; c < m.n_classes; c++) {
            const int64_t n = m.variants[c], parts = (n + REGISTERS - 1) / REGISTERS;
            for (int64_t part = 0, i = 0; part < parts; part++) {
                const int64_t width = (n - i + parts - part - 1) / (parts - part);
                class_weights_of[width](m, points + pair, coefficients + pair, w1 + (variant + i) * TILE,
                                        w2 + (variant + i) * TILE, m.pairs[c], n, blocks, out + unit + i);
                i += width;
            }
            pair += m.pairs[c], unit += m.pairs[c] * n, variant += n;
        }
    }
    std::memset(f, 0, m.n_pairs * sizeof(double));
    int64_t unit = 0, variant = 0;
    for (int64_t c = 0; c < m.n_classes; c++) {
        for (int64_t k = 0; k < m.pairs[c]; k++)
            for (int64_t i = 0; i < m.variants[c]; i++, unit++)
                f[m.source[unit]] += sum(w1_sum[variant + i] * query[unit] - out[unit]);
        variant += m.variants[c];
    }
    return sum(energy);
}

static int64_t vectors_of_work(const Model &m) {
    return (4 * m.n_variants + 2 * m.n_permutations) * TILE + m.n_variants + m.n_units;
}

extern "C" {

int64_t gdml_lanes() {
    return LANES;
}

// number of doubles of working memory that one thread needs, aligned like Vec
int64_t gdml_work(const Model *m) {
    return vectors_of_work(*m) * LANES + m->n_units + 5 * m->n_pairs;
}

// positions [structures][atoms][3] -> energies [structures], forces [structures][atoms][3]
void gdml_evaluate(const Model *m, int64_t structures, const double *positions, double *energies, double *forces,
                   double *work) {
    double *x = work + vectors_of_work(*m) * LANES + m->n_units, *gx = x + m->n_pairs, *gy = gx + m->n_pairs;
    double *gz = gy + m->n_pairs, *f = gz + m->n_pairs;
    for (int64_t s = 0; s < structures; s++, positions += 3 * m->n_atoms, forces += 3 * m->n_atoms) {
        describe(*m, positions, x, gx, gy, gz);
        energies[s] = m->shift + descriptor_forces(*m, x, f, (Vec *)work);
        std::memset(forces, 0, 3 * m->n_atoms * sizeof(double));
        // dx/dr_i = -g and dx/dr_j = +g for the pair (i, j)
        for (int64_t i = 1, k = 0; i < m->n_atoms; i++) {
            double fx = 0, fy = 0, fz = 0;
            for (int64_t j = 0; j < i; j++, k++) {
                const double tx = gx[k] * f[k], ty = gy[k] * f[k], tz = gz[k] * f[k];
                fx -= tx, fy -= ty, fz -= tz;
                forces[3 * j] += tx, forces[3 * j + 1] += ty, forces[3 * j + 2] += tz;
            }
            forces[3 * i] += fx, forces[3 * i + 1] += fy, forces[3 * i + 2] += fz;
        }
    }
}

// descriptors x [structures][pairs] -> energies [structures], -dE/dx [structures][pairs]
void gdml_descriptors(const Model *m, int64_t structures, const double *x, double *energies, double *f, double *work) {
    for (int64_t s = 0; s < structures; s++, x += m->n_pairs, f += m->n_pairs)
        energies[s] = m->shift + descriptor_forces(*m, x, f, (Vec *)work);
}
}
