// A layer forwards: attention between pairs of atoms, then what happens on every atom by itself, then the heads.
#pragma once

#include <algorithm>

#include "engine.hpp"

constexpr real NORM_EPSILON = real(1e-6);

constexpr bool WHOLE_HEADS = WIDTH_X % LANES == 0 && WIDTH_E % LANES == 0;
constexpr int COEFFICIENT_SUMS = rounded_up(2 * COEFFICIENTS, LANES);

// Sums over the lanes of N vectors; x has room for whole groups of LANES, and is overwritten.
template <int N>
static inline void store_totals(vec* x, real* out) {
    for (int k = 0; k < N; k += LANES) {
        const vec sums = totals(x + k);
        if (k + LANES <= N)
            store(out + k, sums);
        else
            for (int i = k; i < N; ++i) out[i] = sums[i - k];
    }
}

// sum over one head of x y z; W numbers
template <int W>
static inline real triple(const real* x, const real* y, const real* z) {
    real s = 0;
    for (int k = 0; k < W; ++k) s += x[k] * y[k] * z[k];
    return s;
}

template <int W>
static inline real dot(const real* x, const real* y) {
    real s = 0;
    for (int k = 0; k < W; ++k) s += x[k] * y[k];
    return s;
}

// degree by degree: f(d, first component, number of components), all three known when this is compiled
template <int K = 0, class G>
static inline void by_degree(G&& f) {
    if constexpr (K < D) {
        f(std::integral_constant<int, K>(), std::integral_constant<int, components_before(K)>(),
          std::integral_constant<int, 2 * DEGREE[K] + 1>());
        by_degree<K + 1>(f);
    }
}

static inline void invariants(const real* v, real* out) {
    by_degree([&](auto d, auto m, auto size) {
        real s = 0;
        for (int k = m; k < m + size; ++k) s += v[k] * v[k];
        out[d] = s * INVARIANT.value[d];
    });
}

// parity of the harmonics of a degree: Y(-u) = (-1)^l Y(u)
constexpr real parity(int d) { return DEGREE[d] & 1 ? real(-1) : real(1); }

// sum_t basis_t table_t: both filters, 2F numbers
static inline void radial(const real* row, const real* basis, real* out) {
    vec weight[2 * TABLE_TERMS];
    for (int t = 0; t < 2 * TABLE_TERMS; ++t) weight[t] = splat(basis[t]);
    for (int c = 0; c < 2 * F; c += LANES) {
        vec s = weight[0] * load(row + c);
        for (int t = 1; t < 2 * TABLE_TERMS; ++t) s += weight[t] * load(row + 2 * F * t + c);
        store(out + c, s);
    }
}

// Products q w k of one filter, head by head, in both directions, before their lanes are summed.
template <int W>
static inline void coefficients(const real* qa, const real* qb, const real* w, int heads, vec* ab, vec* ba) {
    for (int h = 0; h < heads; ++h)
        for (int k = h * W; k < (h + 1) * W; k += LANES) {
            const vec filter = load(w + k);
            ab[h] += load(qa + k) * filter * load(qb + 2 * F + k);
            ba[h] += load(qb + k) * filter * load(qa + 2 * F + k);
        }
}

inline void Engine::project(const Layer& layer, const real* x, int m, real* out) const {
    const int size = static_cast<int>(c.group);
    const real* w = layer.w[PROJECT];
    for (int k = 0; k < 5; ++k)
        for (int g = 0; g < F; g += size, w += size * size)
            product<Start::zero>(m, size, size, x + g, F, w, size, out + k * F + g, 5 * F);
}

