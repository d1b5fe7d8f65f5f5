// Force covariances between two sets of geometries, summed over permutations: what `operators.fill_force_blocks` says,
// fused. Loops are arranged so that every inner one runs along the second atom of the pair, without indirection: the
// permutation p takes pair (a, b) of the first geometry to (p_a, p_b) of the second, so that the columns of the first
// are put into the order of the second once, and serve all of its geometries.

#include <cmath>
#include <cstdint>
#include <vector>

#define LANES 8  // rows are padded to a multiple of this, with zeros
#define TILE 8   // geometries of the second set whose sums stay in the second cache

extern "C" {

// xa, xb: [n][N][N]; ha, hb: [n][N][N][3]; permutations and their inverses: [S][N]; out: [n_a][3N][n_b][3N] with strides
// for the first three axes, in numbers
void gdml_blocks(int64_t n_a, int64_t n_b, int64_t n, int64_t n_permutations, const double *xa, const double *ha,
                 const double *xb, const double *hb, const int64_t *permutations, const int64_t *inverses, double sigma,
                 double *out, int64_t stride_a, int64_t stride_row, int64_t stride_b) {
    const int64_t width = (n + LANES - 1) / LANES * LANES, size = n * width;
    const double scale = std::sqrt(5.0) / sigma, f2 = 5.0 / (3 * sigma * sigma), f1 = 5.0 * f2 / (sigma * sigma);
    // tables of the second set, padded, one Cartesian component after the other: x, h_x, h_y, h_z
    std::vector<double> second(n_b * 4 * size, 0.0), first(4 * size, 0.0), u(size), t(3 * width, 0.0);
    std::vector<double> sums(TILE * n * 9 * width);
    for (int64_t j = 0; j < n_b; j++)
        for (int64_t a = 0; a < n; a++)
            for (int64_t b = 0; b < n; b++) {
                double *to = &second[j * 4 * size + a * width + b];
                const int64_t from = (j * n + a) * n + b;
                to[0] = xb[from];
                for (int64_t k = 0; k < 3; k++) to[(k + 1) * size] = hb[3 * from + k];
            }
    for (int64_t i = 0; i < n_a; i++) {
        for (int64_t start = 0; start < n_b; start += TILE) {
            const int64_t stop = start + TILE < n_b ? start + TILE : n_b;
            std::fill(sums.begin(), sums.end(), 0.0);
            for (int64_t p = 0; p < n_permutations; p++) {
                const int64_t *q = permutations + p * n, *inverse = inverses + p * n;
                for (int64_t a = 0; a < n; a++)
                    for (int64_t b = 0; b < n; b++) {
                        double *to = &first[a * width + b];
                        const int64_t from = (i * n + a) * n + inverse[b];
                        to[0] = xa[from];
                        for (int64_t k = 0; k < 3; k++) to[(k + 1) * size] = ha[3 * from + k];
                    }
                for (int64_t j = start; j < stop; j++) {
                    const double *table = &second[j * 4 * size];
                    double square = 0;
                    for (int64_t a = 0; a < n; a++) {
                        const double *x = &first[a * width], *y = table + q[a] * width;
                        double *d = &u[a * width];
#pragma omp simd reduction(+ : square)
                        for (int64_t b = 0; b < width; b++) {
                            d[b] = x[b] - y[b];
                            square += d[b] * d[b];
                        }
                    }
                    // every pair has been counted twice
                    const double d = scale * std::sqrt(0.5 * square), e = std::exp(-d);
                    const double c1 = f1 * e, c2 = f2 * (1 + d) * e;
                    for (int64_t k = 0; k < 3; k++)
                        for (int64_t a = 0; a < n; a++) {
                            const double *h = table + (k + 1) * size + q[a] * width, *v = &u[a * width];
                            double s = 0;
#pragma omp simd reduction(+ : s)
                            for (int64_t b = 0; b < width; b++) s += h[b] * v[b];
                            t[k * width + q[a]] = s;
                        }
                    for (int64_t a = 0; a < n; a++)
                        for (int64_t k = 0; k < 3; k++) {
                            const double *g = &first[(k + 1) * size + a * width], *v = &u[a * width];
                            double s = 0;
#pragma omp simd reduction(+ : s)
                            for (int64_t b = 0; b < width; b++) s += g[b] * v[b];
                            s *= c1;
                            for (int64_t l = 0; l < 3; l++) {
                                const double *h = table + (l + 1) * size + q[a] * width, *w = &t[l * width];
                                double *to = &sums[(((j - start) * n + a) * 9 + 3 * k + l) * width];
                                double same = 0;
#pragma omp simd reduction(+ : same)
                                for (int64_t b = 0; b < width; b++) {
                                    const double both = g[b] * h[b];
                                    same += both;
                                    to[b] -= c2 * both + s * w[b];
                                }
                                to[q[a]] += c2 * same;
                            }
                        }
                }
            }
            for (int64_t j = start; j < stop; j++)
                for (int64_t a = 0; a < n; a++)
                    for (int64_t k = 0; k < 3; k++) {
                        double *to = out + i * stride_a + (3 * a + k) * stride_row + j * stride_b;
                        for (int64_t l = 0; l < 3; l++) {
                            const double *from = &sums[(((j - start) * n + a) * 9 + 3 * k + l) * width];
                            for (int64_t b = 0; b < n; b++) to[3 * b + l] = from[b];
                        }
                    }
        }
    }
}
}
