// Electrostatics and dispersion over a half list, with derivatives by positions, charges and Hirshfeld ratios.
#pragma once

#include "geometry.hpp"

constexpr int PAIRS_PER_CHUNK = 16384, MOST_CHUNKS = 16;

static inline vec square_root(vec x) {
    vec r;
    for (int k = 0; k < LANES; ++k) r[k] = std::sqrt(x[k]);
    return r;
}

// x^(1/7) of normal numbers: the exponent divided by seven, then Halley's iterations
static inline vec seventh_root(vec x) {
    constexpr double one = sizeof(real) == 4 ? double(127 << 23) : double(int64_t(1023) << 52);
    ivec bits;
    std::memcpy(&bits, &x, sizeof x);
    const vec scaled = __builtin_convertvector(bits, vec) * real(1.0 / 7) + real(one * 6 / 7);
    bits = __builtin_convertvector(scaled, ivec);
    vec y;
    std::memcpy(&y, &bits, sizeof y);
    for (int i = 0; i < (sizeof(real) == 4 ? 3 : 4); ++i) {
        const vec y2 = y * y, y7 = y2 * y2 * y2 * y;
        y *= (6 * y7 + 8 * x) / (8 * y7 + 6 * x);
    }
    return y;
}

struct LongPairs {  // LANES pairs at once
    vec r, electric, electric_slope, off, off_slope;
};

// V(r) and the switch of the dispersion from the table
static inline void from_table(const Numbers& c, LongPairs& p) {
    const real inverse = real(1 / c.long_step), end = real(c.long_knots * c.long_step);
    vec term[2 * TABLE_TERMS][2];
    vec x;
    for (int k = 0; k < LANES; ++k) {
        const real place = std::min(p.r[k], end) * inverse;
        const int index = std::min(static_cast<int>(place), static_cast<int>(c.long_knots) - 1);
        const real* row = c.pair_table + 2 * TABLE_TERMS * size_t(index);
        x[k] = place - index;
        for (int t = 0; t < 2 * TABLE_TERMS; ++t) term[t][0][k] = row[2 * t], term[t][1][k] = row[2 * t + 1];
    }
    const vec x2 = x * x, x3 = x2 * x, x4 = x3 * x, x5 = x4 * x;
    const vec w[6] = {1 - 10 * x3 + 15 * x4 - 6 * x5, x - 6 * x3 + 8 * x4 - 3 * x5,
                      real(0.5) * (x2 - 3 * x3 + 3 * x4 - x5), 10 * x3 - 15 * x4 + 6 * x5,
                      -4 * x3 + 7 * x4 - 3 * x5, real(0.5) * (x3 - 2 * x4 + x5)};
    const vec rise = 30 * x2 * (1 - x) * (1 - x);
    const vec s[6] = {-rise, 1 - 18 * x2 + 32 * x3 - 15 * x4, x - real(4.5) * x2 + 6 * x3 - real(2.5) * x4,
                      rise, -12 * x2 + 28 * x3 - 15 * x4, real(1.5) * x2 - 4 * x3 + real(2.5) * x4};
    p.electric = p.electric_slope = p.off = p.off_slope = vec{};
    for (int t = 0; t < 2 * TABLE_TERMS; ++t) {
        p.electric += w[t] * term[t][0], p.electric_slope += s[t] * term[t][0];
        p.off += w[t] * term[t][1], p.off_slope += s[t] * term[t][1];
    }
    p.electric_slope *= inverse, p.off_slope *= inverse;
    if (c.long_limit != 0) return;
    // without a cutoff the table ends where V(r) = 1/r
    const vec bare = 1 / p.r;
    p.electric = p.r >= end ? bare : p.electric;
    p.electric_slope = p.r >= end ? -bare * bare : p.electric_slope;
}

