// The derivatives of `layers.hpp`, from the heads back to distances and spherical harmonics.
#pragma once

#include "layers.hpp"

// gradient through `normalise`, in place
static inline void normalise_back(real* g, const real* scale, bool rms, const real* normed, real rate) {
    vec sum = {}, along = {};
    for (int k = 0; k < F; k += LANES) {
        const vec y = load(g + k) * load(scale + k);
        sum += y, along += y * load(normed + k);
    }
    const real mean = rms ? real(0) : total(sum) / F, overlap = total(along) / F;
    for (int k = 0; k < F; k += LANES)
        store(g + k, rate * (load(g + k) * load(scale + k) - mean - overlap * load(normed + k)));
}

// gradient through `residual`, in place
static inline void residual_back(const real* const* w, int m, real* g, const real* slope_in, const real* slope,
                                 real* work) {
    real* hidden = work + 32 * F;
    product<Start::zero>(m, F, F, g, F, w[4], F, hidden, F);
    for (int k = 0; k < m * F; k += LANES) store(hidden + k, load(hidden + k) * load(slope + k));
    product<Start::zero>(m, F, F, hidden, F, w[1], F, work, F);
    for (int k = 0; k < m * F; k += LANES) store(g + k, load(g + k) + load(work + k) * load(slope_in + k));
}

inline void Engine::heads_back(int begin, int end, const real* charge_gradient, const real* ratio_gradient, real* gx,
                               real* work) {
    const int m = end - begin, width = heads_width();
    const int ends[3] = {int(c.energy_width), int(c.energy_width + c.charge_width), width};
    for (int i = 0; i < m; ++i) {
        const real* last = c.last + size_t(type[begin + i]) * width;
        const real* slope = &heads_slope[size_t(width) * (begin + i)];
        const real g[3] = {real(1), charge_gradient[begin + i], ratio_gradient[begin + i] * ratio_sign[begin + i]};
        for (int head = 0, k = 0; head < 3; ++head)
            for (; k < ends[head]; k += LANES) store(work + i * width + k, g[head] * load(last + k) * load(slope + k));
    }
    product<Start::zero>(m, width, F, work, width, c.head_back, F, gx, F);
}

// From the gradient of a layer's output gx (m, F), and euclid_gradient, to those after its attention.
inline void Engine::refine_back(int t, int begin, int end, real* gx, real* work) {
    const Layer& layer = layers[t];
    LayerState& s = state[t];
    const int m = end - begin;
    const size_t row = F * size_t(begin);
    if (layer.w[MLP2_A]) residual_back(layer.w + MLP2_A, m, gx, &s.slope2a[row], &s.slope2[row], work);
    if (layer.w[NORM2])
        for (int i = 0; i < m; ++i)
            normalise_back(gx + i * F, layer.w[NORM2], c.rms, &s.normed2[row + i * F], s.rate2[begin + i]);
    real *in = work, *out = work + 32 * EXCHANGE;
    const bool any = t + 1 < int(layers.size());  // the last layer's Euclidean variables go nowhere
    for (int i = 0; i < m; ++i) {
        std::memcpy(in + i * EXCHANGE, gx + i * F, F * sizeof(real));
        const real *ev = &s.euclid[M * size_t(begin + i)], *g = &euclid_gradient[M * size_t(begin + i)];
        by_degree([&](auto d, auto first_m, auto size) {
            real sum = 0;
            if (any)
                for (int k = first_m; k < first_m + size; ++k) sum += g[k] * ev[k];
            in[i * EXCHANGE + F + d] = sum;
        });
    }
    product<Start::zero>(m, F + D, EXCHANGE, in, EXCHANGE, layer.w[EXCHANGE_BACK], EXCHANGE, out, EXCHANGE);
    for (int i = 0; i < m; ++i) {
        for (int k = 0; k < F; k += LANES) store(gx + i * F + k, load(gx + i * F + k) + load(out + i * EXCHANGE + k));
        const real* ev = &s.euclid[M * size_t(begin + i)];
        real *g = &euclid_gradient[M * size_t(begin + i)], *after = &euclid_after[M * size_t(begin + i)];
        by_degree([&](auto d, auto first_m, auto size) {
            const real gate = 1 + s.gate[D * size_t(begin + i) + d];
            const real invariant = 2 * INVARIANT.value[d] * out[i * EXCHANGE + F + d];
            for (int k = first_m; k < first_m + size; ++k) after[k] = (any ? gate * g[k] : 0) + invariant * ev[k];
        });
    }
    if (layer.w[MLP1_A]) residual_back(layer.w + MLP1_A, m, gx, &s.slope1a[row], &s.slope1[row], work);
    if (layer.w[NORM1])
        for (int i = 0; i < m; ++i)
            normalise_back(gx + i * F, layer.w[NORM1], c.rms, &s.normed1[row + i * F], s.rate1[begin + i]);
    std::memcpy(&x_after[row], gx, m * F * sizeof(real));
}

