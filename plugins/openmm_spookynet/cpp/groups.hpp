// Work on rows in groups, which threads share; no number depends on how many there are.
#pragma once
#include <algorithm>
#include <cmath>
#include "pool.hpp"
#include "vectors.hpp"

struct Groups {
    int threads;
    std::vector<Arena>& scratch;  // of each thread

    // work(from, to, scratch) for groups of n rows
    template <class Work>
    void each(int n, Work&& work) const {
        // two groups for each thread, in whole blocks of `product`
        const int size = threads <= 1 ? std::max(n, 1) : 6 * ((n + 12 * threads - 1) / (12 * threads));
        for_each(threads, (n + size - 1) / size, [&](int thread, int group) {
            work(group * size, std::min(n, (group + 1) * size), scratch[thread]);
        });
    }
};
