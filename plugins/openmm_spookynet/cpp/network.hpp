// The network of one member: its weights, the descriptor of every atom, and the descriptor's derivatives by hand.
#pragma once
#include "dispersion.hpp"

namespace {

// A member's weights in the order in which `Reader` asks for them, and what its atoms decide without positions.
struct Member {
    const real* const* arrays;
    const int64_t* blocks;            // of residual networks: x, s, p, d, q, k, v, pre, local, post, output, electron
    const double* numbers;            // alpha, then the parameters of the repulsion (10)
    const real *x, *center, *spd, *nonlocal;  // messages of the first module
    const double *output, *bias;      // (2 or 3, F), (n, 2 or 3)
    const real *value[2], *key[2];    // of the embeddings of charge and spin after modules, (F); null where it is zero
    const D4* d4;                     // or null
};

struct Module {
    Network pre, heads[7], local, post, output;
    const real *omega, *omega_back, *radial, *radial_back, *project[2], *project_back[2];
};

struct Reader {
    const real* const* at;
    const real* next() { return *at++; }
    Linear linear() {
        Linear l;
        l.weight = next(), l.transposed = next(), l.bias = next();
        return l;
    }
    Activation activation() {
        Activation a;
        a.alpha = next(), a.beta = next();
        return a;
    }
    Network network(int64_t blocks, bool stack) {
        Network net;
        for (int64_t b = 0; b < blocks; ++b) {
            Block block;
            block.first = activation(), block.linear1 = linear();
            block.second = activation(), block.linear2 = linear();
            net.blocks.push_back(block);
        }
        net.stack = stack;
        if (!stack) net.activation = activation(), net.linear = linear();
        return net;
    }
    Module module(const int64_t* blocks, bool attention, bool first) {
        Module m;
        if (!first) {
            m.pre = network(blocks[7], true);
            for (int h = 0; h < (attention ? 7 : 4); ++h) m.heads[h] = network(blocks[h], false);
            if (attention) m.omega = next(), m.omega_back = next();
        }
        m.radial = next(), m.radial_back = next();
        for (int k = 0; k < 2; ++k) m.project[k] = next(), m.project_back[k] = next();
        m.local = network(blocks[8], false);
        m.post = network(blocks[9], true);
        m.output = network(blocks[10], false);
        return m;
    }
};

// What one module keeps from its way forward.
struct Tape {
    real *pre, *heads[7], *local, *post, *output;                   // slopes
    const real *x, *center, *spd, *nonlocal;                        // messages
    real *q, *k, *v, *phi_q, *phi_k, *summed, *sum_k, *norm, *out;  // attention
    int k_row, k_column;
    std::vector<int> q_column;
    real *P, *D, *sides[2];                                         // moments and their projections
};

class Evaluation {
    const Numbers& c;
    const Pairs& pairs;
    const Member& member;
    Arena& arena;
    const int n;
    std::vector<Module> modules;
    Network embedding[2];
    struct {
        real *share, *slopes;
    } embedded[2];
    std::vector<Tape> tapes;
    real *const rho, *const d_rho, *const d_p, *const d_d;
    std::vector<double> slopes;

    real* rows(size_t width) { return arena.zeros(n * width); }

    void attend(const Module& m, Tape& t) {
        const real scale = real(std::pow(double(F), -0.25)), half = real(0.5 / std::sqrt(double(F)));
        t.phi_q = rows(M), t.phi_k = rows(M), t.summed = arena.zeros(M * F), t.sum_k = arena.zeros(M);
        t.norm = arena.zeros(n), t.out = rows(F);
        t.q_column.assign(n, 0);
        real* scaled = rows(F);
        const real* sources[2] = {t.q, t.k};
        real* phis[2] = {t.phi_q, t.phi_k};
        for (int which = 0; which < 2; ++which) {
            for (int i = 0; i < n * F; ++i) scaled[i] = sources[which][i] * scale;
            product<M>(n, F, scaled, F, 1, m.omega, M, nullptr, false, phis[which], M);
        }
        largest_of_keys(t);
        const real key_max = t.phi_k[t.k_row * M + t.k_column];
        for (int which = 0; which < 2; ++which)
            for (int i = 0; i < n; ++i) {
                real *row = phis[which] + i * M, square = 0, most = key_max;
                for (int f = 0; f < F; ++f) square += sources[which][i * F + f] * sources[which][i * F + f];
                if (which == 0) {
                    int& best = t.q_column[i];
                    for (int a = 1; a < M; ++a)
                        if (row[a] > row[best]) best = a;
                    most = row[best];
                }
                const real offset = square * half + most, root = real(1 / std::sqrt(double(M)));
                for (int a = 0; a < M; a += L) store(row + a, (exponential(load(row + a) - offset) + real(1e-4)) * root);
            }
        product<F>(M, n, t.phi_k, 1, M, t.v, F, nullptr, false, t.summed, F);
        for (int i = 0; i < n; ++i)
            for (int a = 0; a < M; ++a) t.sum_k[a] += t.phi_k[i * M + a];
        product<F>(n, M, t.phi_q, M, 1, t.summed, F, nullptr, false, t.out, F);
        for (int i = 0; i < n; ++i) {
            real norm = real(1e-8);
            for (int a = 0; a < M; ++a) norm += t.phi_q[i * M + a] * t.sum_k[a];
            t.norm[i] = norm;
            for (int f = 0; f < F; ++f) t.out[i * F + f] /= norm;
        }
    }