// one number per head, W features wide, for the features of vector c
template <int W>
static inline vec per_head(const real* x, int c) {
    if constexpr (W % LANES == 0) return splat(x[c * LANES / W]);
    vec r;
    for (int i = 0; i < LANES; ++i) r[i] = x[(c * LANES + i) / W];
    return r;
}

// gradient of one filter's features, and its product with the slope of the radial part
template <int W>
static inline void filter_gradient(const real* qa, const real* qb, const real* ab, const real* ba, int heads,
                                   const real* row, const real* slope_basis, real* out, vec& along) {
    const real *ka = qa + 2 * F, *kb = qb + 2 * F;
    vec weight[2 * TABLE_TERMS];
    for (int t = 0; t < 2 * TABLE_TERMS; ++t) weight[t] = splat(slope_basis[t]);
    for (int k = 0; k < heads * W; k += LANES) {
        const vec f = per_head<W>(ab, k / LANES), g = per_head<W>(ba, k / LANES);
        const vec w = f * load(qa + k) * load(kb + k) + g * load(qb + k) * load(ka + k);
        vec slope = weight[0] * load(row + k);
        for (int t = 1; t < 2 * TABLE_TERMS; ++t) slope += weight[t] * load(row + 2 * F * t + k);
        along += w * slope;
        store(out + k, w);
    }
}

