// Attention between all atoms (FAVOR+, layers.LinearAttention), forward and back, in groups of rows.
#pragma once
#include "groups.hpp"
#include "vectors.hpp"

namespace {

class LinearAttention {
    const Groups& groups;
    const int n;
    real *phi_q, *phi_k, *summed, *sum_k, *norm;
    int k_row = 0, k_column = 0;
    std::vector<int> q_column;

    // of entries equal up to rounding the first one, as `layers.first_maximum`
    void largest_of_keys() {
        real most = phi_k[0];
        for (int i = 1; i < n * M; ++i) most = phi_k[i] > most ? phi_k[i] : most;
        const real eps = sizeof(real) == 4 ? real(1.1920929e-07) : real(2.220446049250313e-16);
        const real near = most - 8 * eps * std::fabs(most);
        int at = 0;
        while (phi_k[at] < near) ++at;
        k_row = at / M, k_column = at % M;
    }

    // exponent and offset of one row -> its features; for queries the offset is the row's own maximum
    void features(const real* source, real* row, real key_max, int* best) {
        real square = 0, most = key_max;
        for (int f = 0; f < F; ++f) square += source[f] * source[f];
        if (best) {
            *best = 0;
            for (int a = 1; a < M; ++a)
                if (row[a] > row[*best]) *best = a;
            most = row[*best];
        }
        const real offset = square * real(0.5 / std::sqrt(double(F))) + most, root = real(1 / std::sqrt(double(M)));
        for (int a = 0; a < M; a += L) store(row + a, (exponential(load(row + a) - offset) + real(1e-4)) * root);
    }

    static void transpose(const real* x, real* y) {
        for (int a = 0; a < M; ++a)
            for (int f = 0; f < F; ++f) y[f * M + a] = x[a * F + f];
    }

public:
    real *q, *k, *v, *out;

    LinearAttention(const Groups& groups, int n, Arena& arena)
        : groups(groups), n(n), phi_q(arena.take(n * M)), phi_k(arena.take(n * M)), summed(arena.take(M * F)),
          sum_k(arena.take(M)), norm(arena.take(n)), q_column(n), q(arena.take(n * F)), k(arena.take(n * F)),
          v(arena.take(n * F)), out(arena.take(n * F)) {}

    void forward(const real* omega) {
        const real scale = real(std::pow(double(F), -0.25));
        const real* sources[2] = {q, k};
        real* phis[2] = {phi_q, phi_k};
        groups.each(n, [&](int from, int to, Arena& scratch) {
            const Arena::Mark mark = scratch.mark();
            real* scaled = scratch.take(size_t(to - from) * F);
            for (int which = 0; which < 2; ++which) {
                for (int i = 0; i < (to - from) * F; ++i) scaled[i] = sources[which][from * F + i] * scale;
                product<M>(to - from, F, scaled, F, 1, omega, M, nullptr, false, phis[which] + from * M, M);
            }
            scratch.back(mark);
        });
        largest_of_keys();
        const real key_max = phi_k[k_row * M + k_column];
        groups.each(n, [&](int from, int to, Arena&) {
            for (int i = from; i < to; ++i) {
                features(q + i * F, phi_q + i * M, key_max, &q_column[i]);
                features(k + i * F, phi_k + i * M, key_max, nullptr);
            }
        });
        groups.each(M, [&](int from, int to, Arena&) {
            product<F>(to - from, n, phi_k + from, 1, M, v, F, nullptr, false, summed + from * F, F);
            for (int a = from; a < to; ++a) sum_k[a] = 0;
            for (int i = 0; i < n; ++i)
                for (int a = from; a < to; ++a) sum_k[a] += phi_k[i * M + a];
        });
        groups.each(n, [&](int from, int to, Arena&) {
            product<F>(to - from, M, phi_q + from * M, M, 1, summed, F, nullptr, false, out + from * F, F);
            for (int i = from; i < to; ++i) {
                norm[i] = real(1e-8);
                for (int a = 0; a < M; ++a) norm[i] += phi_q[i * M + a] * sum_k[a];
                for (int f = 0; f < F; ++f) out[i * F + f] /= norm[i];
            }
        });
    }