    // of entries equal up to rounding the first one, as `layers.first_maximum`
    void largest_of_keys(Tape& t) {
        real most = t.phi_k[0];
        for (int i = 1; i < n * M; ++i) most = t.phi_k[i] > most ? t.phi_k[i] : most;
        const real eps = sizeof(real) == 4 ? real(1.1920929e-07) : real(2.220446049250313e-16);
        const real near = most - 8 * eps * std::fabs(most);
        int at = 0;
        while (t.phi_k[at] < near) ++at;
        t.k_row = at / M, t.k_column = at % M;
    }

    void attend_back(const Module& m, Tape& t, const real* dout, real* dq, real* dk, real* dv) {
        const real scale = real(std::pow(double(F), -0.25)), root = real(1 / std::sqrt(double(M)));
        real *dnum = rows(F), *dphi_q = rows(M), *dphi_k = rows(M), *dsummed = arena.zeros(M * F);
        real *dsum_k = arena.zeros(M), *transposed = arena.zeros(F * M), *dnorm = arena.zeros(n);
        for (int i = 0; i < n; ++i)
            for (int f = 0; f < F; ++f) {
                dnum[i * F + f] = dout[i * F + f] / t.norm[i];
                dnorm[i] -= dnum[i * F + f] * t.out[i * F + f];
            }
        for (int a = 0; a < M; ++a)
            for (int f = 0; f < F; ++f) transposed[f * M + a] = t.summed[a * F + f];
        product<M>(n, F, dnum, F, 1, transposed, M, nullptr, false, dphi_q, M);
        product<F>(M, n, t.phi_q, 1, M, dnum, F, nullptr, false, dsummed, F);
        for (int i = 0; i < n; ++i)
            for (int a = 0; a < M; ++a) {
                dphi_q[i * M + a] += dnorm[i] * t.sum_k[a];
                dsum_k[a] += dnorm[i] * t.phi_q[i * M + a];
            }
        for (int a = 0; a < M; ++a)
            for (int f = 0; f < F; ++f) transposed[f * M + a] = dsummed[a * F + f];
        product<M>(n, F, t.v, F, 1, transposed, M, nullptr, false, dphi_k, M);
        product<F>(n, M, t.phi_k, M, 1, dsummed, F, nullptr, true, dv, F);
        for (int i = 0; i < n; ++i)
            for (int a = 0; a < M; ++a) dphi_k[i * M + a] += dsum_k[a];
        real total = 0;
        std::vector<real> of_half(n);
        real* both[2] = {dphi_q, dphi_k};
        const real* phis[2] = {t.phi_q, t.phi_k};
        const real* sources[2] = {t.q, t.k};
        real* targets[2] = {dq, dk};
        for (int which = 0; which < 2; ++which) {
            total = 0;
            for (int i = 0; i < n; ++i) {
                real row = 0;
                for (int a = 0; a < M; ++a) {
                    // phi = (e + 1e-4) / sqrt(M), and e is its own derivative
                    real& x = both[which][i * M + a];
                    x *= phis[which][i * M + a] - real(1e-4) * root;
                    row += x;
                }
                of_half[i] = -row;
                total += row;
            }
            if (which == 0)
                for (int i = 0; i < n; ++i) both[0][i * M + t.q_column[i]] += of_half[i];
            else
                both[1][t.k_row * M + t.k_column] -= total;
            real* back = rows(F);
            product<F>(n, M, both[which], M, 1, m.omega_back, F, nullptr, false, back, F);
            const real inverse = real(1 / std::sqrt(double(F)));
            for (int i = 0; i < n; ++i)
                for (int f = 0; f < F; ++f)
                    targets[which][i * F + f] +=
                        scale * back[i * F + f] + of_half[i] * inverse * sources[which][i * F + f];
        }
    }