// Gradients of attention coefficients, filters, distances, harmonics and invariants of all pairs.
inline void Engine::attention_pairs_back(int t) {
    const Layer& layer = layers[t];
    LayerState& s = state[t];
    for_each(threads, pair_tasks(), [&](int, int task) {
        const int stop = std::min(n_pairs, (task + 1) * PAIRS_PER_TASK);
        alignas(64) real filters[PAIR_BLOCK * 2 * F], hidden[PAIR_BLOCK * 2 * HIDDEN];
        for (int begin = task * PAIRS_PER_TASK; begin < stop; begin += PAIR_BLOCK) {
            const int m = std::min(PAIR_BLOCK, stop - begin);
            for (int p = begin; p < begin + m; ++p) {
                const int i = a[p], j = b[p];
                const real *qi = &s.projected[5 * F * size_t(i)], *qj = &s.projected[5 * F * size_t(j)];
                const real *gi = &x_after[F * size_t(i)], *gj = &x_after[F * size_t(j)];
                const real *ei = &euclid_after[M * size_t(i)], *ej = &euclid_after[M * size_t(j)];
                const real *alpha_ij = &s.alpha[2 * COEFFICIENTS * size_t(p)], *alpha_ji = alpha_ij + COEFFICIENTS;
                real *ij = &coefficient_gradient[2 * COEFFICIENTS * size_t(p)], *ji = ij + COEFFICIENTS;
                const real* y = &harmonics[M * size_t(p)];
                real* gy = &harmonics_gradient[M * size_t(p)];
                const real w = weight[p];
                if constexpr (WHOLE_HEADS) {
                    vec sums[rounded_up(2 * H, LANES)] = {};
                    alignas(64) real both[2 * H];
                    for (int h = 0; h < H; ++h)
                        for (int k = h * WIDTH_X; k < (h + 1) * WIDTH_X; k += LANES) {
                            sums[h] += load(gi + k) * load(qj + 4 * F + k);
                            sums[H + h] += load(gj + k) * load(qi + 4 * F + k);
                        }
                    store_totals<2 * H>(sums, both);
                    for (int h = 0; h < H; ++h) ij[h] = both[h], ji[h] = both[H + h];
                } else {
                    for (int h = 0, k = 0; h < H; ++h, k += WIDTH_X) {
                        ij[h] = dot<WIDTH_X>(gi + k, qj + 4 * F + k);
                        ji[h] = dot<WIDTH_X>(gj + k, qi + 4 * F + k);
                    }
                }
                by_degree([&](auto d, auto first_m, auto size) {
                    const real sign = parity(d), f = w * alpha_ij[H + d], g = sign * w * alpha_ji[H + d];
                    real sum_i = 0, sum_j = 0;
                    for (int k = first_m; k < first_m + size; ++k) {
                        sum_i += ei[k] * y[k], sum_j += ej[k] * y[k];
                        gy[k] += f * ei[k] + g * ej[k];
                    }
                    ij[H + d] = sum_i, ji[H + d] = sign * sum_j;
                });
                real through_weight = 0;
                for (int h = 0; h < COEFFICIENTS; ++h) {
                    through_weight += ij[h] * alpha_ij[h] + ji[h] * alpha_ji[h];
                    ij[h] *= w, ji[h] *= w;
                }
                const real* row = layer.w[TABLE] + size_t(knot[p]) * TABLE_TERMS * 2 * F;
                const real* slopes = &basis[12 * size_t(p) + 6];
                real* out = filters + (p - begin) * 2 * F;
                vec along = {};
                filter_gradient<WIDTH_X>(qi, qj, ij, ji, H, row, slopes, out, along);
                filter_gradient<WIDTH_E>(qi + F, qj + F, ij + H, ji + H, D, row + F, slopes, out + F, along);
                distance_gradient[p] += total(along) + through_weight * weight_slope[p];
            }
            if (!layer.spherical) continue;
            for (int f = 0; f < 2; ++f)
                product<Start::zero>(m, F, HIDDEN, filters + f * F, 2 * F, layer.w[S2_BACK] + f * F * HIDDEN, HIDDEN,
                                     hidden + f * HIDDEN, 2 * HIDDEN);
            vec sums[rounded_up(PAIR_BLOCK * D, LANES)] = {};
            alignas(64) real gradients[PAIR_BLOCK * D];
            for (int p = begin; p < begin + m; ++p)
                for (int k = 0; k < 2 * HIDDEN; k += LANES) {
                    const vec g = load(hidden + (p - begin) * 2 * HIDDEN + k) *
                                  load(&s.slope_filter[2 * HIDDEN * size_t(p) + k]);
                    for (int d = 0; d < D; ++d) sums[(p - begin) * D + d] += g * load(layer.w[S1] + d * 2 * HIDDEN + k);
                }
            store_totals<PAIR_BLOCK * D>(sums, gradients);
            for (int k = 0; k < m * D; ++k)
                invariant_gradient[D * size_t(begin) + k] = 2 * INVARIANT.value[k % D] * gradients[k];
        }
    });
}

// Gradient with respect to the Euclidean variables of atom i before a layer, which act through invariants of pairs.
inline void Engine::euclid_back(int t, int i) {
    const LayerState& s = state[t];
    const real* mine = &s.euclid_in[M * size_t(i)];
    real* g = &euclid_gradient[M * size_t(i)];
    for (int k = 0; k < M; ++k) g[k] = euclid_after[M * size_t(i) + k];
    for (int e = edge_start[i]; e < edge_start[i + 1]; ++e) {
        const real* theirs = &s.euclid_in[M * size_t(edges[e].neighbor)];
        const real* slope = &invariant_gradient[D * size_t(edges[e].pair >> 1)];
        by_degree([&](auto d, auto m, auto size) {
            for (int k = m; k < m + size; ++k) g[k] += slope[d] * (mine[k] - theirs[k]);
        });
    }
}

