// The network of one member: its weights, the descriptor of every atom, and the descriptor's derivatives by hand.
#pragma once
#include <optional>
#include "attention.hpp"
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
    real *pre, *heads[7], *local, *post, *output;  // slopes
    const real *x, *center, *spd, *nonlocal;       // messages
    std::optional<LinearAttention> attention;
    real *P, *D, *sides[2];                        // moments and their projections
};

class Evaluation {
    const Numbers& c;
    const Pairs& pairs;
    const Member& member;
    const Groups& groups;
    Arena& arena;
    const int n;
    const size_t stride;
    std::vector<Module> modules;
    Network embedding[2];
    struct {
        real *share, *slopes;
    } embedded[2];
    std::vector<Tape> tapes;
    real *const rho, *const d_rho, *const d_p, *const d_d;
    std::vector<double> slopes;

    real* take(size_t width) { return arena.take(n * width); }

    static void add(const real* x, size_t size, real* y) {
        for (size_t i = 0; i < size; i += L) store(y + i, load(y + i) + load(x + i));
    }

    static real dot(const real* a, const real* b) {
        V total{};
        for (int f = 0; f < F; f += L) total += load(a + f) * load(b + f);
        return sum(total);
    }

    // -- forward -----------------------------------------------------------------------------------------------------

    void messages(const Module& m, Tape& t, const real* x) {
        real *before = take(F), *center = take(F), *spd = take(3 * F);
        t.pre = take(F * m.pre.slopes());
        for (int h = 0; h < heads(); ++h) t.heads[h] = take(F * m.heads[h].slopes());
        if (c.attention) t.attention.emplace(groups, n, arena);
        groups.each(n, [&](int from, int to, Arena& scratch) {
            const Arena::Mark mark = scratch.mark();
            const size_t some = to - from, at = size_t(from) * F;
            forward(m.pre, int(some), x + at, before + at, t.pre + at, stride, scratch);
            real *one = scratch.take(some * F), *to_all[3] = {nullptr, nullptr, nullptr};
            if (c.attention) to_all[0] = t.attention->q, to_all[1] = t.attention->k, to_all[2] = t.attention->v;
            for (int h = 0; h < heads(); ++h) {
                real* target = h == 0 ? center + at : h <= 3 ? one : to_all[h - 4] + at;
                forward(m.heads[h], int(some), before + at, target, t.heads[h] + at, stride, scratch);
                for (size_t i = 0; i < some && h >= 1 && h <= 3; ++i)
                    std::memcpy(spd + (3 * (from + i) + h - 1) * F, one + i * F, F * sizeof(real));
            }
            scratch.back(mark);
        });
        t.x = before, t.center = center, t.spd = spd;
        if (c.attention) {
            t.attention->forward(m.omega);
            t.nonlocal = t.attention->out;
        }
    }

    int heads() const { return c.attention ? 7 : 4; }

