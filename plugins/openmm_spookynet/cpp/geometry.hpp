// Pairs of atoms: distances, radial and angular functions, short-range repulsion, electrostatics, and their derivatives.
#pragma once
#include <array>
#include "groups.hpp"

constexpr double COULOMB = 14.399645351950548;  // e^2/(4 pi eps0), eV angstrom
constexpr double R3 = 1.7320508075688772935;

// What atoms and pair lists decide, and the options of the model.
struct Numbers {
    int64_t n, slots, n_long, modules, embed_after, exp_weighting, attention, conservation, repulsion, electrostatics;
    int64_t threads;
    const int64_t* index;       // (n, slots)
    const uint8_t* mask;        // (n, slots)
    const double* shifts;       // (n, slots, 3) angstrom, or null
    const int64_t *first, *second;
    const double* long_shifts;  // (n_long, 3) angstrom, or null
    const double *positions, *z, *potential;  // (n, 3), (n), (n) V or null
    double cutoff, long_cutoff, total_charge;  // long_cutoff 0: none
    const double* binomial;  // (RADIAL)
};

// A directed pair within the cutoff, as all members see it; f is the cutoff function.
struct Pair {
    int i, j;
    double r, f, slope_of_log_f, u[3];
};

struct Pairs {
    std::vector<Pair> list;    // sorted by i
    std::vector<int> begin;    // of each atom
    std::vector<real> p, d;    // of atom i: p (3, n_i) at 3 begin_i, d (ND, n_i) at ND begin_i
    int size(int i) const { return begin[i + 1] - begin[i]; }
};

inline Pairs find_pairs(const Numbers& c, const Groups& groups) {
    Pairs pairs;
    pairs.begin.push_back(0);
    const double square = c.cutoff * c.cutoff, within = (1 - 6e-4) * (1 - 6e-4) * square;
    for (int i = 0; i < c.n; ++i) {
        for (int s = 0; s < c.slots; ++s) {
            const int64_t at = i * c.slots + s;
            if (!c.mask[at]) continue;
            Pair q;
            q.i = i, q.j = int(c.index[at]), q.r = 0;
            for (int k = 0; k < 3; ++k) {
                q.u[k] = c.positions[3 * q.j + k] - c.positions[3 * i + k] + (c.shifts ? c.shifts[3 * at + k] : 0.0);
                q.r += q.u[k] * q.u[k];
            }
            if (q.r >= within) continue;  // beyond, f is below the smallest number
            pairs.list.push_back(q);
        }
        pairs.begin.push_back(int(pairs.list.size()));
    }
    pairs.p.resize(3 * pairs.list.size());
    pairs.d.resize(ND * pairs.list.size());
    groups.each(int(pairs.list.size()), [&](int from, int to, Arena&) {
        for (int k = from; k < to; ++k) {
            Pair& q = pairs.list[k];
            const double r2 = q.r;
            q.r = std::sqrt(r2);
            q.f = std::exp(r2 / (r2 - square));
            q.slope_of_log_f = -2 * q.r * square / ((r2 - square) * (r2 - square));
            for (double& u : q.u) u /= q.r;
            const int b = pairs.begin[q.i], near = pairs.size(q.i), here = k - b;
            const double x = q.u[0], y = q.u[1], z = q.u[2];
            for (int a = 0; a < 3; ++a) pairs.p[3 * b + a * near + here] = real(q.u[a]);
            const double d[ND] = {R3 * x * y, R3 * x * z, R3 * y * z, 1.5 * z * z - 0.5, 0.5 * R3 * (x * x - y * y)};
            for (int a = 0; a < ND; ++a) pairs.d[ND * b + a * near + here] = real(d[a]);
        }
    });
    return pairs;
}

// rho_v = f [e] C(n, v) e^(n-v) (1-e)^v with e = exp(-alpha r) and n = RADIAL - 1, and d rho_v / dr; ([e] is optional)
inline void radial(const Numbers& c, double alpha, const Pair& q, real* rho, double* slope) {
    const double e = std::exp(-alpha * q.r), away = -std::expm1(-alpha * q.r);
    double near[RADIAL], far[RADIAL];
    near[0] = far[0] = 1;
    for (int v = 1; v < RADIAL; ++v) near[v] = near[v - 1] * e, far[v] = far[v - 1] * away;
    const double weight = c.exp_weighting ? q.f * e : q.f;
    const double common = q.slope_of_log_f - (c.exp_weighting ? alpha : 0.0);
    for (int v = 0; v < RADIAL; ++v) {
        const double value = c.binomial[v] * near[RADIAL - 1 - v] * far[v] * weight;
        rho[v] = real(value);
        slope[v] = value * (common - alpha * (RADIAL - 1 - v) + v * alpha * e / away);
    }
    for (int v = RADIAL; v < K; ++v) rho[v] = 0;
}

// derivatives by r and u -> by the position of j, and the negative of that by i
inline std::array<double, 3> by_position(const Pair& q, double dr, const double* du) {
    const double along = q.u[0] * du[0] + q.u[1] * du[1] + q.u[2] * du[2];
    std::array<double, 3> g;
    for (int k = 0; k < 3; ++k) g[k] = (du[k] - along * q.u[k]) / q.r + dr * q.u[k];
    return g;
}