// Filters and attention coefficients of all pairs, both directions.
inline void Engine::attention_pairs(int t) {
    const Layer& layer = layers[t];
    LayerState& s = state[t];
    s.alpha.resize(2 * COEFFICIENTS * size_t(n_pairs));
    if (t > 0) s.filter.resize(2 * F * size_t(n_pairs));
    if (layer.spherical) s.slope_filter.resize(2 * HIDDEN * size_t(n_pairs));
    for_each(threads, pair_tasks(), [&](int, int task) {
        const int stop = std::min(n_pairs, (task + 1) * PAIRS_PER_TASK);
        for (int begin = task * PAIRS_PER_TASK; begin < stop; begin += PAIR_BLOCK) {
            const int m = std::min(PAIR_BLOCK, stop - begin);
            // the way back needs the filters for queries, keys and values, which are constant in the first layer
            alignas(64) real constant[PAIR_BLOCK * 2 * F];
            real* w = t > 0 ? &s.filter[2 * F * size_t(begin)] : constant;
            for (int p = begin; p < begin + m; ++p)
                radial(layer.w[TABLE] + size_t(knot[p]) * TABLE_TERMS * 2 * F, &basis[12 * size_t(p)],
                       w + 2 * F * (p - begin));
            if (layer.spherical) {
                alignas(64) real hidden[PAIR_BLOCK * 2 * HIDDEN];
                for (int p = begin; p < begin + m; ++p) {
                    const real *ea = &s.euclid_in[M * size_t(a[p])], *eb = &s.euclid_in[M * size_t(b[p])];
                    real difference[M], inv[D];
                    for (int k = 0; k < M; ++k) difference[k] = eb[k] - ea[k];
                    invariants(difference, inv);
                    for (int k = 0; k < 2 * HIDDEN; k += LANES) {
                        vec x = load(layer.w[S1_BIAS] + k), slope;
                        for (int d = 0; d < D; ++d) x += inv[d] * load(layer.w[S1] + d * 2 * HIDDEN + k);
                        store(hidden + (p - begin) * 2 * HIDDEN + k, silu(x, slope));
                        store(&s.slope_filter[2 * HIDDEN * size_t(p) + k], slope);
                    }
                }
                for (int f = 0; f < 2; ++f)
                    product<Start::add>(m, HIDDEN, F, hidden + f * HIDDEN, 2 * HIDDEN, layer.w[S2] + f * HIDDEN * F, F,
                                        w + f * F, 2 * F);
            }
            for (int p = begin; p < begin + m; ++p, w += 2 * F) {
                const real *qa = &s.projected[5 * F * size_t(a[p])], *qb = &s.projected[5 * F * size_t(b[p])];
                real *ab = &s.alpha[2 * COEFFICIENTS * size_t(p)], *ba = ab + COEFFICIENTS;
                if constexpr (WHOLE_HEADS) {
                    vec sums[COEFFICIENT_SUMS] = {};
                    coefficients<WIDTH_X>(qa, qb, w, H, sums, sums + COEFFICIENTS);
                    coefficients<WIDTH_E>(qa + F, qb + F, w + F, D, sums + H, sums + COEFFICIENTS + H);
                    store_totals<2 * COEFFICIENTS>(sums, ab);
                    continue;
                }
                for (int h = 0, k = 0; h < H; ++h, k += WIDTH_X) {
                    ab[h] = triple<WIDTH_X>(qa + k, w + k, qb + 2 * F + k);
                    ba[h] = triple<WIDTH_X>(qb + k, w + k, qa + 2 * F + k);
                }
                for (int d = 0, k = F; d < D; ++d, k += WIDTH_E) {
                    ab[H + d] = triple<WIDTH_E>(qa + k, w + k, qb + 2 * F + k);
                    ba[H + d] = triple<WIDTH_E>(qb + k, w + k, qa + 2 * F + k);
                }
            }
        }
    });
}

// Features and Euclidean variables of some atoms after the sums over their neighbours; `x` (m, F) is updated in place.
inline void Engine::attention_atoms(int t, int begin, int end) {
    LayerState& s = state[t];
    for (int i = begin; i < end; ++i) {
        real* out = &x[F * size_t(i)];
        vec sum[F / LANES];
        for (int k = 0; k < F / LANES; ++k) sum[k] = load(out + k * LANES);
        real ev[M];
        for (int k = 0; k < M; ++k) ev[k] = layers[t].spherical ? s.euclid_in[M * size_t(i) + k] : real(0);
        for (int e = edge_start[i]; e < edge_start[i + 1]; ++e) {
            const int j = edges[e].neighbor, p = edges[e].pair >> 1, second_end = edges[e].pair & 1;
            const real* alpha = &s.alpha[(2 * size_t(p) + second_end) * COEFFICIENTS];
            const real* v = &s.projected[5 * F * size_t(j) + 4 * F];
            const real w = weight[p];
            if constexpr (WIDTH_X % LANES == 0) {
                for (int k = 0; k < F / LANES; ++k) sum[k] += w * alpha[k * LANES / WIDTH_X] * load(v + k * LANES);
            } else {
                alignas(64) real spread[F];
                for (int k = 0; k < F; ++k) spread[k] = w * alpha[k / WIDTH_X];
                for (int k = 0; k < F / LANES; ++k) sum[k] += load(spread + k * LANES) * load(v + k * LANES);
            }
            const real* y = &harmonics[M * size_t(p)];
            by_degree([&](auto d, auto m, auto size) {
                const real f = w * alpha[H + d] * (second_end ? parity(d) : real(1));
                for (int k = m; k < m + size; ++k) ev[k] += f * y[k];
            });
        }
        for (int k = 0; k < F / LANES; ++k) store(out + k * LANES, sum[k]);
        for (int k = 0; k < M; ++k) s.euclid[M * size_t(i) + k] = ev[k];
    }
}

