// Real spherical harmonics of degrees 1 to 4, orthonormal on the sphere, as polynomials of a unit vector.
#pragma once

#include "vectors.hpp"

constexpr int DEGREE[] = {DEGREES};
constexpr int N_DEGREES = sizeof(DEGREE) / sizeof(int);

constexpr int components_before(int d) {
    int n = 0;
    for (int i = 0; i < d; ++i) n += 2 * DEGREE[i] + 1;
    return n;
}
constexpr int COMPONENTS = components_before(N_DEGREES);
constexpr double PI = 3.14159265358979323846;

constexpr double root(double x) {
    double r = x > 1 ? x : 1;
    for (int i = 0; i < 60; ++i) r = 0.5 * (r + x / r);
    return r;
}

struct Factors {
    real value[N_DEGREES];
};
constexpr Factors factors_of_invariants() {
    Factors f{};
    for (int d = 0; d < N_DEGREES; ++d) f.value[d] = real(1 / root(2 * DEGREE[d] + 1));
    return f;
}
constexpr Factors INVARIANT = factors_of_invariants();  // I_l(v) = sum_m v_m^2 / sqrt(2l+1)

// factors of (2l+1) harmonics; those of equal |m| differ only in their polynomial
constexpr real N1 = root(3 / (4 * PI));
constexpr real N2A = 0.5 * root(15 / PI), N2B = 0.25 * root(5 / PI), N2C = 0.25 * root(15 / PI);
constexpr real N3A = 0.25 * root(35 / (2 * PI)), N3B = 0.5 * root(105 / PI), N3C = 0.25 * root(21 / (2 * PI)),
               N3D = 0.25 * root(7 / PI), N3E = 0.25 * root(105 / PI);
constexpr real N4A = 0.75 * root(35 / PI), N4B = 0.75 * root(35 / (2 * PI)), N4C = 0.75 * root(5 / PI),
               N4D = 0.75 * root(5 / (2 * PI)), N4E = 3.0 / 16 * root(1 / PI), N4F = 0.375 * root(5 / PI),
               N4G = 3.0 / 16 * root(35 / PI);

template <int L>
static inline void harmonics_of(vec x, vec y, vec z, vec* v) {
    vec xx = x * x, yy = y * y, zz = z * z;
    if constexpr (L == 1) {
        v[0] = N1 * y, v[1] = N1 * z, v[2] = N1 * x;
    } else if constexpr (L == 2) {
        v[0] = N2A * x * y, v[1] = N2A * y * z, v[2] = N2B * (3 * zz - 1), v[3] = N2A * x * z, v[4] = N2C * (xx - yy);
    } else if constexpr (L == 3) {
        v[0] = N3A * y * (3 * xx - yy), v[1] = N3B * x * y * z, v[2] = N3C * y * (5 * zz - 1);
        v[3] = N3D * z * (5 * zz - 3), v[4] = N3C * x * (5 * zz - 1), v[5] = N3E * z * (xx - yy);
        v[6] = N3A * x * (xx - 3 * yy);
    } else {
        v[0] = N4A * x * y * (xx - yy), v[1] = N4B * y * z * (3 * xx - yy), v[2] = N4C * x * y * (7 * zz - 1);
        v[3] = N4D * y * z * (7 * zz - 3), v[4] = N4E * (zz * (35 * zz - 30) + 3), v[5] = N4D * x * z * (7 * zz - 3);
        v[6] = N4F * (xx - yy) * (7 * zz - 1), v[7] = N4B * x * z * (xx - 3 * yy);
        v[8] = N4G * (xx * (xx - 3 * yy) - yy * (3 * xx - yy));
    }
}

// adds sum_m g_m dY_m/d(x, y, z) of the polynomials above; their radial parts mean nothing
template <int L>
static inline void gradient_of(vec x, vec y, vec z, const vec* g, vec& gx, vec& gy, vec& gz) {
    vec xx = x * x, yy = y * y, zz = z * z;
    if constexpr (L == 1) {
        gy += N1 * g[0], gz += N1 * g[1], gx += N1 * g[2];
    } else if constexpr (L == 2) {
        gx += N2A * (y * g[0] + z * g[3]) + 2 * N2C * x * g[4];
        gy += N2A * (x * g[0] + z * g[1]) - 2 * N2C * y * g[4];
        gz += N2A * (y * g[1] + x * g[3]) + 6 * N2B * z * g[2];
    } else if constexpr (L == 3) {
        vec s = 5 * zz - 1, d = xx - yy;
        gx += 6 * N3A * x * y * g[0] + N3B * y * z * g[1] + N3C * s * g[4] + 2 * N3E * x * z * g[5] +
              3 * N3A * d * g[6];
        gy += 3 * N3A * d * g[0] + N3B * x * z * g[1] + N3C * s * g[2] - 2 * N3E * y * z * g[5] -
              6 * N3A * x * y * g[6];
        gz += N3B * x * y * g[1] + 10 * N3C * z * (y * g[2] + x * g[4]) + N3D * (15 * zz - 3) * g[3] + N3E * d * g[5];
    } else {
        vec s = 7 * zz - 1, t = 7 * zz - 3, d = xx - yy;
        gx += N4A * y * (3 * xx - yy) * g[0] + 6 * N4B * x * y * z * g[1] + N4C * y * s * g[2] + N4D * z * t * g[5] +
              2 * N4F * x * s * g[6] + 3 * N4B * z * d * g[7] + 4 * N4G * x * (xx - 3 * yy) * g[8];
        gy += N4A * x * (xx - 3 * yy) * g[0] + 3 * N4B * z * d * g[1] + N4C * x * s * g[2] + N4D * z * t * g[3] -
              2 * N4F * y * s * g[6] - 6 * N4B * x * y * z * g[7] - 4 * N4G * y * (3 * xx - yy) * g[8];
        gz += N4B * (y * (3 * xx - yy) * g[1] + x * (xx - 3 * yy) * g[7]) + 14 * N4C * x * y * z * g[2] +
              N4D * (21 * zz - 3) * (y * g[3] + x * g[5]) + N4E * z * (140 * zz - 60) * g[4] +
              14 * N4F * z * d * g[6];
    }
}

template <int D = 0>
static inline void harmonics(vec x, vec y, vec z, vec* v) {
    if constexpr (D < N_DEGREES) {
        harmonics_of<DEGREE[D]>(x, y, z, v + components_before(D));
        harmonics<D + 1>(x, y, z, v);
    }
}

template <int D = 0>
static inline void harmonics_gradient(vec x, vec y, vec z, const vec* g, vec& gx, vec& gy, vec& gz) {
    if constexpr (D < N_DEGREES) {
        gradient_of<DEGREE[D]>(x, y, z, g + components_before(D), gx, gy, gz);
        harmonics_gradient<D + 1>(x, y, z, g, gx, gy, gz);
    }
}
