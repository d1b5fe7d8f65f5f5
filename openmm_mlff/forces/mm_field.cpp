// The electrostatics between the sites of an ML region and the charges around them (mm_field.py has the physics and the
// same in numpy). Lengths in angstrom; charges in e; potentials in units of e/angstrom, without Coulomb's constant.

#include <cmath>
#include <cstdint>

namespace {

constexpr int ORDER = 5;  // of the B-splines, OpenMM's

struct Kernel {
    double shift, square;  // g(r) = 1/r + square r^2 - shift: plain and reaction field
    double alpha;          // > 0: g(r) = erfc(alpha r)/r
};

struct Radial {
    double g, slope, bend;  // g, g'/r and (g'' - g'/r)/r^2
};

constexpr double TWO_BY_SQRT_PI = 1.12837916709551257390;

// a(x)/r with a = erfc or -erfc of scale*r, added to the derivatives
inline void add_erfc(Radial& f, double r, double scale, double sign) {
    const double x = scale * r, e = std::erfc(x) / r, gauss = TWO_BY_SQRT_PI * scale * std::exp(-x * x);
    const double inverse = 1.0 / (r * r);
    const double slope = -(e + gauss) * inverse;
    f.g += sign * e;
    f.slope += sign * slope;
    f.bend += sign * (-3.0 * slope + 2.0 * scale * scale * gauss) * inverse;
}

// damping > 0: 1/r becomes erf(r/damping)/r
inline Radial evaluate(const Kernel& k, double damping, double r2) {
    const double r = std::sqrt(r2);
    Radial f{0.0, 0.0, 0.0};
    if (k.alpha > 0.0) {
        add_erfc(f, r, k.alpha, 1.0);
    } else {
        const double inverse = 1.0 / r, cubed = inverse / r2;
        f.g = inverse + k.square * r2 - k.shift;
        f.slope = -cubed + 2.0 * k.square;
        f.bend = 3.0 * cubed / r2;
    }
    if (damping > 0.0) add_erfc(f, r, 1.0 / damping, -1.0);
    return f;
}

struct Box {
    const double* v;  // rows a, b, c, lower triangular as OpenMM's; null for none
    inline void nearest(double* d) const {
        if (!v) return;
        for (int axis = 2; axis >= 0; axis--) {
            const double n = std::rint(d[axis] / v[4 * axis]);
            for (int k = 0; k <= axis; k++) d[k] -= n * v[3 * axis + k];
        }
    }
};

// B-spline weights of one coordinate and their derivatives by the fractional grid coordinate
struct Spline {
    int64_t index[ORDER];
    double value[ORDER], slope[ORDER], bend[ORDER];
    void set(double fractional, int64_t n) {
        const double t = (fractional - std::floor(fractional)) * n;
        const double whole = std::floor(t), w = t - whole;
        const int64_t first = static_cast<int64_t>(whole);
        for (int k = 0; k < ORDER; k++) index[k] = first + k < n ? first + k : first + k - n;
        double m[ORDER] = {1.0 - w, w};  // order 2
        double lower[ORDER] = {}, lowest[ORDER] = {};
        for (int order = 3; order <= ORDER; order++) {
            for (int k = 0; k < ORDER; k++) lowest[k] = lower[k], lower[k] = m[k];
            const double scale = 1.0 / (order - 1);
            for (int k = order - 1; k >= 0; k--) {
                const double here = k < order - 1 ? m[k] : 0.0, before = k > 0 ? m[k - 1] : 0.0;
                m[k] = scale * ((w + order - 1 - k) * before + (1 - w + k) * here);
            }
        }
        for (int k = 0; k < ORDER; k++) {
            value[k] = m[k];
            slope[k] = (k > 0 ? lower[k - 1] : 0.0) - (k < ORDER - 1 ? lower[k] : 0.0);
            bend[k] = (k > 1 ? lowest[k - 2] : 0.0) - (k > 0 && k < ORDER - 1 ? 2.0 * lowest[k - 1] : 0.0) +
                      (k < ORDER - 2 ? lowest[k] : 0.0);
        }
    }
};

inline void splines(const double* r, const double* inverse, const int64_t* grid, Spline* s) {
    for (int axis = 0; axis < 3; axis++)
        s[axis].set(r[0] * inverse[axis] + r[1] * inverse[3 + axis] + r[2] * inverse[6 + axis], grid[axis]);
}

}  // namespace