    // s, p and d sums over neighbours, and the invariant products of the latter two
    void local_features(const Module& m, Tape& t, real* total) {
        t.P = rows(3 * F), t.D = rows(ND * F);
        std::memcpy(total, t.center, size_t(n) * F * sizeof(real));
        for (int i = 0; i < n; ++i) {
            const int b = pairs.begin[i], near = pairs.size(i);
            const Arena::Mark mark = arena.mark();
            real* g = arena.take(size_t(near) * 3 * F);
            received(m, t, i, g);
            for (int k = 0; k < near; ++k)
                for (int f = 0; f < F; f += L) store(total + i * F + f, load(total + i * F + f) + load(g + k * 3 * F + f));
            product<F>(3, near, &pairs.p[3 * b], near, 1, g + F, 3 * F, nullptr, false, t.P + 3 * i * F, F);
            product<F>(ND, near, &pairs.d[ND * b], near, 1, g + 2 * F, 3 * F, nullptr, false, t.D + ND * i * F, F);
            arena.back(mark);
        }
        const real* moments[2] = {t.P, t.D};
        const int terms[2] = {3, ND};
        for (int w = 0; w < 2; ++w) {
            t.sides[w] = rows(2 * F * terms[w]);
            product<2 * F>(n * terms[w], F, moments[w], F, 1, m.project[w], 2 * F, nullptr, false, t.sides[w], 2 * F);
            for (int row = 0; row < n * terms[w]; ++row)
                for (int f = 0; f < F; f += L) {
                    real* here = total + row / terms[w] * F + f;
                    const real* side = t.sides[w] + row * 2 * F + f;
                    store(here, load(here) + load(side) * load(side + F));
                }
        }
    }

    // (rho W) times what the neighbours of atom i send, (n_i, 3F); `filters` gets rho W alone
    void received(const Module& m, const Tape& t, int i, real* g, real* filters = nullptr) {
        const int b = pairs.begin[i], near = pairs.size(i);
        product<3 * F>(near, K, &rho[b * K], K, 1, m.radial, 3 * F, nullptr, false, g, 3 * F);
        if (filters) std::memcpy(filters, g, size_t(near) * 3 * F * sizeof(real));
        for (int k = 0; k < near; ++k) {
            const real* sent = t.spd + size_t(pairs.list[b + k].j) * 3 * F;
            for (int f = 0; f < 3 * F; f += L) store(g + k * 3 * F + f, load(g + k * 3 * F + f) * load(sent + f));
        }
    }

    // adds to d_rho, d_p, d_d and dspd (which is null where positions do not enter the messages)
    void local_features_back(const Module& m, Tape& t, const real* dtotal, real* dspd) {
        real* dmoments[2] = {rows(3 * F), rows(ND * F)};
        const int terms[2] = {3, ND};
        for (int w = 0; w < 2; ++w) {
            real* crossed = rows(2 * F * terms[w]);
            for (int row = 0; row < n * terms[w]; ++row)
                for (int f = 0; f < F; f += L) {
                    const V d = load(dtotal + row / terms[w] * F + f);
                    const real* side = t.sides[w] + row * 2 * F + f;
                    store(crossed + row * 2 * F + f, d * load(side + F));
                    store(crossed + row * 2 * F + F + f, d * load(side));
                }
            product<F>(n * terms[w], 2 * F, crossed, 2 * F, 1, m.project_back[w], F, nullptr, false, dmoments[w], F);
        }
        for (int i = 0; i < n; ++i) {
            const int b = pairs.begin[i], near = pairs.size(i);
            const Arena::Mark mark = arena.mark();
            real *g = arena.take(size_t(near) * 3 * F), *filters = arena.take(size_t(near) * 3 * F);
            real* d = arena.take(size_t(near) * 3 * F);
            received(m, t, i, g, filters);
            const real *dP = dmoments[0] + 3 * i * F, *dD = dmoments[1] + ND * i * F;
            for (int k = 0; k < near; ++k) std::memcpy(d + k * 3 * F, dtotal + i * F, F * sizeof(real));
            product<F>(near, 3, &pairs.p[3 * b], 1, near, dP, F, nullptr, false, d + F, 3 * F);
            product<F>(near, ND, &pairs.d[ND * b], 1, near, dD, F, nullptr, false, d + 2 * F, 3 * F);
            for (int k = 0; k < near; ++k) {
                for (int a = 0; a < 3; ++a) d_p[3 * b + a * near + k] += dot(g + k * 3 * F + F, dP + a * F);
                for (int a = 0; a < ND; ++a) d_d[ND * b + a * near + k] += dot(g + k * 3 * F + 2 * F, dD + a * F);
                const size_t j = pairs.list[b + k].j;
                const real* sent = t.spd + j * 3 * F;
                for (int f = 0; f < 3 * F; f += L) {
                    const V here = load(d + k * 3 * F + f);
                    if (dspd) store(dspd + j * 3 * F + f, load(dspd + j * 3 * F + f) + here * load(filters + k * 3 * F + f));
                    store(d + k * 3 * F + f, here * load(sent + f));
                }
            }
            product<K>(near, 3 * F, d, 3 * F, 1, m.radial_back, K, nullptr, true, &d_rho[b * K], K);
            arena.back(mark);
        }
    }