// Normalise rows in place; keeps the normalised values before scale and bias, and the rate.
static inline void normalise(real* x, const real* scale, const real* bias, bool rms, real* normed, real* rate) {
    vec sum = {}, square = {};
    if (!rms)
        for (int k = 0; k < F; k += LANES) sum += load(x + k);
    const real mean = rms ? real(0) : total(sum) / F;
    for (int k = 0; k < F; k += LANES) {
        const vec y = load(x + k) - mean;
        square += y * y;
    }
    *rate = 1 / std::sqrt(total(square) / F + NORM_EPSILON);
    for (int k = 0; k < F; k += LANES) {
        const vec y = (load(x + k) - mean) * *rate;
        store(normed + k, y);
        store(x + k, bias ? y * load(scale + k) + load(bias + k) : y * load(scale + k));
    }
}

// x += B silu(A silu(x) + a) + b for m rows; keeps both derivatives of silu.
static inline void residual(const real* const* w, int m, real* x, real* slope_in, real* slope, real* work) {
    real* hidden = work + 32 * F;
    for (int k = 0; k < m * F; k += LANES) {
        vec s;
        store(work + k, silu(load(x + k), s));
        store(slope_in + k, s);
    }
    product<Start::bias>(m, F, F, work, F, w[0], F, hidden, F, w[2]);
    for (int k = 0; k < m * F; k += LANES) {
        vec s;
        store(hidden + k, silu(load(hidden + k), s));
        store(slope + k, s);
    }
    for (int i = 0; i < m; ++i)
        for (int k = 0; k < F; k += LANES) store(x + i * F + k, load(x + i * F + k) + load(w[5] + k));
    product<Start::add>(m, F, F, hidden, F, w[3], F, x, F);
}

// What follows the attention on atoms begin..end-1; x (m, F) becomes the layer's output.
inline void Engine::refine(int t, int begin, int end, real* x, real* work) {
    const Layer& layer = layers[t];
    LayerState& s = state[t];
    const int m = end - begin;
    const size_t row = F * size_t(begin);
    if (layer.w[NORM1])
        for (int i = 0; i < m; ++i)
            normalise(x + i * F, layer.w[NORM1], layer.w[NORM1_BIAS], c.rms, &s.normed1[row + i * F],
                      &s.rate1[begin + i]);
    if (layer.w[MLP1_A]) residual(layer.w + MLP1_A, m, x, &s.slope1a[row], &s.slope1[row], work);
    real *in = work, *out = work + 32 * EXCHANGE;
    for (int i = 0; i < m; ++i) {
        std::memcpy(in + i * EXCHANGE, x + i * F, F * sizeof(real));
        invariants(&s.euclid[M * size_t(begin + i)], in + i * EXCHANGE + F);
    }
    product<Start::bias>(m, F + D, EXCHANGE, in, EXCHANGE, layer.w[EXCHANGE_W], EXCHANGE, out, EXCHANGE,
                         layer.w[EXCHANGE_BIAS]);
    real* next = t + 1 < int(layers.size()) ? &state[t + 1].euclid_in[M * size_t(begin)] : nullptr;
    for (int i = 0; i < m; ++i) {
        for (int k = 0; k < F; k += LANES) store(x + i * F + k, load(x + i * F + k) + load(out + i * EXCHANGE + k));
        by_degree([&](auto d, auto first_m, auto size) {
            const real g = out[i * EXCHANGE + F + d];
            s.gate[D * size_t(begin + i) + d] = g;
            if (next)
                for (int k = first_m; k < first_m + size; ++k)
                    next[i * M + k] = (1 + g) * s.euclid[M * size_t(begin + i) + k];
        });
    }
    if (layer.w[NORM2])
        for (int i = 0; i < m; ++i)
            normalise(x + i * F, layer.w[NORM2], layer.w[NORM2_BIAS], c.rms, &s.normed2[row + i * F],
                      &s.rate2[begin + i]);
    if (layer.w[MLP2_A]) residual(layer.w + MLP2_A, m, x, &s.slope2a[row], &s.slope2[row], work);
}

