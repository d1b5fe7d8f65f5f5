// Energy, charges and forces of SO3krates for molecular dynamics: the functions that Python calls.
//
// Compiled for one model size: REAL (float or double), FEATURES, HEADS, DEGREES (a list). Lists of pairs are half
// lists, because filters, distances and harmonics of i -> j and j -> i are the same but for a sign. Nothing depends on
// the number of threads: every sum has one order.
#include <algorithm>
#include <cstdio>

#include "layers_back.hpp"
#include "long_range.hpp"
#include "search.hpp"

extern "C" {

int64_t so3krates_layer_arrays() { return LAYER_ARRAYS; }
int64_t so3krates_lanes() { return LANES; }

// arrays: (n_layers, LAYER_ARRAYS) addresses; spherical: (n_layers). Everything must outlive the engine.
Engine* so3krates_new(const Numbers* numbers, const real* const* arrays, const int64_t* spherical) {
    auto* engine = new (std::nothrow) Engine;
    if (!engine) return nullptr;
    engine->c = *numbers;
    engine->layers.resize(numbers->n_layers);
    engine->state = std::vector<LayerState>(numbers->n_layers);
    for (int t = 0; t < numbers->n_layers; ++t) {
        std::copy(arrays + t * LAYER_ARRAYS, arrays + (t + 1) * LAYER_ARRAYS, engine->layers[t].w);
        engine->layers[t].spherical = spherical[t] != 0;
    }
    return engine;
}

void so3krates_delete(Engine* engine) { delete engine; }

// type, segment: (n) ascending segments; charge: (n_structures); x0: (n, FEATURES) initial features.
void so3krates_atoms(Engine* engine, int64_t n, int64_t n_structures, const int32_t* type, const int32_t* segment,
                     const double* charge, const real* x0) {
    Engine& e = *engine;
    e.n = int(n), e.n_structures = int(n_structures);
    e.type.assign(type, type + n), e.segment.assign(segment, segment + n);
    e.charge.assign(charge, charge + n_structures);
    e.structure_start.assign(n_structures + 1, 0);
    for (int i = 0; i < n; ++i) ++e.structure_start[segment[i] + 1];
    for (int s = 0; s < n_structures; ++s) e.structure_start[s + 1] += e.structure_start[s];
    std::memcpy(e.x0.resize(FEATURES * size_t(n)), x0, FEATURES * size_t(n) * sizeof(real));
    e.first_projected = false;
}

// which: 0 for pairs within the cutoff and a skin, 1 for long-range pairs; shift: (count, 3) lattice vectors or null.
void so3krates_pairs(Engine* engine, int64_t which, int64_t count, const int32_t* first, const int32_t* second,
                     const int16_t* shift) {
    auto set = [&](auto& to_first, auto& to_second, auto& to_shift) {
        to_first.assign(first, first + count), to_second.assign(second, second + count);
        to_shift.clear();
        if (shift) to_shift.assign(shift, shift + 3 * count);
    };
    if (which)
        set(engine->long_first, engine->long_second, engine->long_shift);
    else
        set(engine->first, engine->second, engine->shift);
}

// Both lists, made here: pairs within `short_reach` and, where it is not 0, `long_reach`. Returns the smallest distance
// and its atoms, or -1 if memory ran out.
double so3krates_search(Engine* engine, const double* positions, const double* cell, double short_reach,
                        double long_reach, int64_t threads, int64_t* closest_pair) try {
    return engine->search(positions, cell, short_reach, long_reach, int(threads), closest_pair);
} catch (const std::bad_alloc&) {
    return -1;
}

// The lists as they are: sizes (2), or their contents, `which` as in so3krates_pairs.
void so3krates_listed(const Engine* engine, int64_t* sizes) {
    sizes[0] = int64_t(engine->first.size()), sizes[1] = int64_t(engine->long_first.size());
}

void so3krates_list(const Engine* engine, int64_t which, int32_t* first, int32_t* second, int16_t* shift) {
    const Engine& e = *engine;
    const auto &from = which ? e.long_first : e.first, &to = which ? e.long_second : e.second;
    const auto& shifts = which ? e.long_shift : e.shift;
    std::copy(from.begin(), from.end(), first), std::copy(to.begin(), to.end(), second);
    std::copy(shifts.begin(), shifts.end(), shift);
}

// Everything but derivatives: charges (n), ratios (n). Returns 0, or 1 if memory ran out.
int64_t so3krates_forward(Engine* engine, int64_t threads, const double* positions, const double* cell,
                          double* charges, double* ratios) try {
    Engine& e = *engine;
    e.threads = int(threads);
    while (e.scratch.size() < size_t(threads)) e.scratch.emplace_back();
    e.geometry(positions, cell);
    e.forward();
    for (int s = 0; s < e.n_structures; ++s) {
        const int begin = e.structure_start[s], end = e.structure_start[s + 1];
        double sum = 0;
        for (int i = begin; i < end; ++i) sum += e.charges[i];
        const double surplus = (e.charge[s] - sum) / std::max(1, end - begin);
        for (int i = begin; i < end; ++i) {
            charges[i] = e.charges[i] + surplus, ratios[i] = e.ratios[i];
            e.charges[i] = real(charges[i]);
        }
    }
    e.long_range(positions, cell);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// The way back: energies (n_structures) and forces (n, 3); outside: dE/dq (n) of energies that are not ours, or null.
int64_t so3krates_backward(Engine* engine, const double* outside, double* energies, double* forces) try {
    Engine& e = *engine;
    const int n = e.n;
    e.charge_gradient.resize(n), e.ratio_gradient.resize(n);
    e.pull(outside, e.charge_gradient.get(), e.ratio_gradient.get());
    e.backward(e.charge_gradient.get(), e.ratio_gradient.get());
    std::fill(energies, energies + e.n_structures, 0.0);
    for (int i = 0; i < n; ++i) {
        double energy = e.atom_energy[i];
        for (int d = 0; d < 3; ++d) forces[3 * i + d] = 0;
        for (int chunk = 0; chunk < e.long_chunks; ++chunk) {
            const double* sums = &e.long_sums[size_t(LONG_SUMS) * (size_t(n) * chunk + i)];
            energy += sums[0];
            for (int d = 0; d < 3; ++d) forces[3 * i + d] += sums[3 + d];
        }
        energies[e.segment[i]] += energy;
    }
    e.forces(forces);
    for (int p = 0; p < e.n_pairs; ++p) energies[e.segment[e.a[p]]] += e.pair_energy[p];
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Bytes that the engine holds.
int64_t so3krates_bytes(const Engine* engine) {
    const Engine& e = *engine;
    size_t sum = e.long_sums.bytes() + e.vector.bytes() + e.basis.bytes() + e.harmonics.bytes() * 2 +
                 e.coefficient_gradient.bytes() + e.pair_force.bytes() + 14 * (e.long_first.size() + e.first.size());
    for (const auto& s : e.state)
        sum += s.projected.bytes() + 6 * s.normed1.bytes() + s.alpha.bytes() + s.filter.bytes() +
               s.slope_filter.bytes();
    return int64_t(sum);
}
}
