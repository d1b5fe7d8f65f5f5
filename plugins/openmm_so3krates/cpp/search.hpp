// Half lists by linked cells: every pair of images within reach once, for open structures and any periodic box.
#pragma once

#include "engine.hpp"

constexpr int CELLS_PER_REACH = 2;  // finer cells hold fewer candidates beyond the reach, but are more

struct Cells {
    int n[3] = {1, 1, 1}, range[3] = {0, 0, 0};  // cells along each axis, and how many of them the reach spans
    std::vector<int32_t> start, atom;            // atoms by cell
    std::vector<real> x, y, z;                   // in that order, moved into the box
    std::vector<double> inside;                  // the same in double precision, (atoms, 3)
    std::vector<int16_t> wrapped;                // lattice vectors that were taken off, (atoms, 3)
};

struct Found {  // of one cell
    std::vector<int32_t> first, second, long_first, long_second;
    std::vector<int16_t> shift, long_shift;
    double closest = INFINITY;
    int32_t pair[2] = {0, 0};
};

static inline void invert(const double* m, double* inverse) {
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) {
            const int a = (j + 1) % 3, b = (j + 2) % 3, c = (i + 1) % 3, d = (i + 2) % 3;
            inverse[3 * i + j] = m[3 * a + c] * m[3 * b + d] - m[3 * a + d] * m[3 * b + c];
        }
    const double volume = m[0] * inverse[0] + m[1] * inverse[3] + m[2] * inverse[6];
    for (int k = 0; k < 9; ++k) inverse[k] /= volume;
}

// Sort the atoms begin..end-1 into cells of a box (rows of `lattice`, from `origin`).
static inline void fill_cells(Cells& cells, const double* positions, int begin, int end, const double* lattice,
                              const double* origin, bool periodic, double reach) {
    double inverse[9];
    invert(lattice, inverse);
    const int n = end - begin;
    for (int k = 0; k < 3; ++k) {
        // distance of opposite faces; columns of the inverse are normal to them
        const double height = 1 / std::sqrt(inverse[k] * inverse[k] + inverse[3 + k] * inverse[3 + k] +
                                            inverse[6 + k] * inverse[6 + k]);
        const double most = std::cbrt(double(n)) + 1;
        cells.n[k] = static_cast<int>(std::max(1.0, std::min(most, std::floor(CELLS_PER_REACH * height / reach))));
        cells.range[k] = static_cast<int>(std::ceil(reach / (height / cells.n[k])));
        if (!periodic) cells.range[k] = std::min(cells.range[k], cells.n[k] - 1);
    }
    std::vector<int32_t> place(n);
    std::vector<double> moved(3 * size_t(n));
    std::vector<int16_t> off(3 * size_t(n));
    cells.start.assign(size_t(cells.n[0]) * cells.n[1] * cells.n[2] + 1, 0);
    for (int i = 0; i < n; ++i) {
        const double* r = positions + 3 * size_t(begin + i);
        int index[3];
        for (int d = 0; d < 3; ++d) moved[3 * size_t(i) + d] = r[d];
        for (int k = 0; k < 3; ++k) {
            double f = 0;
            for (int d = 0; d < 3; ++d) f += (r[d] - origin[d]) * inverse[3 * d + k];
            const double whole = periodic ? std::floor(f) : 0.0;
            off[3 * size_t(i) + k] = static_cast<int16_t>(whole);
            for (int d = 0; d < 3; ++d) moved[3 * size_t(i) + d] -= whole * lattice[3 * k + d];
            index[k] = std::max(0, std::min(cells.n[k] - 1, static_cast<int>((f - whole) * cells.n[k])));
        }
        place[i] = (index[0] * cells.n[1] + index[1]) * cells.n[2] + index[2];
        ++cells.start[place[i] + 1];
    }
    for (size_t k = 1; k < cells.start.size(); ++k) cells.start[k] += cells.start[k - 1];
    std::vector<int32_t> next(cells.start.begin(), cells.start.end() - 1);
    cells.atom.resize(n), cells.inside.resize(3 * size_t(n)), cells.wrapped.resize(3 * size_t(n));
    for (auto* v : {&cells.x, &cells.y, &cells.z}) v->resize(n);
    for (int i = 0; i < n; ++i) {
        const int to = next[place[i]]++;
        cells.atom[to] = begin + i;
        for (int d = 0; d < 3; ++d) {
            cells.inside[3 * size_t(to) + d] = moved[3 * size_t(i) + d];
            cells.wrapped[3 * size_t(to) + d] = off[3 * size_t(i) + d];
        }
        const double* r = &moved[3 * size_t(i)];
        cells.x[to] = real(r[0] - origin[0]), cells.y[to] = real(r[1] - origin[1]);
        cells.z[to] = real(r[2] - origin[2]);
    }
}