    static real dot(const real* a, const real* b) {
        V total{};
        for (int f = 0; f < F; f += L) total += load(a + f) * load(b + f);
        return sum(total);
    }

public:
    Evaluation(const Numbers& c, const Pairs& pairs, const Member& member, Arena& arena)
        : c(c), pairs(pairs), member(member), arena(arena), n(int(c.n)), tapes(c.modules),
          rho(arena.take(pairs.list.size() * K)), d_rho(arena.zeros(pairs.list.size() * K)),
          d_p(arena.zeros(pairs.p.size())), d_d(arena.zeros(pairs.d.size())),
          slopes(pairs.list.size() * RADIAL) {
        Reader reader{member.arrays};
        for (int64_t t = 0; t < c.modules; ++t) modules.push_back(reader.module(member.blocks, c.attention, t == 0));
        for (int w = 0; w < 2 && c.embed_after > 0; ++w) embedding[w] = reader.network(member.blocks[11], false);
        for (size_t k = 0; k < pairs.list.size(); ++k)
            radial(c, member.numbers[0], pairs.list[k], &rho[k * K], &slopes[k * RADIAL]);
    }

    // sum of all modules' contributions, (n, F)
    void descriptor(real* f) {
        const real* x = nullptr;
        for (int64_t t = 0; t < c.modules; ++t) {
            const Module& m = modules[t];
            Tape& tape = tapes[t];
            if (t > 0 && t == c.embed_after) x = embed(x);
            tape.nonlocal = nullptr;
            if (t == 0)
                tape.x = member.x, tape.center = member.center, tape.spd = member.spd, tape.nonlocal = member.nonlocal;
            else
                messages(m, tape, x);
            tape.local = rows(F * m.local.slopes()), tape.post = rows(F * m.post.slopes());
            tape.output = rows(F * m.output.slopes());
            real *total = rows(F), *z = rows(F), *next = rows(F), *y = rows(F);
            local_features(m, tape, total);
            forward(m.local, n, total, z, tape.local, arena);
            for (int i = 0; i < n * F; i += L) {
                V here = load(z + i) + load(tape.x + i);
                if (tape.nonlocal) here += load(tape.nonlocal + i);
                store(z + i, here);
            }
            forward(m.post, n, z, next, tape.post, arena);
            forward(m.output, n, next, y, tape.output, arena);
            for (int i = 0; i < n * F; i += L) store(f + i, load(f + i) + load(y + i));
            x = next;
        }
    }

    void messages(const Module& m, Tape& t, const real* x) {
        real *before = rows(F), *center = rows(F), *spd = rows(3 * F), *one = rows(F);
        t.pre = rows(F * m.pre.slopes());
        forward(m.pre, n, x, before, t.pre, arena);
        t.q = rows(F), t.k = rows(F), t.v = rows(F);
        real* targets[7] = {center, one, one, one, t.q, t.k, t.v};
        for (int h = 0; h < (c.attention ? 7 : 4); ++h) {
            t.heads[h] = rows(F * m.heads[h].slopes());
            forward(m.heads[h], n, before, targets[h], t.heads[h], arena);
            if (h >= 1 && h <= 3)
                for (int i = 0; i < n; ++i)
                    std::memcpy(spd + (3 * i + h - 1) * F, one + i * F, F * sizeof(real));
        }
        t.x = before, t.center = center, t.spd = spd;
        if (c.attention) {
            attend(m, t);
            t.nonlocal = t.out;
        }
    }

