// Vectors of several widths, for what does not fill whole ones.
#pragma once

#include "layer.h"

namespace {

template <int W>
struct Lanes {
    typedef float type __attribute__((vector_size(4 * W)));
};

template <int W>
inline typename Lanes<W>::type load(const float *from) {
    typename Lanes<W>::type value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// run(vectors of how many, the first's place) for `count` floats: as wide ones as there are, then narrower ones.
template <int W = LANES, typename Run>
inline void each_vector(int count, Run run, int place = 0) {
    for (; count - place >= W; place += W) run(Int<W>{}, place);
    if constexpr (W > 1) each_vector<W / 2>(count, run, place);
}

}  // namespace
