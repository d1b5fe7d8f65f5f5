// Pairs within the cutoff: lists seen from the atoms, tables' weights, cutoff function, harmonics, repulsion, forces.
#pragma once

#include "engine.hpp"

// weights of value, slope and curvature at both knots of an interval (quintic Hermite polynomials), and derivatives
static inline void hermite(double x, double step, real* w) {
    double x2 = x * x, x3 = x2 * x, x4 = x3 * x, x5 = x4 * x;
    w[0] = real(1 - 10 * x3 + 15 * x4 - 6 * x5);
    w[1] = real(x - 6 * x3 + 8 * x4 - 3 * x5);
    w[2] = real(0.5 * x2 - 1.5 * x3 + 1.5 * x4 - 0.5 * x5);
    w[3] = real(10 * x3 - 15 * x4 + 6 * x5);
    w[4] = real(-4 * x3 + 7 * x4 - 3 * x5);
    w[5] = real(0.5 * x3 - x4 + 0.5 * x5);
    w[6] = real((-30 * x2 + 60 * x3 - 30 * x4) / step);
    w[7] = real((1 - 18 * x2 + 32 * x3 - 15 * x4) / step);
    w[8] = real((x - 4.5 * x2 + 6 * x3 - 2.5 * x4) / step);
    w[9] = -w[6];
    w[10] = real((-12 * x2 + 28 * x3 - 15 * x4) / step);
    w[11] = real((1.5 * x2 - 4 * x3 + 2.5 * x4) / step);
}

static inline void add_lattice(const double* cell, const int16_t* shift, double* v) {
    for (int k = 0; k < 3; ++k) v[k] += shift[0] * cell[k] + shift[1] * cell[3 + k] + shift[2] * cell[6 + k];
}

inline void Engine::geometry(const double* positions, const double* cell) {
    const int listed = static_cast<int>(first.size());
    a.clear(), b.clear();
    vector.resize(3 * size_t(listed));
    std::vector<int32_t> count(n + 1, 0);
    n_pairs = 0;
    const double square = c.cutoff * c.cutoff;
    for (int p = 0; p < listed; ++p) {
        double v[3];
        for (int k = 0; k < 3; ++k) v[k] = positions[3 * second[p] + k] - positions[3 * first[p] + k];
        if (cell) add_lattice(cell + 9 * segment[first[p]], &shift[3 * size_t(p)], v);
        if (v[0] * v[0] + v[1] * v[1] + v[2] * v[2] >= square) continue;
        for (int k = 0; k < 3; ++k) vector[3 * size_t(n_pairs) + k] = v[k];
        a.push_back(first[p]), b.push_back(second[p]);
        ++count[first[p]], ++count[second[p]];
        ++n_pairs;
    }
    edge_start.assign(n + 1, 0);
    for (int i = 0; i < n; ++i) edge_start[i + 1] = edge_start[i] + count[i];
    edges.resize(2 * size_t(n_pairs));
    std::vector<int32_t> next(edge_start.begin(), edge_start.end());
    for (int p = 0; p < n_pairs; ++p) {
        edges[next[a[p]]++] = {b[p], 2 * p};
        edges[next[b[p]]++] = {a[p], 2 * p + 1};
    }
    knot.resize(n_pairs);
    pair_energy.assign(n_pairs, 0.0);
    const size_t padded = rounded_up(n_pairs, LANES);
    weight.resize(padded), weight_slope.resize(padded), basis.resize(12 * padded), harmonics.resize(M * padded);
    distance_gradient.zero(padded), harmonics_gradient.zero(M * padded);
    coefficient_gradient.resize(2 * COEFFICIENTS * padded), invariant_gradient.resize(D * padded);
    pair_force.resize(3 * padded);
    const double step = c.cutoff / c.knots;
    for_each(threads, pair_tasks(), [&](int, int task) {
        const int end = std::min(n_pairs, (task + 1) * PAIRS_PER_TASK);
        for (int p = task * PAIRS_PER_TASK; p < end; p += LANES) {
            const int lanes = std::min(LANES, end - p);
            vec u[3] = {};
            for (int k = 0; k < lanes; ++k) {
                const double* v = &vector[3 * size_t(p + k)];
                const double r = std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
                for (int x = 0; x < 3; ++x) u[x][k] = real(v[x] / r);
                const double place = r / step;
                const int index = std::min(static_cast<int>(place), static_cast<int>(c.knots) - 1);
                knot[p + k] = index;
                hermite(place - index, step, &basis[12 * size_t(p + k)]);
                const double x = r / c.cutoff;
                const double value = c.cosine ? 0.5 * (std::cos(PI * x) + 1) : 1 + x * x * x * (-10 + x * (15 - 6 * x));
                const double slope = c.cosine ? -0.5 * PI * std::sin(PI * x) : -30 * x * x * (1 - x) * (1 - x);
                weight[p + k] = real(value / c.divisor), weight_slope[p + k] = real(slope / c.cutoff / c.divisor);
            }
            vec y[M];
            ::harmonics(u[0], u[1], u[2], y);
            for (int m = 0; m < M; ++m)
                for (int k = 0; k < lanes; ++k) harmonics[M * size_t(p + k) + m] = y[m][k];
        }
    });
}

