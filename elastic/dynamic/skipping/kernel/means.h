// What is linear in the means of maps: which kernels a module engages, and classes.
#pragma once

#include <cmath>

#include "layer.h"

namespace {

inline float mean_of(const float *plane, int64_t pixels) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t p = 0; p < pixels; p++) sum += plane[p];
    return sum / pixels;
}

inline float dot(const float *a, const float *b, int64_t count, float sum) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

enum Gates { HARD, RAMP, SCALE };

// The gate of a kernel that has not the highest score. As torch has it, one that is not a number stays so where gates are
// computed with it: such a kernel counts as engaged, and all that it writes is not a number.
float gate_of(float score, int32_t gates) {
    if (std::isnan(score)) return gates == HARD ? 0.0f : score;
    if (score <= 0) return 0.0f;
    return gates == SCALE ? score + 0.5f : gates == RAMP ? std::min(score, 1.0f) : 1.0f;
}

// The kernels that a module engages: those with a positive score, or the one with the highest. Gates are the scores, 1
// at most and 1 for the highest (RAMP), or one half more, at least one half (SCALE), or just 1 (HARD); those of other
// kernels are 0. Means count as at least `within`, (2, channels), and at most its second row. The first score that is
// not a number is the highest.
void engage(const float *x, int32_t batch, int32_t channels, int64_t pixels, const int32_t *in,
            const int32_t *in_count, const float *weight, const float *bias, const float *within,
            int32_t kernels, int32_t gates, int32_t *out, int32_t *out_count, float *gate, float *means, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1)
    for (int64_t b = 0; b < batch; b++) {
        const List reads{in + b * channels, in_count[b]};
        float *mean = means + b * channels;
        std::memset(mean, 0, sizeof(float) * channels);
        for (int a = 0; a < reads.count; a++) {
            const int32_t c = reads.channel[a];
            mean[c] = mean_of(x + (b * channels + c) * pixels, pixels);
        }
        for (int c = 0; c < channels; c++)
            mean[c] = std::min(std::max(mean[c], within[c]), within[channels + c]);
        int best = 0, count = 0;
        float highest = -INFINITY;
        for (int k = 0; k < kernels; k++) {
            const float score = dot(weight + (int64_t)k * channels, mean, channels, bias[k]);
            if (score > highest || (std::isnan(score) && !std::isnan(highest))) highest = score, best = k;
            gate[b * kernels + k] = gate_of(score, gates);
        }
        gate[b * kernels + best] = gates == SCALE ? std::max(highest, 0.0f) + 0.5f : 1.0f;
        for (int k = 0; k < kernels; k++)
            if (gate[b * kernels + k] != 0) out[b * kernels + count++] = k;
        out_count[b] = count;
    }
}

// Of the means of all maps; `bias` may be null. A class's weights are read once for all samples.
void classify(const float *x, int32_t batch, int32_t channels, int64_t pixels, const float *weight, const float *bias,
              int32_t classes, float *y, float *means) {
    for (int64_t map = 0; map < (int64_t)batch * channels; map++) means[map] = mean_of(x + map * pixels, pixels);
    for (int64_t k = 0; k < classes; k++)
        for (int64_t b = 0; b < batch; b++)
            y[b * classes + k] = dot(weight + k * channels, means + b * channels, channels, bias ? bias[k] : 0.0f);
}

}  // namespace