// Energies, charges before they are made to sum to the total, and Hirshfeld ratios.
inline void Engine::heads(int begin, int end, const real* x, real* work) {
    const int m = end - begin, width = heads_width();
    real* slope = &heads_slope[size_t(width) * begin];
    product<Start::bias>(m, F, width, x, F, c.head, width, work, width, c.head_bias);
    for (int k = 0; k < m * width; k += LANES) {
        vec s;
        store(work + k, silu(load(work + k), s));
        store(slope + k, s);
    }
    const int ends[3] = {int(c.energy_width), int(c.energy_width + c.charge_width), width};
    for (int i = 0; i < m; ++i) {
        const int z = type[begin + i];
        const real *row = work + i * width, *last = c.last + size_t(z) * width;
        double value[3];
        for (int head = 0, k = 0; head < 3; ++head) {
            // energies of single atoms are large numbers: sums in double precision lose nothing of them
            double sum = 0;
            for (; k < ends[head]; ++k) sum += double(row[k]) * double(last[k]);
            value[head] = sum + c.last_bias[3 * z + head];
        }
        atom_energy[begin + i] = value[0];
        charges[begin + i] = real(value[1]);
        ratios[begin + i] = real(std::abs(value[2]));
        ratio_sign[begin + i] = value[2] < 0 ? real(-1) : real(1);
    }
}

inline void Engine::start() {
    const size_t rows = F * size_t(n);
    x.resize(rows);
    std::memcpy(x.get(), x0.get(), rows * sizeof(real));
    if (c.initial_divisor == 0) return;
    const real scale = real(c.divisor / c.initial_divisor);
    for (int i = 0; i < n; ++i) {
        real* ev = &state[0].euclid_in[M * size_t(i)];
        for (int k = 0; k < M; ++k) ev[k] = 0;
        for (int e = edge_start[i]; e < edge_start[i + 1]; ++e) {
            const int p = edges[e].pair >> 1;
            const real* y = &harmonics[M * size_t(p)];
            by_degree([&](auto d, auto m, auto size) {
                const real f = scale * weight[p] * (edges[e].pair & 1 ? parity(d) : real(1));
                for (int k = m; k < m + size; ++k) ev[k] += f * y[k];
            });
        }
    }
}

inline void Engine::forward() {
    const size_t rows = F * size_t(n);
    for (auto& s : state) {
        for (auto* buffer : {&s.normed1, &s.slope1a, &s.slope1, &s.normed2, &s.slope2a, &s.slope2})
            buffer->resize(rows);
        s.projected.resize(5 * rows), s.rate1.resize(n), s.rate2.resize(n), s.gate.resize(D * size_t(n));
        s.euclid_in.resize(M * size_t(n)), s.euclid.resize(M * size_t(n));
    }
    heads_slope.resize(heads_width() * size_t(n));
    atom_energy.resize(n), charges.resize(n), ratios.resize(n), ratio_sign.resize(n);
    start();
    if (!first_projected) {
        // the first layer's queries, keys and values are those of the elements
        project(layers[0], x0.get(), n, state[0].projected.get());
        first_projected = true;
    }
    const int last = int(layers.size()) - 1, width = std::max(heads_width(), 2 * EXCHANGE);
    for (int k = 0; k < threads; ++k) memory(k, 32 * size_t(width));
    for (int t = 0; t <= last; ++t) {
        attention_pairs(t);
        for_each(threads, atom_tasks(), [&](int thread, int task) {
            const int begin = task * atoms_per_task(), end = std::min(n, begin + atoms_per_task());
            real *work = memory(thread, 32 * size_t(width)), *mine = &x[F * size_t(begin)];
            attention_atoms(t, begin, end);
            refine(t, begin, end, mine, work);
            if (t < last)
                project(layers[t + 1], mine, end - begin, &state[t + 1].projected[5 * F * size_t(begin)]);
            else
                heads(begin, end, mine, work);
        });
    }
}
