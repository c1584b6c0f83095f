// A convolution of active channels, as all ways to carry it out see it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24;  // floats in a vector; vectors of sums that fit in registers
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 12;
#else
constexpr int LANES = 4, SUMS = 12;
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float four __attribute__((vector_size(16), aligned(4)));

template <int N>
using Int = std::integral_constant<int, N>;

// Keeps a vector in a register: compilers load it again for each of several products, and loads are what there are most of.
inline void hold(vec &x) {
#if defined(__AVX512VL__) || defined(__AVX__) && !defined(__AVX512F__)
    asm("" : "+v"(x));
#endif
}

enum Algorithm { PIXELS, TILES, STRIPS };

struct Shape {
    int32_t channels, height, width, kernels, kernel_height, kernel_width, stride, pad, out_height, out_width;
    int32_t algorithm;  // which the weights are laid out for
    int32_t taps() const { return kernel_height * kernel_width; }
    int32_t pixels() const { return out_height * out_width; }
    // Of padded rows and columns, what taps with the same remainder by stride read lies together, in a phase.
    int32_t line() const { return (width + 2 * pad + stride - 1) / stride; }
    int32_t lines() const { return (height + 2 * pad + stride - 1) / stride; }
    int32_t phases() const { return std::min(stride, std::max(kernel_height, kernel_width)); }
    int64_t plane() const { return (int64_t)phases() * phases() * lines() * line(); }
    int32_t tap(int t) const {
        const int r = t / kernel_width, c = t % kernel_width;
        return ((r % stride * phases() + c % stride) * lines() + r / stride) * line() + c / stride;
    }
};

struct Layer {
    Shape shape;
    const float *weight, *bias;  // LANES floats may be read behind the weight
    const float *residual;       // of the output's shape, or null
    const float *gate;           // of each output of each sample
    float *y;
    bool relu;
};

struct List {
    const int32_t *channel;
    int count;
    const int32_t *place = nullptr;  // of each among the inputs that are laid out; null where those are the same
    int64_t at(int i) const { return place ? place[i] : i; }
};

// Of all samples; a row's first entries are valid.
struct Lists {
    const int32_t *channel, *count;
    int channels;
    List of(int64_t sample) const { return {channel + sample * channels, count[sample]}; }
};

// Outputs that read the same inputs, the same of all samples; those of one follow those of another.
struct Blocks {
    const int32_t *in, *in_begin, *out, *out_begin, *number;  // 0, 1, 2 …
    int count;
    // All inputs are laid out; of the weight, which is read in order, those of a block come first in each row.
    List reads(int i) const { return {number, in_begin[i + 1] - in_begin[i], in + in_begin[i]}; }
    List writes(int i) const { return {out + out_begin[i], out_begin[i + 1] - out_begin[i]}; }
};

struct Samples {
    int64_t first, step;
    int count;
    int64_t at(int i) const { return first + i * step; }
};

struct Part {  // of the active outputs, for one thread
    int begin, end;
};

// Threads that share the work on a sample.
struct Team {
    int me, threads;
    Part share(int count) const {
        return {(int)((int64_t)count * me / threads), (int)((int64_t)count * (me + 1) / threads)};
    }
    void wait() const {
        if (threads > 1) {
#pragma omp barrier
        }
    }
};

// Some outputs: the residual and the ReLU, which leaves NaN as it is. A template forgets that vectors may lie anywhere.
template <typename V>
inline void put(const Layer &layer, int64_t place, V value) {
    if (layer.residual) {
        V residual;
        std::memcpy(&residual, layer.residual + place, sizeof(V));
        value += residual;
    }
    if (layer.relu) value = value < 0 ? V{} : value;
    std::memcpy(layer.y + place, &value, sizeof(V));
}

// Outputs in blocks of NO at most, and all of about one size, as small ones are slow: run(their number, the first).
template <int NO, typename Run>
void blocks(Part part, Run run) {
    auto one = [&](auto self, auto most, int size) -> void {
        constexpr int MOST = decltype(most)::value;
        if (size == MOST) run(most, part.begin);
        else if constexpr (MOST > 1) self(self, Int<MOST - 1>{}, size);
    };
    for (int left = (part.end - part.begin + NO - 1) / NO; left > 0; left--) {
        const int size = (part.end - part.begin + left - 1) / left;
        one(one, Int<NO>{}, size);
        part.begin += size;
    }
}

}  // namespace