    // derivatives by q, k and v
    void backward(const real* omega_back, const real* dout, real* dq, real* dk, real* dv, Arena& arena) {
        const real scale = real(std::pow(double(F), -0.25)), root = real(1 / std::sqrt(double(M)));
        const real inverse = real(1 / std::sqrt(double(F)));
        real *dnum = arena.take(n * F), *dphi_q = arena.take(n * M), *dphi_k = arena.take(n * M);
        real *dsummed = arena.take(M * F), *dsum_k = arena.take(M), *transposed = arena.take(F * M);
        real* dnorm = arena.take(n);
        std::vector<real> of_half[2] = {std::vector<real>(n), std::vector<real>(n)};
        real* both[2] = {dphi_q, dphi_k};
        const real* phis[2] = {phi_q, phi_k};
        // phi = (e + 1e-4) / sqrt(M), and e is its own derivative
        const auto through_exponential = [&](int which, int i) {
            real row = 0;
            for (int a = 0; a < M; ++a) row += both[which][i * M + a] *= phis[which][i * M + a] - real(1e-4) * root;
            of_half[which][i] = -row;
        };
        transpose(summed, transposed);
        groups.each(n, [&](int from, int to, Arena&) {
            for (int i = from; i < to; ++i) {
                dnorm[i] = 0;
                for (int f = 0; f < F; ++f) {
                    dnum[i * F + f] = dout[i * F + f] / norm[i];
                    dnorm[i] -= dnum[i * F + f] * out[i * F + f];
                }
            }
            product<M>(to - from, F, dnum + from * F, F, 1, transposed, M, nullptr, false, dphi_q + from * M, M);
            for (int i = from; i < to; ++i) {
                for (int a = 0; a < M; ++a) dphi_q[i * M + a] += dnorm[i] * sum_k[a];
                through_exponential(0, i);
                dphi_q[i * M + q_column[i]] += of_half[0][i];
            }
        });
        groups.each(M, [&](int from, int to, Arena&) {
            product<F>(to - from, n, phi_q + from, 1, M, dnum, F, nullptr, false, dsummed + from * F, F);
            for (int a = from; a < to; ++a) dsum_k[a] = 0;
            for (int i = 0; i < n; ++i)
                for (int a = from; a < to; ++a) dsum_k[a] += dnorm[i] * phi_q[i * M + a];
        });
        transpose(dsummed, transposed);
        groups.each(n, [&](int from, int to, Arena&) {
            product<M>(to - from, F, v + from * F, F, 1, transposed, M, nullptr, false, dphi_k + from * M, M);
            product<F>(to - from, M, phi_k + from * M, M, 1, dsummed, F, nullptr, false, dv + from * F, F);
            for (int i = from; i < to; ++i) {
                for (int a = 0; a < M; ++a) dphi_k[i * M + a] += dsum_k[a];
                through_exponential(1, i);
            }
        });
        // the offset of the keys is one number for all atoms
        for (int i = 0; i < n; ++i) dphi_k[k_row * M + k_column] += of_half[1][i];
        const real* sources[2] = {q, k};
        real* targets[2] = {dq, dk};
        groups.each(n, [&](int from, int to, Arena&) {
            for (int which = 0; which < 2; ++which) {
                real* target = targets[which] + from * F;
                product<F>(to - from, M, both[which] + from * M, M, 1, omega_back, F, nullptr, false, target, F);
                for (int i = from; i < to; ++i)
                    for (int f = 0; f < F; ++f) {
                        real& d = targets[which][i * F + f];
                        d = scale * d + of_half[which][i] * inverse * sources[which][i * F + f];
                    }
            }
        });
    }
};

}  // namespace