// Screened repulsion of nuclei: energy of a pair (both directions) and its derivative with respect to the distance.
inline double Engine::repulsion(int p, double& slope) const {
    slope = 0;
    const double* v = vector.get() + 3 * size_t(p);
    const double r = std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
    const double place = std::max(r / c.repulsion_reach, 1e-3);
    if (!c.nuclear || place >= 1 - 1e-3) return 0;
    const double *za = c.nuclear + 2 * type[a[p]], *zb = c.nuclear + 2 * type[b[p]];
    const double inner = 1 / (1 + std::exp(1 / (1 - place) - 1 / place));
    const double inner_slope = place > 1e-3 ? -inner * (1 - inner) *
                                                  (1 / ((1 - place) * (1 - place)) + 1 / (place * place)) /
                                                  c.repulsion_reach
                                            : 0;
    const double x = r / c.cutoff;
    const double outer = c.cosine ? 0.5 * (std::cos(PI * x) + 1) : 1 + x * x * x * (-10 + x * (15 - 6 * x));
    const double outer_slope =
        (c.cosine ? -0.5 * PI * std::sin(PI * x) : -30 * x * x * (1 - x) * (1 - x)) / c.cutoff;
    double screening = 0, screening_slope = 0;
    for (int k = 0; k < 4; ++k) {
        const double rate = c.screening[k] * (za[1] + zb[1]), e = c.screening[4 + k] * std::exp(-rate * r);
        screening += e, screening_slope -= rate * e;
    }
    const double strength = c.coulomb * za[0] * zb[0] / r, value = inner * outer * screening;
    slope = strength * (inner_slope * outer * screening + inner * outer_slope * screening +
                        inner * outer * screening_slope - value / r);
    return strength * value;
}

// Forces from the gradients with respect to distances and harmonics.
inline void Engine::forces(double* out) {
    for_each(threads, pair_tasks(), [&](int, int task) {
        const int end = std::min(n_pairs, (task + 1) * PAIRS_PER_TASK);
        for (int p = task * PAIRS_PER_TASK; p < end; p += LANES) {
            const int lanes = std::min(LANES, end - p);
            vec u[3] = {}, g[M] = {}, gu[3] = {};
            double inverse[LANES] = {};
            for (int k = 0; k < lanes; ++k) {
                const double* v = &vector[3 * size_t(p + k)];
                inverse[k] = 1 / std::sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
                for (int x = 0; x < 3; ++x) u[x][k] = real(v[x] * inverse[k]);
                for (int m = 0; m < M; ++m) g[m][k] = harmonics_gradient[M * size_t(p + k) + m];
            }
            ::harmonics_gradient(u[0], u[1], u[2], g, gu[0], gu[1], gu[2]);
            const vec radial = gu[0] * u[0] + gu[1] * u[1] + gu[2] * u[2];
            for (int k = 0; k < lanes; ++k) {
                double slope;
                pair_energy[p + k] = repulsion(p + k, slope);
                slope += distance_gradient[p + k];
                const double* v = &vector[3 * size_t(p + k)];
                // dE/dr_ij: along the pair, and what turns it
                for (int x = 0; x < 3; ++x) {
                    const double unit = v[x] * inverse[k];
                    pair_force[3 * size_t(p + k) + x] = slope * unit + (gu[x][k] - radial[k] * unit) * inverse[k];
                }
            }
        }
    });
    for_each(threads, atom_tasks(), [&](int, int task) {
        const int end = std::min(n, (task + 1) * atoms_per_task());
        for (int i = task * atoms_per_task(); i < end; ++i) {
            double f[3] = {};
            for (int e = edge_start[i]; e < edge_start[i + 1]; ++e) {
                const double sign = edges[e].pair & 1 ? -1 : 1;
                const double* g = &pair_force[3 * size_t(edges[e].pair >> 1)];
                for (int x = 0; x < 3; ++x) f[x] += sign * g[x];
            }
            for (int x = 0; x < 3; ++x) out[3 * i + x] += f[x];
        }
    });
}