inline void Engine::long_range(const double* positions, const double* cell) {
    const int listed = static_cast<int>(long_first.size());
    long_chunks = listed ? std::max(1, std::min(MOST_CHUNKS, listed / PAIRS_PER_CHUNK)) : 0;
    if (!listed) return;
    long_sums.resize(size_t(LONG_SUMS) * n * long_chunks);
    polarisability.resize(n);
    for (int i = 0; i < n; ++i) polarisability[i] = c.free_atoms[2 * type[i]] * ratios[i];
    const real limit = c.long_limit > 0 ? real(c.long_limit) : INFINITY;
    const real per_bohr = real(1 / c.bohr);
    for_each(threads, long_chunks, [&](int, int chunk) {
        double* sums = &long_sums[size_t(LONG_SUMS) * n * chunk];
        std::memset(sums, 0, size_t(LONG_SUMS) * n * sizeof(double));
        const int stop = static_cast<int>(int64_t(listed) * (chunk + 1) / long_chunks);
        for (int begin = static_cast<int>(int64_t(listed) * chunk / long_chunks); begin < stop; begin += LANES) {
            const int lanes = std::min(LANES, stop - begin);
            // lanes without a pair repeat the last one and count nothing
            vec x[3], qi, qj, ai, aj, k6;
            for (int k = 0; k < LANES; ++k) {
                const size_t p = begin + std::min(k, lanes - 1);
                const int i = long_first[p], j = long_second[p];
                double v[3];
                for (int d = 0; d < 3; ++d) v[d] = positions[3 * j + d] - positions[3 * i + d];
                if (cell) add_lattice(cell + 9 * segment[i], &long_shift[3 * p], v);
                for (int d = 0; d < 3; ++d) x[d][k] = real(v[d]);
                qi[k] = charges[i], qj[k] = charges[j], ai[k] = polarisability[i], aj[k] = polarisability[j];
                const real ci = c.free_atoms[2 * type[i] + 1], cj = c.free_atoms[2 * type[j] + 1];
                k6[k] = ci * cj;
                if (ci + cj > 0) k6[k] *= 2 / (ci + cj);
            }
            LongPairs p;
            p.r = square_root(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]);
            vec inside;
            for (int k = 0; k < LANES; ++k) inside[k] = k < lanes && p.r[k] < limit ? real(1) : real(0);
            if (total(inside) == 0) continue;
            from_table(c, p);
            const vec strength = real(c.coulomb) * p.electric * inside;
            vec energy = qi * qj * strength, slope = real(c.coulomb) * qi * qj * p.electric_slope * inside;
            vec si = {}, sj = {};
            if (c.hartree > 0) {
                const vec mean = real(0.5) * (ai + aj), s = seventh_root(mean);
                const vec radius = real(c.radius_factor) * s, damped = real(c.damping_factor) * s, d2 = damped * damped;
                const vec width = real(-0.00433008) +
                                  radius * (real(0.24428889) + radius * (real(0.04125273) - real(0.00078893) * radius));
                const vec width_slope =
                    real(0.24428889) + radius * (real(2 * 0.04125273) - real(3 * 0.00078893) * radius);
                const vec ratio = 10 * width * width / d2, y = p.r * per_bohr / damped, y2 = y * y;
                const vec b6 = 1 / (y2 * y2 * y2 + 1), b8 = 1 / (y2 * y2 * y2 * y2 + 1);
                const vec b10 = 1 / (y2 * y2 * y2 * y2 * y2 + 1);
                const vec shape = b6 + ratio * (b8 + real(1.225) * ratio * b10);
                // y d(shape)/dy; 1 - b is y^n b without overflow
                const vec by_y =
                    -(6 * b6 * (1 - b6) + ratio * (8 * b8 * (1 - b8) + real(12.25) * ratio * b10 * (1 - b10)));
                // s d(shape)/ds at constant y
                const vec by_s = ratio * (b8 + real(2.45) * ratio * b10) * 2 * (radius * width_slope / width - 1);
                const vec scale = real(-c.hartree) * k6 / (d2 * d2 * d2) * p.off * inside, e = scale * ai * aj;
                energy += e * shape;
                const vec outer = real(-c.hartree) * k6 / (d2 * d2 * d2) * ai * aj * shape * inside;
                slope += e * by_y / p.r + outer * p.off_slope;
                // both polarisabilities act through their mean, too: s = mean^(1/7)
                const vec through = e * (by_s - by_y - 6 * shape) / (14 * mean);
                si = scale * aj * shape + through, sj = scale * ai * shape + through;
            }
            const vec along = slope / p.r;
            for (int k = 0; k < lanes; ++k) {
                const int i = long_first[begin + k], j = long_second[begin + k];
                double *to = sums + LONG_SUMS * size_t(i), *from = sums + LONG_SUMS * size_t(j);
                to[0] += energy[k];
                to[1] += strength[k] * qj[k], from[1] += strength[k] * qi[k];
                to[2] += si[k], from[2] += sj[k];
                for (int d = 0; d < 3; ++d) {
                    const double f = along[k] * x[d][k];
                    to[3 + d] += f, from[3 + d] -= f;
                }
            }
        }
    });
}

// Derivatives by the charges (before they are shifted to sum to the total) and the ratios; `outside`: dE/dq or null.
inline void Engine::pull(const double* outside, real* by_charge, real* by_ratio) {
    std::vector<double> g(n);
    for (int i = 0; i < n; ++i) {
        double ratio = 0;
        g[i] = outside ? outside[i] : 0.0;
        for (int chunk = 0; chunk < long_chunks; ++chunk) {
            const double* sums = &long_sums[size_t(LONG_SUMS) * (size_t(n) * chunk + i)];
            g[i] += sums[1], ratio += sums[2];
        }
        by_ratio[i] = real(ratio * c.free_atoms[2 * type[i]]);
    }
    for (int s = 0; s < n_structures; ++s) {
        const int begin = structure_start[s], end = structure_start[s + 1];
        double mean = 0;
        for (int i = begin; i < end; ++i) mean += g[i];
        mean /= end > begin ? end - begin : 1;
        for (int i = begin; i < end; ++i) by_charge[i] = real(g[i] - mean);
    }
}
