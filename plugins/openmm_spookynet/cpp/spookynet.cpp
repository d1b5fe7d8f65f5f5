// SpookyNet, alone or as members of an ensemble: energies, forces and charges of one structure, each member's in turn.
// Compiled at run time with the model's sizes (FEATURES, RANDOM, RADIAL) and precision (REAL); see members.py, and
// model.py for the same network in torch, line by line.
#include "network.hpp"

namespace {

enum Conservation { UNIFORM, SHARED, LOCAL };

std::vector<double> softmax(const Numbers& c, const double* s) {
    std::vector<double> share(s, s + c.n);
    double most = s[0], total = 0;
    for (double x : share) most = std::fmax(most, x);
    for (double& x : share) total += x = std::exp(x - most);
    for (double& x : share) x /= total;
    return share;
}

// shares of what a structure's charges lack of its total: the same for all atoms, or as the network says
std::vector<double> shares(const Numbers& c, const double* s) {
    return c.conservation == UNIFORM ? std::vector<double>(c.n, 1.0 / double(c.n)) : softmax(c, s);
}

double lacking(const Numbers& c, const double* q) {
    double surplus = c.total_charge;
    for (int i = 0; i < c.n && c.conservation != LOCAL; ++i) surplus -= q[i];
    return surplus;
}

// charges that add up to the total charge, from the network's outputs; with local conservation neighbours exchange them
void conserve(const Numbers& c, const Pairs& pairs, const double* q, const double* s, double* charges) {
    const std::vector<double> share = shares(c, s);
    const double surplus = lacking(c, q);
    for (int i = 0; i < c.n; ++i) charges[i] = surplus * share[i] + (c.conservation == LOCAL ? 0.0 : q[i]);
    if (c.conservation == LOCAL)
        for (const Pair& p : pairs.list) charges[p.i] += p.f * (q[p.j] - q[p.i]);
}

// dq and ds from the derivative by the charges, and dr of pairs
void conserve_back(const Numbers& c, const Pairs& pairs, const double* q, const double* s, const double* dcharges,
                   double* dq, double* ds, std::vector<double>& dr) {
    const std::vector<double> share = shares(c, s);
    const double surplus = lacking(c, q);
    double mean = 0;
    for (int i = 0; i < c.n; ++i) mean += share[i] * dcharges[i];
    for (int i = 0; i < c.n; ++i) {
        if (c.conservation != UNIFORM) ds[i] = surplus * share[i] * (dcharges[i] - mean);
        if (c.conservation != LOCAL) dq[i] = dcharges[i] - mean;
    }
    if (c.conservation == LOCAL)
        for (size_t k = 0; k < pairs.list.size(); ++k) {
            const Pair& p = pairs.list[k];
            dq[p.j] += p.f * dcharges[p.i];
            dq[p.i] -= p.f * dcharges[p.i];
            dr[k] += p.f * p.slope_of_log_f * (q[p.j] - q[p.i]) * dcharges[p.i];
        }
}

}  // namespace

extern "C" int64_t spookynet_lanes() { return L; }

// energies (n_members), forces (n_members, n, 3), charges (n_members, n)
extern "C" void spookynet_members(const Numbers* numbers, int64_t n_members, const Member* members, double* energies,
                                  double* forces, double* charges) {
    const Numbers& c = *numbers;
    static thread_local Arena arena;
    static thread_local std::vector<Arena> scratch;
    if (scratch.size() < size_t(c.threads)) scratch.resize(c.threads);
    const Groups groups{int(c.threads), scratch};
    const Pairs pairs = find_pairs(c, groups);
    const std::vector<Coulomb> far = coulomb(c, groups);
    const int n = int(c.n), outputs = c.conservation == UNIFORM ? 2 : 3;
    for (int64_t m = 0; m < n_members; ++m) {
        const Member& member = members[m];
        arena.back({0, 0});
        Evaluation evaluation(c, pairs, member, groups, arena);
        real* f = arena.zeros(size_t(n) * F);
        evaluation.descriptor(f);
        double energy = 0, *q_out = charges + m * n;
        std::vector<double> net(3 * n), dcharges(n), dq(n), ds(n), dr(pairs.list.size()), gradient(3 * n);
        for (int i = 0; i < n; ++i)
            for (int o = 0; o < outputs; ++o) {
                double value = member.bias[outputs * i + o];
                for (int k = 0; k < F; ++k) value += double(f[i * F + k]) * member.output[o * F + k];
                if (o == 0) energy += value;
                else net[(o - 1) * n + i] = value;
            }
        conserve(c, pairs, net.data(), net.data() + n, q_out);
        if (c.repulsion) energy += repulsion(c, member.numbers + 1, pairs, groups, dr.data());
        energy += electrostatics(c, far, q_out, dcharges.data(), gradient.data());
        if (member.d4) energy += Dispersion(c, *member.d4).energy(q_out, dcharges.data(), gradient.data());
        if (c.potential)
            for (int i = 0; i < n; ++i) {
                energy += q_out[i] * c.potential[i];
                dcharges[i] += c.potential[i];
            }
        conserve_back(c, pairs, net.data(), net.data() + n, dcharges.data(), dq.data(), ds.data(), dr);
        real* df = arena.take(size_t(n) * F);
        for (int i = 0; i < n; ++i)
            for (int k = 0; k < F; ++k) {
                double value = member.output[k] + dq[i] * member.output[F + k];
                if (outputs == 3) value += ds[i] * member.output[2 * F + k];
                df[i * F + k] = real(value);
            }
        evaluation.back(df, dr, gradient.data());
        energies[m] = energy;
        for (int i = 0; i < 3 * n; ++i) forces[m * 3 * n + i] = -gradient[i];
    }
}