// u's derivative from those of the p and d functions
inline void angular_back(const double* u, const double* dp, const double* dd, double* du) {
    const double x = u[0], y = u[1], z = u[2];
    du[0] = dp[0] + R3 * (y * dd[0] + z * dd[1] + x * dd[4]);
    du[1] = dp[1] + R3 * (x * dd[0] + z * dd[2] - y * dd[4]);
    du[2] = dp[2] + R3 * (x * dd[1] + y * dd[2]) + 3 * z * dd[3];
}

// -- energies of pairs -----------------------------------------------------------------------------------------------

// screened nuclear repulsion: (power, divisor, 4 weights that add up to 1, 4 exponents)
inline double repulsion(const Numbers& c, const double* parameters, const Pairs& pairs, const Groups& groups,
                        double* dr) {
    std::vector<double> scaled(c.n), energies(pairs.list.size());
    for (int i = 0; i < c.n; ++i) scaled[i] = std::pow(c.z[i], parameters[0]) * parameters[1];
    groups.each(int(pairs.list.size()), [&](int from, int to, Arena&) {
        for (int k = from; k < to; ++k) {
            const Pair& q = pairs.list[k];
            const double rate = scaled[q.i] + scaled[q.j];
            double screening = 0, slope = 0;
            for (int t = 0; t < 4; ++t) {
                const double term = parameters[2 + t] * std::exp(-parameters[6 + t] * rate * q.r);
                screening += term;
                slope -= parameters[6 + t] * rate * term;
            }
            const double bare = 0.5 * COULOMB * c.z[q.i] * c.z[q.j] / q.r * q.f;
            energies[k] = bare * screening;
            dr[k] += bare * (slope + screening * (q.slope_of_log_f - 1 / q.r));
        }
    });
    double energy = 0;
    for (double e : energies) energy += e;
    return energy;
}

// from 1 to 0 between on and off, and its slope
inline std::array<double, 2> switch_off(double r, double on, double off) {
    const double t = (r - on) / (off - on), low = 1e-3, place = std::fmin(std::fmax(t, low), 1 - low);
    const double s = 1 / (1 + std::exp(1 / (1 - place) - 1 / place));
    const bool moves = t > low && t < 1 - low;
    return {s, moves ? s * (1 - s) * (-1 / (t * t) - 1 / ((1 - t) * (1 - t))) / (off - on) : 0.0};
}

// Coulomb energy of two unit charges, damped at short range and shifted at a cutoff, and its derivative by position j
struct Coulomb {
    double energy, slope[3];
};

// of all long-range pairs, zero beyond the cutoff
inline std::vector<Coulomb> coulomb(const Numbers& c, const Groups& groups) {
    std::vector<Coulomb> found(c.electrostatics ? c.n_long : 0);
    const double limit = c.long_cutoff, root = std::sqrt(limit * limit + 1);
    groups.each(int(found.size()), [&](int from, int to, Arena&) {
        for (int k = from; k < to; ++k) {
            const int64_t i = c.first[k], j = c.second[k];
            double d[3], r2 = 0;
            for (int a = 0; a < 3; ++a) {
                d[a] = c.positions[3 * j + a] - c.positions[3 * i + a];
                if (c.long_shifts) d[a] += c.long_shifts[3 * k + a];
                r2 += d[a] * d[a];
            }
            const double r = std::sqrt(r2);
            if (limit > 0 && r >= limit) continue;
            const auto [s, rise] = switch_off(r, 0.25 * c.cutoff, 0.75 * c.cutoff);
            double far = 1 / r, near = 1 / std::sqrt(r2 + 1);
            double far_slope = -far * far, near_slope = -r * near * near * near;
            if (limit > 0) {
                far += r / (limit * limit) - 2 / limit;
                far_slope += 1 / (limit * limit);
                near += (r * limit - 2 * limit * limit - 1) / (root * root * root);
                near_slope += limit / (root * root * root);
            }
            found[k].energy = COULOMB * (s * near + (1 - s) * far);
            const double slope = COULOMB * (rise * (near - far) + s * near_slope + (1 - s) * far_slope);
            for (int a = 0; a < 3; ++a) found[k].slope[a] = slope * d[a] / r;
        }
    });
    return found;
}

// energy of charges; adds to dq and the gradient
inline double electrostatics(const Numbers& c, const std::vector<Coulomb>& pairs, const double* q, double* dq,
                             double* gradient) {
    double energy = 0;
    for (size_t k = 0; k < pairs.size(); ++k) {
        const int64_t i = c.first[k], j = c.second[k];
        const Coulomb& one = pairs[k];
        energy += q[i] * q[j] * one.energy;
        dq[i] += q[j] * one.energy;
        dq[j] += q[i] * one.energy;
        for (int a = 0; a < 3; ++a) {
            gradient[3 * j + a] += q[i] * q[j] * one.slope[a];
            gradient[3 * i + a] -= q[i] * q[j] * one.slope[a];
        }
    }
    return energy;
}
