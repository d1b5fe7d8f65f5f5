// D4 dispersion with the network's charges, and its derivatives by charges and positions; dispersion.py line by line.
#pragma once
#include "geometry.hpp"

constexpr int REFERENCES = 7, GAUSSIANS = 3;

// Tables of the elements present, numbered by `kind`; lengths in bohr.
struct D4 {
    int64_t kinds;
    const int64_t* kind;                                    // (n)
    const double* c6;                                       // (kinds, kinds, 7, 7) hartree bohr^6
    const double *bond, *polarity, *size_squared, *radius;  // (kinds, kinds)
    const double *count_weight, *count_mask, *count;        // (kinds, 7, 3)
    const double *unmatched, *reference_charge;             // (kinds, 7)
    const double *effective_charge, *hardness;              // (kinds)
    double s6, s8, bohr, hartree, count_steepness, charge_steepness, switch_width;
};

namespace {

typedef std::array<double, REFERENCES> Weights;

struct LongPair {
    int64_t i, j, of_kinds;
    double d[3], r, count_slope;
};

// 1 / (r^n + r0^n) and its slope, both zero at a limit
template <int N>
inline std::array<double, 2> damped_power(double r, double r0, double limit) {
    const auto power = [](double x) { return N == 6 ? x * x * x * x * x * x : x * x * x * x * x * x * x * x; };
    const double value = 1 / (power(r) + power(r0)), slope = -N * power(r) / r * value * value;
    if (limit == 0) return {value, slope};
    const double there = 1 / (power(limit) + power(r0)), fall = N * power(limit) / limit * there * there;
    return {value - there + fall * (r - limit), slope + fall};
}

class Dispersion {
    const Numbers& c;
    const D4& d4;
    std::vector<LongPair> pairs;
    std::vector<double> coordination;
    std::vector<Weights> zeta, by_coordination, by_charge;

    void find() {
        const double limit = c.long_cutoff / d4.bohr;
        for (int64_t k = 0; k < c.n_long; ++k) {
            LongPair q;
            q.i = c.first[k], q.j = c.second[k];
            q.of_kinds = d4.kind[q.i] * d4.kinds + d4.kind[q.j];
            double r2 = 0;
            for (int a = 0; a < 3; ++a) {
                q.d[a] = c.positions[3 * q.j + a] - c.positions[3 * q.i + a];
                if (c.long_shifts) q.d[a] += c.long_shifts[3 * k + a];
                r2 += q.d[a] * q.d[a];
            }
            const double r = std::sqrt(r2);
            if (limit > 0 && r >= c.long_cutoff) continue;
            for (double& d : q.d) d /= r;
            q.r = r / d4.bohr;
            count(q, limit);
            pairs.push_back(q);
        }
    }

    void count(LongPair& q, double limit) {
        const double bond = d4.bond[q.of_kinds], x = d4.count_steepness * (q.r / bond - 1);
        q.count_slope = 0;
        if (x > 6.5) return;  // erfc is below 1e-19
        double value = 0.5 * d4.polarity[q.of_kinds] * std::erfc(x);
        double slope = -d4.polarity[q.of_kinds] * d4.count_steepness / bond * std::exp(-x * x) / std::sqrt(M_PI);
        if (limit > 0) {
            const auto [s, rise] = switch_off(q.r, limit - d4.switch_width, limit);
            slope = slope * s + value * rise;
            value *= s;
        }
        coordination[q.i] += value;
        coordination[q.j] += value;
        q.count_slope = slope;
    }

    // how much of each reference system atom i resembles, scaled by its charge; with derivatives
    void resemble(int64_t i, double charge) {
        const int64_t kind = d4.kind[i];
        Weights gauss{}, slope{};
        double norm = 0, norm_slope = 0;
        for (int a = 0; a < REFERENCES; ++a) {
            for (int g = 0; g < GAUSSIANS; ++g) {
                const int64_t at = (kind * REFERENCES + a) * GAUSSIANS + g;
                const double off = coordination[i] - d4.count[at], weight = d4.count_weight[at];
                const double value = d4.count_mask[at] * std::exp(weight * off * off);
                gauss[a] += value;
                slope[a] += 2 * weight * off * value;
            }
            norm += gauss[a];
            norm_slope += slope[a];
        }
        for (int a = 0; a < REFERENCES; ++a) {
            double weight = d4.unmatched[kind * REFERENCES + a], weight_slope = 0;
            if (norm > 1e-8) {
                weight = gauss[a] / norm;
                weight_slope = (slope[a] - weight * norm_slope) / norm;
            }
            const auto [scale, scale_slope] = scaling(kind, a, charge);
            zeta[i][a] = weight * scale;
            by_coordination[i][a] = weight_slope * scale;
            by_charge[i][a] = weight * scale_slope;
        }
    }