    // x + what charge and spin add: a network of their value, dealt out to the atoms by a softmax of x . key
    real* embed(const real* x) {
        real *sum = rows(F), *in = rows(F), *y = rows(F);
        std::memcpy(sum, x, size_t(n) * F * sizeof(real));
        for (int w = 0; w < 2; ++w) {
            if (!member.value[w]) continue;
            real* share = embedded[w].share = arena.zeros(n);
            real most = 0, total = 0;
            for (int i = 0; i < n; ++i) {
                share[i] = dot(x + i * F, member.key[w]);
                most = i == 0 || share[i] > most ? share[i] : most;
            }
            for (int i = 0; i < n; ++i) total += share[i] = std::exp(share[i] - most);
            for (int i = 0; i < n; ++i) {
                share[i] /= total;
                for (int f = 0; f < F; f += L) store(in + i * F + f, share[i] * load(member.value[w] + f));
            }
            embedded[w].slopes = rows(F * embedding[w].slopes());
            forward(embedding[w], n, in, y, embedded[w].slopes, arena);
            for (int i = 0; i < n * F; i += L) store(sum + i, load(sum + i) + load(y + i));
        }
        return sum;
    }

    // derivatives by x from those by x with the embedding, in place
    void embed_back(real* dx) {
        real* more = rows(F);
        for (int w = 0; w < 2; ++w) {
            if (!member.value[w]) continue;
            real *din = rows(F), *dshare = arena.zeros(n), mean = 0;
            backward(embedding[w], n, dx, embedded[w].slopes, din, arena);
            for (int i = 0; i < n; ++i) {
                dshare[i] = dot(din + i * F, member.value[w]);
                mean += embedded[w].share[i] * dshare[i];
            }
            for (int i = 0; i < n; ++i) {
                const real d = embedded[w].share[i] * (dshare[i] - mean);
                for (int f = 0; f < F; f += L)
                    store(more + i * F + f, load(more + i * F + f) + d * load(member.key[w] + f));
            }
        }
        for (int i = 0; i < n * F; i += L) store(dx + i, load(dx + i) + load(more + i));
    }

    // derivatives of everything by the positions, from df
    void back(const real* df, const std::vector<double>& dr_more, double* gradient) {
        real* dx = rows(F);
        for (int64_t t = c.modules; t-- > 0;) {
            const Arena::Mark mark = arena.mark();
            const Module& m = modules[t];
            Tape& tape = tapes[t];
            real *dz = rows(F), *dtotal = rows(F), *dspd = t > 0 ? rows(3 * F) : nullptr;
            backward(m.output, n, df, tape.output, dx, arena);
            backward(m.post, n, dx, tape.post, dz, arena);
            backward(m.local, n, dz, tape.local, dtotal, arena);
            local_features_back(m, tape, dtotal, dspd);
            std::memset(dx, 0, size_t(n) * F * sizeof(real));
            if (t > 0) messages_back(m, tape, dz, dtotal, dspd, dx);
            if (t > 0 && t == c.embed_after) embed_back(dx);
            arena.back(mark);
        }
        for (size_t k = 0; k < pairs.list.size(); ++k) {
            const Pair& q = pairs.list[k];
            double dr = dr_more[k], dp[3], dd[ND], du[3];
            for (int v = 0; v < RADIAL; ++v) dr += double(d_rho[k * K + v]) * slopes[k * RADIAL + v];
            const int b = pairs.begin[q.i], near = pairs.size(q.i), here = int(k) - b;
            for (int a = 0; a < 3; ++a) dp[a] = d_p[3 * b + a * near + here];
            for (int a = 0; a < ND; ++a) dd[a] = d_d[ND * b + a * near + here];
            angular_back(q.u, dp, dd, du);
            to_positions(q, dr, du, gradient);
        }
    }

    void messages_back(const Module& m, Tape& t, const real* dz, const real* dcenter, const real* dspd, real* dx) {
        real *dbefore = rows(F), *one = rows(F), *dq = rows(F), *dk = rows(F), *dv = rows(F);
        std::memcpy(dbefore, dz, size_t(n) * F * sizeof(real));
        if (c.attention) attend_back(m, t, dz, dq, dk, dv);
        const real* sources[7] = {dcenter, one, one, one, dq, dk, dv};
        for (int h = 0; h < (c.attention ? 7 : 4); ++h) {
            if (h >= 1 && h <= 3)
                for (int i = 0; i < n; ++i)
                    std::memcpy(one + i * F, dspd + (3 * i + h - 1) * F, F * sizeof(real));
            backward(m.heads[h], n, sources[h], t.heads[h], dbefore, arena);
        }
        backward(m.pre, n, dbefore, t.pre, dx, arena);
    }
};

}  // namespace
