// What a model holds (weights, tables) and what one evaluation keeps for its way back.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "harmonics.hpp"
#include "pool.hpp"

constexpr int F = FEATURES, H = HEADS, D = N_DEGREES, M = COMPONENTS;
constexpr int WIDTH_X = F / H, WIDTH_E = F / D;     // of a head of the features, of the Euclidean variables
constexpr int HIDDEN = rounded_up(F / 4, LANES);    // of the spherical filter
constexpr int EXCHANGE = rounded_up(F + D, LANES);  // features and invariants
constexpr int COEFFICIENTS = H + D;                 // attention coefficients of a directed pair
constexpr int TABLE_TERMS = 3;                      // value, slope, curvature at a knot
constexpr int PAIR_BLOCK = 16, PAIRS_PER_TASK = 4 * PAIR_BLOCK;
static_assert(F % LANES == 0, "features are whole vectors");

// Order of the arrays of a layer; the Python side packs them in this order (nullptr: absent).
enum LayerArray {
    TABLE,      // (knots, 3, 2F): filter of features and of Euclidean variables as a function of distance
    S1,         // (D, 2 HIDDEN), zero where the filter has no spherical part
    S1_BIAS,    // (2 HIDDEN)
    S2,         // (2, HIDDEN, F)
    S2_BACK,    // (2, F, HIDDEN)
    PROJECT,    // (5, F / GROUP, GROUP, GROUP): query, query, key, key, value
    PROJECT_BACK,
    NORM1, NORM1_BIAS,
    MLP1_A, MLP1_A_BACK, MLP1_A_BIAS, MLP1_B, MLP1_B_BACK, MLP1_B_BIAS,
    EXCHANGE_W, EXCHANGE_BACK, EXCHANGE_BIAS,  // (F + D, EXCHANGE)
    NORM2, NORM2_BIAS,
    MLP2_A, MLP2_A_BACK, MLP2_A_BIAS, MLP2_B, MLP2_B_BACK, MLP2_B_BIAS,
    LAYER_ARRAYS
};

// What long-range pairs add to an atom: energy, derivatives by charge and ratio, force.
constexpr int LONG_SUMS = 6;

struct Layer {
    const real* w[LAYER_ARRAYS];
    bool spherical;  // whether Euclidean variables are not all zero before this layer
};

struct Numbers {
    double cutoff, divisor, initial_divisor;  // the last: 0 if Euclidean variables start at zero
    int64_t knots, cosine, rms, n_layers, group, types;
    int64_t energy_width, charge_width, hirshfeld_width;  // of the hidden layers of the heads, whole vectors
    const real *head, *head_back, *head_bias;             // (F, sum of widths), its transpose, (sum)
    const real *last;                                     // (types, sum): last layers, one row per element
    const double *last_bias;                              // (types, 3)
    const double *nuclear;                                // (types, 2): Z and Z^p D; nullptr: no repulsion
    double screening[8], repulsion_reach, coulomb;        // exponents, weights
    const real* pair_table;                               // (long_knots, 3, 2): electrostatics, switch of dispersion
    int64_t long_knots;
    double long_step, long_limit;                         // limit: 0 for none
    const real* free_atoms;                               // (types, 2): polarisability, C6 / polarisability^2
    double hartree, bohr, radius_factor, damping_factor;
};

struct LayerState {
    Buffer<real> projected;                     // (N, 5F)
    Buffer<real> normed1, slope1a, slope1, rate1;  // (N, F); rate (N)
    Buffer<real> euclid_in, euclid;             // (N, M) before and after the attention
    Buffer<real> gate;                          // (N, D)
    Buffer<real> normed2, rate2, slope2a, slope2;
    Buffer<real> alpha;                         // (P, 2, COEFFICIENTS) without the cutoff function
    Buffer<real> filter;                        // (P, 2F)
    Buffer<real> slope_filter;                  // (P, 2 HIDDEN)
};

struct Edge {  // one end of a pair as an atom sees it
    int32_t neighbor;
    int32_t pair;  // times two, plus one at the second end
};

struct Scratch {  // of one thread
    Buffer<real> memory;
};

struct Engine {
    Numbers c;
    std::vector<Layer> layers;
    std::vector<LayerState> state;
    int threads = 1;
    // atoms
    int n = 0, n_structures = 0;
    std::vector<int32_t> type, segment, structure_start;
    std::vector<double> charge;
    Buffer<real> x0;
    bool first_projected = false;
    // lists
    std::vector<int32_t> first, second, long_first, long_second;
    std::vector<int16_t> shift, long_shift;  // in lattice vectors, (pairs, 3), or empty
    // pairs within the cutoff at the last geometry
    int n_pairs = 0;
    std::vector<int32_t> a, b, knot;
    std::vector<int32_t> edge_start;
    std::vector<Edge> edges;
    Buffer<double> vector;  // (P, 3)
    Buffer<real> weight, weight_slope;  // cutoff function over divisor, and derivative
    Buffer<real> basis;                 // (P, 12): of the table's terms, and derivatives
    Buffer<real> harmonics;             // (P, M)
    Buffer<real> distance_gradient, harmonics_gradient, coefficient_gradient, invariant_gradient;
    Buffer<double> pair_force;          // (P, 3)
    std::vector<double> pair_energy;
    // atoms at the last geometry
    Buffer<real> x, heads_slope, x_gradient, euclid_gradient, x_after, euclid_after;
    Buffer<real> charges, ratios, ratio_sign;
    Buffer<double> atom_energy;
    // long range
    Buffer<double> long_sums;  // (chunks, N, LONG_SUMS)
    int long_chunks = 0;
    Buffer<real> polarisability;
    Buffer<real> charge_gradient, ratio_gradient;
    std::vector<Scratch> scratch;

    real* memory(int thread, size_t n) { return scratch[thread].memory.resize(n); }
    int atoms_per_task() const { return n >= 128 ? 32 : 16; }
    int atom_tasks() const { return (n + atoms_per_task() - 1) / atoms_per_task(); }
    int pair_tasks() const { return (n_pairs + PAIRS_PER_TASK - 1) / PAIRS_PER_TASK; }
    int heads_width() const { return int(c.energy_width + c.charge_width + c.hirshfeld_width); }

    double search(const double* positions, const double* cell, double short_reach, double long_reach, int n_threads,
                  int64_t* closest_pair);
    void geometry(const double* positions, const double* cell);
    void start();
    void project(const Layer& layer, const real* x, int m, real* out) const;
    void attention_pairs(int t);
    void attention_atoms(int t, int begin, int end);
    void refine(int t, int begin, int end, real* x, real* work);
    void heads(int begin, int end, const real* x, real* work);
    void forward();
    void heads_back(int begin, int end, const real* charge_gradient, const real* ratio_gradient, real* gx, real* work);
    void refine_back(int t, int begin, int end, real* gx, real* work);
    void attention_pairs_back(int t);
    template <int FILTER>
    void neighbour_sums(const LayerState& s, int i, real* out) const;
    void attention_atoms_back(int t, int begin, int end, real* gx, real* work);
    void euclid_back(int t, int i);
    void backward(const real* charge_gradient, const real* ratio_gradient);
    void long_range(const double* positions, const double* cell);
    void pull(const double* outside, real* charge_gradient, real* ratio_gradient);
    void forces(double* out);
    double repulsion(int pair, double& slope) const;
};