    std::array<double, 2> scaling(int64_t kind, int a, double charge) const {
        const double actual = d4.effective_charge[kind] + charge, steep = d4.charge_steepness;
        if (!(actual > 1e-8)) return {std::exp(steep), 0.0};
        const double ratio = d4.reference_charge[kind * REFERENCES + a] / actual, hard = 2 * d4.hardness[kind];
        const double inner = std::exp(hard * (1 - ratio)), value = std::exp(steep * (1 - inner));
        return {value, -value * steep * inner * hard * ratio / actual};
    }

public:
    Dispersion(const Numbers& c, const D4& d4)
        : c(c), d4(d4), coordination(c.n), zeta(c.n), by_coordination(c.n), by_charge(c.n) {}

    // adds to dq and the gradient
    double energy(const double* charges, double* dq, double* gradient) {
        find();
        for (int64_t i = 0; i < c.n; ++i) resemble(i, charges[i]);
        const double limit = c.long_cutoff / d4.bohr;
        // C6_ij = zeta_i c6 zeta_j: half of it once per atom and kind
        std::vector<Weights> half(c.n * d4.kinds), seen(c.n * d4.kinds);
        for (int64_t i = 0; i < c.n; ++i)
            for (int64_t k = 0; k < d4.kinds; ++k) half[i * d4.kinds + k] = contract(d4.kind[i], k, zeta[i]);
        double total = 0;
        for (const LongPair& q : pairs) {
            const double r0 = d4.radius[q.of_kinds], s8 = d4.s8 * d4.size_squared[q.of_kinds];
            const auto sixth = damped_power<6>(q.r, r0, limit), eighth = damped_power<8>(q.r, r0, limit);
            const double shape = d4.s6 * sixth[0] + s8 * eighth[0], slope = d4.s6 * sixth[1] + s8 * eighth[1];
            const int64_t ki = d4.kind[q.i], kj = d4.kind[q.j];
            double c6 = 0;
            for (int a = 0; a < REFERENCES; ++a) {
                c6 += half[q.i * d4.kinds + kj][a] * zeta[q.j][a];
                seen[q.i * d4.kinds + kj][a] += shape * zeta[q.j][a];
                seen[q.j * d4.kinds + ki][a] += shape * zeta[q.i][a];
            }
            total += c6 * shape;
            pull(q, -d4.hartree * c6 * slope, gradient);
        }
        std::vector<double> dcount(c.n);
        for (int64_t i = 0; i < c.n; ++i)
            for (int64_t k = 0; k < d4.kinds; ++k) {
                const Weights dzeta = contract(k, d4.kind[i], seen[i * d4.kinds + k]);
                for (int a = 0; a < REFERENCES; ++a) {
                    dcount[i] -= d4.hartree * dzeta[a] * by_coordination[i][a];
                    dq[i] -= d4.hartree * dzeta[a] * by_charge[i][a];
                }
            }
        for (const LongPair& q : pairs)
            if (q.count_slope != 0) pull(q, (dcount[q.i] + dcount[q.j]) * q.count_slope, gradient);
        return -d4.hartree * total;
    }

private:
    Weights contract(int64_t from, int64_t to, const Weights& x) const {
        const double* table = d4.c6 + (from * d4.kinds + to) * REFERENCES * REFERENCES;
        Weights y{};
        for (int a = 0; a < REFERENCES; ++a)
            for (int b = 0; b < REFERENCES; ++b) y[b] += x[a] * table[a * REFERENCES + b];
        return y;
    }

    void pull(const LongPair& q, double slope, double* gradient) const {
        for (int a = 0; a < 3; ++a) {
            gradient[3 * q.j + a] += slope / d4.bohr * q.d[a];
            gradient[3 * q.i + a] -= slope / d4.bohr * q.d[a];
        }
    }
};

}  // namespace
