// Kernels of 3×3 with stride 1, by Winograd's F(2×2, 3×3): Lavin & Gray, arXiv 1509.09308, section 4.1.
//
// Four pixels take 16 products instead of 36. Vectors run along these places of a tile.
#pragma once

#include "layer.h"

namespace {

constexpr int PLACES = 16, AT = SUMS == 24 ? 4 : 2;  // of a tile; tiles that share the load of a weight
constexpr int STRIP = 64, RANGE = 32, AT_ONCE = 8;   // tiles, kernels and samples that stay in the cache

// The tiles of a map.
struct Tiles : Shape {
    explicit Tiles(const Shape &shape) : Shape(shape) {}
    int32_t across() const { return (out_width + 1) / 2; }  // tiles
    int32_t down() const { return (out_height + 1) / 2; }
    int32_t strip() const { return std::min(down(), std::max(1, STRIP / across())); }  // rows of tiles at once
    int32_t wide() const { return 2 * across() + 2; }                                  // what they read, with padding
    int32_t scratch() const { return (2 * strip() + 2) * wide(); }
    int32_t at_once() const {  // samples
        const int tiles = strip() * across();
        return strip() == down() ? std::max(1, std::min(AT_ONCE, STRIP / 2 / tiles)) : 1;
    }
};

// Bᵀ d B of some rows of tiles of one map, [tiles][PLACES]. `padded` is zero wherever there is padding.
void see(const Tiles &s, const float *map, int top, int rows, float *padded, float *to) {
    const int wide = s.wide(), first = 2 * top - s.pad;
    for (int y = std::max(0, first); y < std::min(s.height, first + 2 * rows + 2); y++)
        std::memcpy(padded + (y - first) * wide + s.pad, map + y * s.width, sizeof(float) * s.width);
    for (int i = 0; i < rows; i++, padded += 2 * wide)
        for (int j = 0; j < s.across(); j++, to += PLACES) {
            auto line = [&](int r) { return *(const four *)(padded + r * wide + 2 * j); };
            const four lines[] = {line(0) - line(2), line(1) + line(2), line(2) - line(1), line(1) - line(3)};
            for (int r = 0; r < 4; r++) {
                const four d = lines[r];
                *(four *)(to + 4 * r) = four{d[0], d[1], d[2], d[1]} + four{-1, 1, -1, -1} * four{d[2], d[2], d[1], d[3]};
            }
        }
}

// Aᵀ m A of two tiles, side by side, or of the left one: their pixels, or those that are within the map.
inline void show(const Layer &layer, const float *left, const float *right, bool two, int64_t map, int row,
                 int column) {
    const Shape &s = layer.shape;
    const four *l = (const four *)left, *r = (const four *)right;
    const four lines[][2] = {{l[0] + l[1] + l[2], r[0] + r[1] + r[2]}, {l[1] - l[2] - l[3], r[1] - r[2] - r[3]}};
    for (int i = 0; i < 2 && row + i < s.out_height; i++) {
        const four a = lines[i][0], b = lines[i][1], first = {a[0], a[1], b[0], b[1]};
        const four sum = first + four{1, -1, 1, -1} * (four{a[1], a[2], b[1], b[2]} + four{a[2], a[3], b[2], b[3]});
        const int64_t place = map * s.pixels() + (row + i) * s.out_width + column;
        if (two && column + 4 <= s.out_width) put(layer, place, sum);
        else
            for (int j = 0; j < (two ? 4 : 2) && column + j < s.out_width; j++) put(layer, place + j, sum[j]);
    }
}

// NO outputs at NT tiles, of which `seen` has the first; [inputs][tiles][PLACES].
template <int NT, int NO>
void products(const Layer &layer, List in, const int32_t *out, const float *seen, int tiles, int first, int64_t sample) {
    constexpr int NV = PLACES / LANES;
    const Tiles s(layer.shape);
    const float *weight[NO];
    vec sum[NO][NT][NV] = {};
    for (int o = 0; o < NO; o++) {
        weight[o] = layer.weight + (int64_t)out[o] * s.channels * PLACES;
        for (int t = 0; t < NT; t++) sum[o][t][5 / LANES][5 % LANES] = layer.bias[out[o]];  // adds it to each pixel
    }
    for (int a = 0; a < in.count; a++) {
        const float *tile = seen + in.at(a) * tiles * PLACES;
        for (int v = 0; v < NV; v++) {
            const int64_t at = in.channel[a] * PLACES + v * LANES;
            vec x[NT];
            for (int t = 0; t < NT; t++) hold(x[t] = *(const vec *)(tile + t * PLACES + v * LANES));
            for (int o = 0; o < NO; o++) {
                vec w = *(const vec *)(weight[o] + at);
                hold(w);
                for (int t = 0; t < NT; t++) sum[o][t][v] += w * x[t];
            }
        }
    }
    for (int t = 0; t < NT;) {
        const int row = (first + t) / s.across(), column = (first + t) % s.across();
        const bool two = t + 1 < NT && column + 1 < s.across();
        for (int o = 0; o < NO; o++) {
            const int64_t map = sample * s.kernels + out[o];
            float m[2][PLACES];
            for (int v = 0; v < NV; v++) {
                *(vec *)(m[0] + v * LANES) = sum[o][t][v] * layer.gate[map];
                *(vec *)(m[1] + v * LANES) = sum[o][t + two][v] * layer.gate[map];
            }
            show(layer, m[0], m[1], two, map, 2 * row, 2 * column);
        }
        t += 1 + two;
    }
}

// Some outputs at all tiles of a strip.
void multiply(const Layer &layer, List in, List out, Part part, const float *seen, int tiles, int first, int64_t sample) {
    auto run = [&](auto count, auto most, int t) {
        blocks<most>(part, [&](auto number, int o) {
            products<count, number>(layer, in, out.channel + o, seen + t * PLACES, tiles, first + t, sample);
        });
    };
    int t = 0;
    for (; t + AT <= tiles; t += AT) run(Int<AT>{}, Int<SUMS * LANES / PLACES / AT>{}, t);
    for (; t < tiles; t++) run(Int<1>{}, Int<8>{}, t);
}

// Of some samples, a few kernels at a time, whose weights stay in the cache from sample to sample.
void by_tiles(const Layer &layer, Team team, const float *x, Lists in, Lists out, const Blocks *sparse, Samples samples,
              float *scratch, float *work) {
    const Tiles s(layer.shape);
    for (int top = 0; top < s.down(); top += s.strip()) {
        const int rows = std::min(s.strip(), s.down() - top), tiles = rows * s.across();
        const int64_t size = (int64_t)s.channels * tiles * PLACES;
        if (top > 0) team.wait();  // for those who still read the strip before
        std::memset(scratch, 0, sizeof(float) * s.scratch());
        for (int i = 0; i < samples.count; i++) {
            const int64_t b = samples.at(i);
            const List reads = in.of(b);
            const Part mine = team.share(reads.count);
            for (int a = mine.begin; a < mine.end; a++) {
                const float *map = x + (b * s.channels + reads.channel[a]) * s.height * s.width;
                see(s, map, top, rows, scratch, work + i * size + (int64_t)a * tiles * PLACES);
            }
        }
        team.wait();
        const int range = std::min(RANGE, (s.kernels + team.threads - 1) / team.threads);
        for (int j = team.me; sparse && j < sparse->count; j += team.threads)
            for (int i = 0; i < samples.count; i++) {
                const List writes = sparse->writes(j);
                multiply(layer, sparse->reads(j), writes, {0, writes.count}, work + i * size, tiles, top * s.across(),
                         samples.at(i));
            }
        for (int from = team.me * range; !sparse && from < s.kernels; from += team.threads * range)
            for (int i = 0; i < samples.count; i++) {
                const int64_t b = samples.at(i);
                const List writes = out.of(b);
                const int32_t *all = writes.channel, *end = all + writes.count;
                const Part mine{(int)(std::lower_bound(all, end, from) - all),
                                (int)(std::lower_bound(all, end, from + range) - all)};
                multiply(layer, in.of(b), writes, mine, work + i * size, tiles, top * s.across(), b);
            }
    }
}

// Floats of work that a thread needs, of which the first are its scratch.
int64_t work_by_tiles(const Tiles &s) {
    return s.scratch() + (int64_t)s.at_once() * s.channels * s.strip() * s.across() * PLACES;
}

}  // namespace