extern "C" {

// Pairs of sites and sources within the cutoff (infinite: all). Returns their number; those beyond the capacity are
// counted, not written.
int64_t mm_pairs(int64_t n_sources, const int64_t* source, const double* positions, int64_t n_sites, const double* sites,
                 const double* box, double cutoff, int64_t capacity, int32_t* pair_site, int32_t* pair_source,
                 double* displacement) {
    const Box cell{box};
    double centre[3] = {}, radius = 0.0;
    for (int64_t i = 0; i < n_sites; i++)
        for (int k = 0; k < 3; k++) centre[k] += sites[3 * i + k] / n_sites;
    for (int64_t i = 0; i < n_sites; i++) {
        double r2 = 0.0;
        for (int k = 0; k < 3; k++) r2 += (sites[3 * i + k] - centre[k]) * (sites[3 * i + k] - centre[k]);
        radius = std::fmax(radius, std::sqrt(r2));
    }
    double reach = cutoff + radius;
    // the nearest image is the nearest in a skewed box only up to half its width
    if (box)
        for (int axis = 0; axis < 3; axis++)
            if (reach > 0.5 * box[4 * axis]) reach = INFINITY;
    int64_t n = 0;
    for (int64_t a = 0; a < n_sources; a++) {
        const double* r = positions + 3 * source[a];
        if (std::isfinite(reach)) {
            double d[3] = {centre[0] - r[0], centre[1] - r[1], centre[2] - r[2]};
            cell.nearest(d);
            if (d[0] * d[0] + d[1] * d[1] + d[2] * d[2] > reach * reach) continue;
        }
        for (int64_t i = 0; i < n_sites; i++) {
            double d[3] = {sites[3 * i] - r[0], sites[3 * i + 1] - r[1], sites[3 * i + 2] - r[2]};
            cell.nearest(d);
            if (!(d[0] * d[0] + d[1] * d[1] + d[2] * d[2] < cutoff * cutoff)) continue;
            if (n < capacity) {
                pair_site[n] = static_cast<int32_t>(i);
                pair_source[n] = static_cast<int32_t>(source[a]);
                for (int k = 0; k < 3; k++) displacement[3 * n + k] = d[k];
            }
            n++;
        }
    }
    return n;
}

// Adds to potential (n_sites) and gradient (n_sites, 3) what the pairs' sources make; keeps slope and bend of each pair.
void mm_direct(int64_t n, const int32_t* pair_site, const int32_t* pair_source, const double* displacement,
               const double* charges, const double* kernel, const double* damping, double* potential, double* gradient,
               double* slope, double* bend) {
    const Kernel k{kernel[0], kernel[1], kernel[2]};
    for (int64_t p = 0; p < n; p++) {
        const double* d = displacement + 3 * p;
        const int32_t i = pair_site[p];
        const Radial f = evaluate(k, damping[i], d[0] * d[0] + d[1] * d[1] + d[2] * d[2]);
        const double q = charges[pair_source[p]];
        potential[i] += q * f.g;
        slope[p] = q * f.slope;
        bend[p] = q * f.bend;
        for (int x = 0; x < 3; x++) gradient[3 * i + x] += slope[p] * d[x];
    }
}

// Adds the forces between sources and the charges and dipoles (null: none) of the sites; all in e^2/angstrom^2.
void mm_react(int64_t n, const int32_t* pair_site, const int32_t* pair_source, const double* displacement,
              const double* slope, const double* bend, const double* charges, const double* dipoles,
              double* site_forces, double* forces) {
    for (int64_t p = 0; p < n; p++) {
        const double* d = displacement + 3 * p;
        const int32_t i = pair_site[p], j = pair_source[p];
        double along = charges ? charges[i] * slope[p] : 0.0;
        double f[3] = {};
        if (dipoles) {
            const double* m = dipoles + 3 * i;
            along += bend[p] * (m[0] * d[0] + m[1] * d[1] + m[2] * d[2]);
            for (int x = 0; x < 3; x++) f[x] = slope[p] * m[x];
        }
        for (int x = 0; x < 3; x++) {
            const double force = -(along * d[x] + f[x]);
            site_forces[3 * i + x] += force;
            forces[3 * j + x] -= force;
        }
    }
}

// Spreads charges, and dipoles (null: none), on the grid; `which` (null: all) picks rows of positions and charges.
void mm_spread(int64_t n, const int64_t* which, const double* positions, const double* charges, const double* dipoles,
               const double* inverse, const int64_t* grid, double* values) {
    Spline s[3];
    for (int64_t a = 0; a < n; a++) {
        const int64_t j = which ? which[a] : a;
        splines(positions + 3 * j, inverse, grid, s);
        double m[3] = {};
        if (dipoles)
            for (int axis = 0; axis < 3; axis++)
                for (int x = 0; x < 3; x++) m[axis] += dipoles[3 * j + x] * inverse[3 * x + axis] * grid[axis];
        for (int u = 0; u < ORDER; u++) {
            const int64_t x = s[0].index[u];
            for (int v = 0; v < ORDER; v++) {
                double* row = values + (x * grid[1] + s[1].index[v]) * grid[2];
                double flat = charges[j] * s[0].value[u] * s[1].value[v], sloped = 0.0;
                if (dipoles) {
                    flat += m[0] * s[0].slope[u] * s[1].value[v] + m[1] * s[0].value[u] * s[1].slope[v];
                    sloped = m[2] * s[0].value[u] * s[1].value[v];
                }
                for (int w = 0; w < ORDER; w++)
                    row[s[2].index[w]] += flat * s[2].value[w] + sloped * s[2].slope[w];
            }
        }
    }
}

// Potential (null: not wanted), gradient (.., 3) and second derivatives (.., 3, 3; null: not wanted) of a grid potential.
void mm_gather(int64_t n, const int64_t* which, const double* positions, const double* inverse, const int64_t* grid,
               const double* values, double* potential, double* gradient, double* second) {
    Spline s[3];
    for (int64_t a = 0; a < n; a++) {
        const int64_t j = which ? which[a] : a;
        splines(positions + 3 * j, inverse, grid, s);
        double sum = 0.0, d[3] = {}, h[6] = {};
        for (int u = 0; u < ORDER; u++) {
            const int64_t x = s[0].index[u];
            for (int v = 0; v < ORDER; v++) {
                const double* row = values + (x * grid[1] + s[1].index[v]) * grid[2];
                double z0 = 0.0, z1 = 0.0, z2 = 0.0;
                for (int w = 0; w < ORDER; w++) {
                    const double value = row[s[2].index[w]];
                    z0 += value * s[2].value[w];
                    z1 += value * s[2].slope[w];
                    if (second) z2 += value * s[2].bend[w];
                }
                const double xy = s[0].value[u] * s[1].value[v];
                sum += xy * z0;
                d[0] += s[0].slope[u] * s[1].value[v] * z0;
                d[1] += s[0].value[u] * s[1].slope[v] * z0;
                d[2] += xy * z1;
                if (second) {
                    h[0] += s[0].bend[u] * s[1].value[v] * z0;
                    h[1] += s[0].slope[u] * s[1].slope[v] * z0;
                    h[2] += s[0].slope[u] * s[1].value[v] * z1;
                    h[3] += s[0].value[u] * s[1].bend[v] * z0;
                    h[4] += s[0].value[u] * s[1].slope[v] * z1;
                    h[5] += xy * z2;
                }
            }
        }
        if (potential) potential[a] = sum;
        // from fractional grid coordinates to angstrom: t_axis = grid_axis sum_x r_x inverse[x, axis]
        for (int x = 0; x < 3; x++) {
            gradient[3 * a + x] = 0.0;
            for (int axis = 0; axis < 3; axis++) gradient[3 * a + x] += d[axis] * grid[axis] * inverse[3 * x + axis];
        }
        if (!second) continue;
        const double full[3][3] = {{h[0], h[1], h[2]}, {h[1], h[3], h[4]}, {h[2], h[4], h[5]}};
        for (int x = 0; x < 3; x++)
            for (int y = 0; y < 3; y++) {
                double total = 0.0;
                for (int p = 0; p < 3; p++)
                    for (int q = 0; q < 3; q++)
                        total += full[p][q] * grid[p] * grid[q] * inverse[3 * x + p] * inverse[3 * y + q];
                second[9 * a + 3 * x + y] = total;
            }
    }
}

}  // extern "C"