static inline int floor_divide(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Pairs of atom `from` with the atoms begin..end-1 of a cell whose image is `image` lattice vectors away.
static inline void pairs_of(const Cells& cells, int from, int begin, int end, const int* image, const double* lattice,
                            bool periodic, double short_square, double long_square, Found& out) {
    double step[3] = {};
    for (int k = 0; k < 3; ++k)
        for (int d = 0; d < 3; ++d) step[d] += image[k] * lattice[3 * k + d];
    const real px = real(cells.x[from] - step[0]), py = real(cells.y[from] - step[1]);
    const real pz = real(cells.z[from] - step[2]);
    const double most = std::max(short_square, long_square);
    const real limit = real(most * 1.001 + 1e-3);  // candidates in the working precision, then exactly
    for (int j = begin; j < end; ++j) {
        const real dx = cells.x[j] - px, dy = cells.y[j] - py, dz = cells.z[j] - pz;
        if (dx * dx + dy * dy + dz * dz >= limit) continue;
        double square = 0;
        for (int d = 0; d < 3; ++d) {
            const double v = cells.inside[3 * size_t(j) + d] + step[d] - cells.inside[3 * size_t(from) + d];
            square += v * v;
        }
        if (square >= most) continue;
        const int a = cells.atom[from], b = cells.atom[j];
        if (square < out.closest) out.closest = square, out.pair[0] = a, out.pair[1] = b;
        int16_t shift[3];
        for (int k = 0; k < 3; ++k) {
            const int taken = cells.wrapped[3 * size_t(j) + k] - cells.wrapped[3 * size_t(from) + k];
            shift[k] = static_cast<int16_t>(image[k] - taken);
        }
        if (square < short_square) {
            out.first.push_back(a), out.second.push_back(b);
            if (periodic) out.shift.insert(out.shift.end(), shift, shift + 3);
        }
        if (square < long_square) {
            out.long_first.push_back(a), out.long_second.push_back(b);
            if (periodic) out.long_shift.insert(out.long_shift.end(), shift, shift + 3);
        }
    }
}

// All pairs of the atoms of one cell with its later neighbours.
static inline void pairs_of_cell(const Cells& cells, int cell, const double* lattice, bool periodic,
                                 double short_square, double long_square, Found& out) {
    const int at[3] = {cell / (cells.n[1] * cells.n[2]), cell / cells.n[2] % cells.n[1], cell % cells.n[2]};
    for (int i = cells.start[cell]; i < cells.start[cell + 1]; ++i) {
        const int none[3] = {0, 0, 0};
        pairs_of(cells, i, i + 1, cells.start[cell + 1], none, lattice, periodic, short_square, long_square, out);
        // of two opposite cells the later one: every pair once, an atom and its own images too
        for (int u = 0; u <= cells.range[0]; ++u)
            for (int v = u ? -cells.range[1] : 0; v <= cells.range[1]; ++v)
                for (int w = u || v ? -cells.range[2] : 1; w <= cells.range[2]; ++w) {
                    const int to[3] = {at[0] + u, at[1] + v, at[2] + w};
                    int image[3], index[3];
                    for (int k = 0; k < 3; ++k)
                        image[k] = floor_divide(to[k], cells.n[k]), index[k] = to[k] - image[k] * cells.n[k];
                    if (!periodic && (image[0] || image[1] || image[2])) continue;
                    const int other = (index[0] * cells.n[1] + index[1]) * cells.n[2] + index[2];
                    pairs_of(cells, i, cells.start[other], cells.start[other + 1], image, lattice, periodic,
                             short_square, long_square, out);
                }
    }
}

template <class T>
static inline void append(std::vector<T>& to, const std::vector<T>& from) {
    to.insert(to.end(), from.begin(), from.end());
}

// Both lists of all structures; a reach of 0 leaves the list as it is. Returns the smallest distance, and its pair.
inline double Engine::search(const double* positions, const double* cell, double short_reach, double long_reach,
                             int n_threads, int64_t* closest_pair) {
    first.clear(), second.clear(), shift.clear();
    if (long_reach > 0) long_first.clear(), long_second.clear(), long_shift.clear();
    double closest = INFINITY;
    for (int s = 0; s < n_structures; ++s) {
        const int begin = structure_start[s], end = structure_start[s + 1];
        double low[3] = {}, lattice[9] = {}, reach = std::max(short_reach, long_reach);
        if (cell) {
            std::copy(cell + 9 * s, cell + 9 * (s + 1), lattice);
        } else {
            for (int d = 0; d < 3; ++d) {
                double high = -INFINITY;
                low[d] = INFINITY;
                for (int i = begin; i < end; ++i) {
                    low[d] = std::min(low[d], positions[3 * i + d]), high = std::max(high, positions[3 * i + d]);
                }
                lattice[4 * d] = std::max(high - low[d], 1.0) * 1.0001;
            }
            reach = std::min(reach, 2 * (lattice[0] + lattice[4] + lattice[8]));
        }
        Cells cells;
        fill_cells(cells, positions, begin, end, lattice, low, cell != nullptr, reach);
        const int n_cells = static_cast<int>(cells.start.size()) - 1;
        std::vector<Found> found(n_cells);
        for_each(n_threads, n_cells, [&](int, int k) {
            pairs_of_cell(cells, k, lattice, cell != nullptr, short_reach * short_reach, long_reach * long_reach,
                          found[k]);
        });
        for (const Found& f : found) {
            append(first, f.first), append(second, f.second), append(shift, f.shift);
            append(long_first, f.long_first), append(long_second, f.long_second), append(long_shift, f.long_shift);
            if (f.closest < closest) closest = f.closest, closest_pair[0] = f.pair[0], closest_pair[1] = f.pair[1];
        }
    }
    return std::sqrt(closest);
}