// Sums over the neighbours of atom i: gradients of its query and key of one filter and, with the first, of its value.
template <int FILTER>
inline void Engine::neighbour_sums(const LayerState& s, int i, real* out) const {
    constexpr int N = F / LANES, W = FILTER ? WIDTH_E : WIDTH_X;
    vec q[N] = {}, k[N] = {}, v[N] = {};
    for (int e = edge_start[i]; e < edge_start[i + 1]; ++e) {
        const int j = edges[e].neighbor, p = edges[e].pair >> 1, mine = edges[e].pair & 1;
        const real* w = &s.filter[2 * F * size_t(p) + FILTER * F];
        const real* other = &s.projected[5 * F * size_t(j) + FILTER * F];
        const real* to = &coefficient_gradient[(2 * size_t(p) + mine) * COEFFICIENTS + FILTER * H];
        const real* from = &coefficient_gradient[(2 * size_t(p) + 1 - mine) * COEFFICIENTS + FILTER * H];
        const real* alpha = &s.alpha[(2 * size_t(p) + 1 - mine) * COEFFICIENTS];
        const real* g = &x_after[F * size_t(j)];
        for (int c = 0; c < N; ++c) {
            const vec filter = load(w + c * LANES);
            q[c] += per_head<W>(to, c) * filter * load(other + 2 * F + c * LANES);
            k[c] += per_head<W>(from, c) * filter * load(other + c * LANES);
            if constexpr (FILTER == 0) v[c] += weight[p] * per_head<W>(alpha, c) * load(g + c * LANES);
        }
    }
    for (int c = 0; c < N; ++c) {
        store(out + FILTER * F + c * LANES, q[c]), store(out + (2 + FILTER) * F + c * LANES, k[c]);
        if constexpr (FILTER == 0) store(out + 4 * F + c * LANES, v[c]);
    }
}

// From the gradients after a layer's attention to those of its input: sums over neighbours, then projections.
inline void Engine::attention_atoms_back(int t, int begin, int end, real* gx, real* work) {
    const Layer& layer = layers[t];
    for (int i = begin; i < end; ++i) {
        neighbour_sums<0>(state[t], i, work + (i - begin) * 5 * F);
        neighbour_sums<1>(state[t], i, work + (i - begin) * 5 * F);
        if (layer.spherical) euclid_back(t, i);
    }
    const int size = static_cast<int>(c.group), m = end - begin;
    std::memcpy(gx, &x_after[F * size_t(begin)], m * F * sizeof(real));
    const real* w = layer.w[PROJECT_BACK];
    for (int k = 0; k < 5; ++k)
        for (int g = 0; g < F; g += size, w += size * size)
            product<Start::add>(m, size, size, work + k * F + g, 5 * F, w, size, gx + g, F);
}

// Gradients with respect to distances and harmonics; charge_gradient with respect to charges before they are shifted.
inline void Engine::backward(const real* charge_gradient, const real* ratio_gradient) {
    const int last = int(layers.size()) - 1;
    const size_t width = std::max(std::max(heads_width(), 2 * EXCHANGE), 5 * F);
    x_after.resize(F * size_t(n)), euclid_after.resize(M * size_t(n)), euclid_gradient.resize(M * size_t(n));
    x_gradient.resize(F * size_t(n));
    for (int k = 0; k < threads; ++k) memory(k, 32 * width);
    for (int t = last; t >= 0; --t) {
        for_each(threads, atom_tasks(), [&](int thread, int task) {
            const int begin = task * atoms_per_task(), end = std::min(n, begin + atoms_per_task());
            real *work = memory(thread, 32 * width), *gx = &x_gradient[F * size_t(begin)];
            if (t == last)
                heads_back(begin, end, charge_gradient, ratio_gradient, gx, work);
            else
                attention_atoms_back(t + 1, begin, end, gx, work);
        });
        // the neighbours' gradients after the next layer's attention were still read above
        for_each(threads, atom_tasks(), [&](int thread, int task) {
            const int begin = task * atoms_per_task(), end = std::min(n, begin + atoms_per_task());
            refine_back(t, begin, end, &x_gradient[F * size_t(begin)], memory(thread, 32 * width));
        });
        attention_pairs_back(t);
    }
    if (c.initial_divisor == 0) return;
    // Euclidean variables started as averages over neighbours
    for (int i = 0; i < n; ++i) euclid_back(0, i);
    const real scale = real(c.divisor / c.initial_divisor);
    for (int p = 0; p < n_pairs; ++p) {
        const real *gi = &euclid_gradient[M * size_t(a[p])], *gj = &euclid_gradient[M * size_t(b[p])];
        by_degree([&](auto d, auto m, auto size) {
            for (int k = m; k < m + size; ++k) {
                const real g = scale * (gi[k] + parity(d) * gj[k]);
                harmonics_gradient[M * size_t(p) + k] += weight[p] * g;
                distance_gradient[p] += weight_slope[p] * g * harmonics[M * size_t(p) + k];
            }
        });
    }
}