    // s, p and d sums over neighbours, and the invariant products of the latter two
    void local_features(const Module& m, Tape& t, int from, int to, real* total, Arena& scratch) {
        std::memcpy(total + size_t(from) * F, t.center + size_t(from) * F, size_t(to - from) * F * sizeof(real));
        for (int i = from; i < to; ++i) {
            const int b = pairs.begin[i], near = pairs.size(i);
            const Arena::Mark mark = scratch.mark();
            real* g = scratch.take(size_t(near) * 3 * F);
            received(m, t, i, g);
            for (int k = 0; k < near; ++k) add(g + k * 3 * F, F, total + i * F);
            product<F>(3, near, &pairs.p[3 * b], near, 1, g + F, 3 * F, nullptr, false, t.P + 3 * i * F, F);
            product<F>(ND, near, &pairs.d[ND * b], near, 1, g + 2 * F, 3 * F, nullptr, false, t.D + ND * i * F, F);
            scratch.back(mark);
        }
        const real* moments[2] = {t.P, t.D};
        const int terms[2] = {3, ND};
        for (int w = 0; w < 2; ++w) {
            const int first = from * terms[w], last = to * terms[w];
            product<2 * F>(last - first, F, moments[w] + first * F, F, 1, m.project[w], 2 * F, nullptr, false,
                           t.sides[w] + first * 2 * F, 2 * F);
            for (int row = first; row < last; ++row)
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

    // x + what charge and spin add: a network of their value, dealt out to the atoms by a softmax of x . key
    real* embed(const real* x) {
        real* sum = take(F);
        std::memcpy(sum, x, stride * sizeof(real));
        for (int w = 0; w < 2; ++w) {
            if (!member.value[w]) continue;
            real* share = embedded[w].share = arena.take(n);
            real most = 0, total = 0;
            for (int i = 0; i < n; ++i) {
                share[i] = dot(x + i * F, member.key[w]);
                most = i == 0 || share[i] > most ? share[i] : most;
            }
            for (int i = 0; i < n; ++i) total += share[i] = std::exp(share[i] - most);
            for (int i = 0; i < n; ++i) share[i] /= total;
            embedded[w].slopes = take(F * embedding[w].slopes());
            groups.each(n, [&](int from, int to, Arena& scratch) {
                const Arena::Mark mark = scratch.mark();
                const size_t some = to - from, at = size_t(from) * F;
                real *in = scratch.take(some * F), *y = scratch.take(some * F);
                for (size_t i = 0; i < some; ++i)
                    for (int f = 0; f < F; f += L) store(in + i * F + f, share[from + i] * load(member.value[w] + f));
                forward(embedding[w], int(some), in, y, embedded[w].slopes + at, stride, scratch);
                add(y, some * F, sum + at);
                scratch.back(mark);
            });
        }
        return sum;
    }

    // -- back --------------------------------------------------------------------------------------------------------

    // derivatives by x from those by x with the embedding, in place
    void embed_back(real* dx) {
        real* more = arena.zeros(stride);
        for (int w = 0; w < 2; ++w) {
            if (!member.value[w]) continue;
            real *dshare = arena.take(n), mean = 0;
            groups.each(n, [&](int from, int to, Arena& scratch) {
                const Arena::Mark mark = scratch.mark();
                const size_t some = to - from, at = size_t(from) * F;
                real* din = scratch.take(some * F);
                backward(embedding[w], int(some), dx + at, embedded[w].slopes + at, stride, false, din, scratch);
                for (size_t i = 0; i < some; ++i) dshare[from + i] = dot(din + i * F, member.value[w]);
                scratch.back(mark);
            });
            for (int i = 0; i < n; ++i) mean += embedded[w].share[i] * dshare[i];
            for (int i = 0; i < n; ++i) {
                const real d = embedded[w].share[i] * (dshare[i] - mean);
                for (int f = 0; f < F; f += L)
                    store(more + i * F + f, load(more + i * F + f) + d * load(member.key[w] + f));
            }
        }
        add(more, stride, dx);
    }

    // derivatives of the sums P and D from that of the local features
    void moments_back(const Module& m, const Tape& t, int from, int to, const real* dtotal, real* const* dmoments,
                      Arena& scratch) {
        const int terms[2] = {3, ND};
        for (int w = 0; w < 2; ++w) {
            const Arena::Mark mark = scratch.mark();
            const int first = from * terms[w], last = to * terms[w];
            real* crossed = scratch.take(size_t(last - first) * 2 * F);
            for (int row = first; row < last; ++row)
                for (int f = 0; f < F; f += L) {
                    const V d = load(dtotal + row / terms[w] * F + f);
                    const real* side = t.sides[w] + row * 2 * F + f;
                    store(crossed + (row - first) * 2 * F + f, d * load(side + F));
                    store(crossed + (row - first) * 2 * F + F + f, d * load(side));
                }
            product<F>(last - first, 2 * F, crossed, 2 * F, 1, m.project_back[w], F, nullptr, false,
                       dmoments[w] + first * F, F);
            scratch.back(mark);
        }
    }

    // d_rho, d_p and d_d of atom i's pairs (added), and dspd of what i sends (null where positions do not enter it)
    void pairs_back(const Module& m, const Tape& t, int i, const real* dtotal, real* const* dmoments, real* dspd,
                    Arena& scratch) {
        const int b = pairs.begin[i], near = pairs.size(i);
        const Arena::Mark mark = scratch.mark();
        real *g = scratch.take(size_t(near) * 3 * F), *filters = scratch.take(size_t(near) * 3 * F);
        real* d = scratch.take(size_t(near) * 3 * F);
        received(m, t, i, g, filters);
        const real *p = &pairs.p[3 * b], *q = &pairs.d[ND * b];
        const real *dP = dmoments[0] + 3 * i * F, *dD = dmoments[1] + ND * i * F;
        for (int k = 0; k < near; ++k) std::memcpy(d + k * 3 * F, dtotal + i * F, F * sizeof(real));
        product<F>(near, 3, p, 1, near, dP, F, nullptr, false, d + F, 3 * F);
        product<F>(near, ND, q, 1, near, dD, F, nullptr, false, d + 2 * F, 3 * F);
        for (int k = 0; k < near; ++k) {
            for (int a = 0; a < 3; ++a) d_p[3 * b + a * near + k] += dot(g + k * 3 * F + F, dP + a * F);
            for (int a = 0; a < ND; ++a) d_d[ND * b + a * near + k] += dot(g + k * 3 * F + 2 * F, dD + a * F);
            const size_t j = pairs.list[b + k].j;
            const real* sent = t.spd + j * 3 * F;
            for (int f = 0; f < 3 * F; f += L) store(d + k * 3 * F + f, load(d + k * 3 * F + f) * load(sent + f));
            if (dspd) sent_back(j, p + k, q + k, near, filters + k * 3 * F, dtotal, dmoments, dspd);
        }
        product<K>(near, 3 * F, d, 3 * F, 1, m.radial_back, K, nullptr, true, &d_rho[b * K], K);
        scratch.back(mark);
    }

    // What neighbour j makes of what atom i sends it. The list holds both directions, so the pair of i and j says it
    // all: radial and d functions are even, p functions are odd.
    void sent_back(size_t j, const real* p, const real* q, int near, const real* filters, const real* dtotal,
                   real* const* dmoments, real* dspd) {
        const real *there = dtotal + j * F, *dP = dmoments[0] + 3 * j * F, *dD = dmoments[1] + ND * j * F;
        for (int f = 0; f < F; f += L) {
            V along{}, across{};
            for (int a = 0; a < 3; ++a) along -= p[a * near] * load(dP + a * F + f);
            for (int a = 0; a < ND; ++a) across += q[a * near] * load(dD + a * F + f);
            store(dspd + f, load(dspd + f) + load(there + f) * load(filters + f));
            store(dspd + F + f, load(dspd + F + f) + along * load(filters + F + f));
            store(dspd + 2 * F + f, load(dspd + 2 * F + f) + across * load(filters + 2 * F + f));
        }
    }

    // derivatives by the features that went into a module, for some rows
    void messages_back(const Module& m, const Tape& t, int from, int to, const real* dz, const real* dcenter,
                       const real* dspd, const real* const* to_all, real* dx, Arena& scratch) {
        const Arena::Mark mark = scratch.mark();
        const size_t some = to - from, at = size_t(from) * F;
        real *dbefore = scratch.take(some * F), *one = scratch.take(some * F);
        std::memcpy(dbefore, dz + at, some * F * sizeof(real));
        for (int h = 0; h < heads(); ++h) {
            for (size_t i = 0; i < some && h >= 1 && h <= 3; ++i)
                std::memcpy(one + i * F, dspd + (3 * (from + i) + h - 1) * F, F * sizeof(real));
            const real* source = h == 0 ? dcenter + at : h <= 3 ? one : to_all[h - 4] + at;
            backward(m.heads[h], int(some), source, t.heads[h] + at, stride, true, dbefore, scratch);
        }
        backward(m.pre, int(some), dbefore, t.pre + at, stride, false, dx + at, scratch);
        scratch.back(mark);
    }

    // dx: derivatives by the features that a module gives to the next one; becomes those by what it got
    void module_back(const Module& m, Tape& t, const real* df, bool first, real* dx) {
        real *dz = take(F), *dtotal = take(F), *dspd = first ? nullptr : arena.zeros(3 * stride);
        real* dmoments[2] = {take(3 * F), take(ND * F)};
        groups.each(n, [&](int from, int to, Arena& scratch) {
            const int some = to - from;
            const size_t at = size_t(from) * F;
            backward(m.output, some, df + at, t.output + at, stride, true, dx + at, scratch);
            backward(m.post, some, dx + at, t.post + at, stride, false, dz + at, scratch);
            backward(m.local, some, dz + at, t.local + at, stride, false, dtotal + at, scratch);
            moments_back(m, t, from, to, dtotal, dmoments, scratch);
        });
        real* to_all[3] = {nullptr, nullptr, nullptr};
        if (c.attention && !first) {
            for (real*& d : to_all) d = take(F);
            t.attention->backward(m.omega_back, dz, to_all[0], to_all[1], to_all[2], arena);
        }
        groups.each(n, [&](int from, int to, Arena& scratch) {
            for (int i = from; i < to; ++i)
                pairs_back(m, t, i, dtotal, dmoments, first ? nullptr : dspd + size_t(i) * 3 * F, scratch);
            if (!first) messages_back(m, t, from, to, dz, dtotal, dspd, to_all, dx, scratch);
        });
    }

public:
    Evaluation(const Numbers& c, const Pairs& pairs, const Member& member, const Groups& groups, Arena& arena)
        : c(c), pairs(pairs), member(member), groups(groups), arena(arena), n(int(c.n)), stride(size_t(n) * F),
          tapes(c.modules), rho(arena.take(pairs.list.size() * K)), d_rho(arena.zeros(pairs.list.size() * K)),
          d_p(arena.zeros(pairs.p.size())), d_d(arena.zeros(pairs.d.size())), slopes(pairs.list.size() * RADIAL) {
        Reader reader{member.arrays};
        for (int64_t t = 0; t < c.modules; ++t) modules.push_back(reader.module(member.blocks, c.attention, t == 0));
        for (int w = 0; w < 2 && c.embed_after > 0; ++w) embedding[w] = reader.network(member.blocks[11], false);
        groups.each(int(pairs.list.size()), [&](int from, int to, Arena&) {
            for (int k = from; k < to; ++k)
                radial(c, member.numbers[0], pairs.list[k], &rho[k * K], &slopes[k * RADIAL]);
        });
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
            tape.local = take(F * m.local.slopes()), tape.post = take(F * m.post.slopes());
            tape.output = take(F * m.output.slopes());
            tape.P = take(3 * F), tape.D = take(ND * F), tape.sides[0] = take(6 * F), tape.sides[1] = take(2 * ND * F);
            real *total = take(F), *z = take(F), *next = take(F), *y = take(F);
            groups.each(n, [&](int from, int to, Arena& scratch) {
                const int some = to - from;
                const size_t at = size_t(from) * F;
                local_features(m, tape, from, to, total, scratch);
                forward(m.local, some, total + at, z + at, tape.local + at, stride, scratch);
                add(tape.x + at, some * F, z + at);
                if (tape.nonlocal) add(tape.nonlocal + at, some * F, z + at);
                forward(m.post, some, z + at, next + at, tape.post + at, stride, scratch);
                forward(m.output, some, next + at, y + at, tape.output + at, stride, scratch);
                add(y + at, some * F, f + at);
            });
            x = next;
        }
    }

    // derivatives of everything by the positions, from df
    void back(const real* df, const std::vector<double>& dr_more, double* gradient) {
        real* dx = arena.zeros(stride);
        for (int64_t t = c.modules; t-- > 0;) {
            const Arena::Mark mark = arena.mark();
            module_back(modules[t], tapes[t], df, t == 0, dx);
            if (t > 0 && t == c.embed_after) embed_back(dx);
            arena.back(mark);
        }
        std::vector<std::array<double, 3>> pulls(pairs.list.size());
        groups.each(int(pairs.list.size()), [&](int from, int to, Arena&) {
            for (int k = from; k < to; ++k) {
                const Pair& q = pairs.list[k];
                double dr = dr_more[k], dp[3], dd[ND], du[3];
                for (int v = 0; v < RADIAL; ++v) dr += double(d_rho[k * K + v]) * slopes[k * RADIAL + v];
                const int b = pairs.begin[q.i], near = pairs.size(q.i), here = k - b;
                for (int a = 0; a < 3; ++a) dp[a] = d_p[3 * b + a * near + here];
                for (int a = 0; a < ND; ++a) dd[a] = d_d[ND * b + a * near + here];
                angular_back(q.u, dp, dd, du);
                pulls[k] = by_position(q, dr, du);
            }
        });
        for (size_t k = 0; k < pairs.list.size(); ++k)
            for (int a = 0; a < 3; ++a) {
                gradient[3 * pairs.list[k].j + a] += pulls[k][a];
                gradient[3 * pairs.list[k].i + a] -= pulls[k][a];
            }
    }
};

}  // namespace
