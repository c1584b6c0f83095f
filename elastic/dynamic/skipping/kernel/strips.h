// Kernels of 3×3 with stride 1, by Winograd's F(2×2, 3×3), where maps have tiles enough to fill vectors.
//
// Vectors run along tiles, so that transforms take a few operations for many of them. Of a strip of tiles one row of
// places after another is seen and multiplied: what is read again and again stays in the nearest cache.
#pragma once

#include "widths.h"

namespace {

constexpr int NEAR = 64;            // vectors times channels, a row of whose places stays in the nearest cache
constexpr int ROW = 4 * LANES;      // places of a vector of tiles
constexpr int SUMS_OF = 8 * LANES;  // of a vector: two sums for each row of places

// Tiles of a map that are transformed at once, and the floats that belong to them.
struct Strip : Shape {
    int across, tiles, vectors, rows;  // of the map; of a strip
    int half;                          // of a padded row: even columns, and then the odd ones
    int64_t padded, seen, sums;        // of an input; of all inputs; of all outputs

    explicit Strip(const Shape &shape) : Shape(shape) {
        const int down = (out_height + 1) / 2;
        across = (out_width + 1) / 2, tiles = across * down, half = across + 1;
        vectors = std::min((tiles + LANES - 1) / LANES, std::max(2, NEAR / channels / 2 * 2));
        rows = std::min(down, (vectors * LANES - 2) / across + 2);
        padded = 4 * (rows + 1) * half;
        seen = (int64_t)channels * vectors * ROW, sums = (int64_t)kernels * vectors * SUMS_OF;
    }
    int64_t work() const { return channels * padded + seen + sums; }
};

// Lanes of a vector that are tiles side by side.
struct Stretch {
    int lane, row, column, tiles;
};

// Pixels of the output side by side, the first of a lane.
struct Pixels {
    int lane, row, place, count;
};

struct Vector {
    Stretch stretch[LANES];
    Pixels pixels[2 * LANES];
    int stretches, runs;

    void find(const Strip &s, int first, int end) {
        stretches = runs = 0;
        for (int t = first, size; t < std::min(end, first + LANES); t += size) {
            const int row = t / s.across, column = t % s.across, lane = t - first;
            size = std::min({s.across - column, first + LANES - t, end - t});
            stretch[stretches++] = {lane, row, column, size};
            const int count = std::min(2 * size, s.out_width - 2 * column);
            for (int r = 0; r < 2 && 2 * row + r < s.out_height; r++)
                pixels[runs++] = {lane, r, (2 * row + r) * s.out_width + 2 * column, count};
        }
    }
};

// The rows of one input that some rows of tiles read.
void pad_apart(const Strip &s, const float *map, int top, int rows, float *to) {
    float *one = to + s.pad % 2 * s.half + s.pad / 2, *other = to + (s.pad + 1) % 2 * s.half + (s.pad + 1) / 2;
    std::memset(to, 0, sizeof(float) * 4 * (rows + 1) * s.half);
    const int first = 2 * top - s.pad;
    for (int y = std::max(0, first); y < std::min(s.height, first + 2 * rows + 2); y++) {
        const float *row = map + (int64_t)y * s.width;
        const int at = (y - first) * 2 * s.half;
        each_vector(s.width / 2, [&](auto width, int i) {
            float even[width], odd[width];
            for (int j = 0; j < width; j++) even[j] = row[2 * (i + j)], odd[j] = row[2 * (i + j) + 1];
            std::memcpy(one + at + i, even, sizeof even);
            std::memcpy(other + at + i, odd, sizeof odd);
        });
        if (s.width % 2) one[at + s.width / 2] = row[s.width - 1];
    }
}

// Row `r` of Bᵀ d B of a vector of tiles, of some inputs, [inputs][4][LANES].
void see_vector(const Strip &s, const Vector &vector, const float *padded, Part part, int top, int r, float *seen) {
    constexpr int one[] = {0, 1, 2, 1}, other[] = {2, 2, 1, 3};
    for (int i = 0; i < vector.stretches; i++) {
        const Stretch &stretch = vector.stretch[i];
        each_vector(stretch.tiles, [&](auto width, int i) {
            typedef typename Lanes<width>::type V;
            const float *from = padded + part.begin * s.padded + 4 * s.half * (stretch.row - top) + stretch.column + i;
            const float *a = from + 2 * s.half * one[r], *b = from + 2 * s.half * other[r];
            float *to = seen + part.begin * ROW + stretch.lane + i;
            for (int n = part.begin; n < part.end; n++, a += s.padded, b += s.padded, to += ROW) {
                V d[4];
                for (int c = 0; c < 4; c++) {
                    const V x = load<width>(a + c % 2 * s.half + c / 2), y = load<width>(b + c % 2 * s.half + c / 2);
                    d[c] = r == 1 ? x + y : x - y;
                }
                const V row[] = {d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]};
                for (int c = 0; c < 4; c++) std::memcpy(to + c * LANES, row + c, sizeof(V));
            }
        });
    }
}

// NO outputs at NV vectors of tiles: row `r` of m A, [2][LANES].
template <int NV, int NO>
void multiply_row(const Layer &layer, const Strip &s, List in, const int32_t *out, const float *seen, int r,
                  float *sums) {
    const float *weight[NO];
    vec sum[NO][NV][4];
#pragma GCC unroll 6
    for (int o = 0; o < NO; o++) {
        weight[o] = layer.weight + ((int64_t)r * s.kernels + out[o]) * s.channels * 4;
#pragma GCC unroll 8
        for (int i = 0; i < NV * 4; i++) sum[o][i / 4][i % 4] = vec{};
    }
    for (int a = 0; a < in.count; a++) {
        const float *row = seen + in.at(a) * ROW;
        const int64_t at = (int64_t)in.channel[a] * 4;
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            vec x[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; v++) hold(x[v] = *(const vec *)(row + v * s.channels * ROW + p * LANES));
#pragma GCC unroll 6
            for (int o = 0; o < NO; o++) {
                vec w = weight[o][at + p] - vec{};
                hold(w);
#pragma GCC unroll 2
                for (int v = 0; v < NV; v++) sum[o][v][p] += w * x[v];
            }
        }
    }
#pragma GCC unroll 6
    for (int o = 0; o < NO; o++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) {
            const vec *m = sum[o][v];
            vec *to = (vec *)(sums + ((int64_t)out[o] * s.vectors + v) * SUMS_OF) + 2 * r;
            to[0] = m[0] + m[1] + m[2], to[1] = m[1] - m[2] - m[3];
        }
}

// Aᵀ m A of a vector of tiles of one output, from m A.
void show_vector(const Layer &layer, const Vector &vector, const float *sums, int64_t sample, int kernel) {
    const Shape &s = layer.shape;
    const int64_t map = sample * s.kernels + kernel;
    const float bias = layer.bias[kernel], gate = layer.gate[map];
    float pixels[2][2 * LANES];
    for (int c = 0; c < 2; c++) {
        const vec *m = (const vec *)sums + c;
        const vec upper = (m[0] + m[2] + m[4] + bias) * gate, lower = (m[2] - m[4] - m[6] + bias) * gate;
        for (int i = 0; i < LANES; i++) pixels[0][2 * i + c] = upper[i], pixels[1][2 * i + c] = lower[i];
    }
    for (const Pixels *run = vector.pixels; run < vector.pixels + vector.runs; run++)
        each_vector(run->count, [&](auto width, int i) {
            put(layer, map * s.pixels() + run->place + i, load<width>(pixels[run->row] + 2 * run->lane + i));
        });
}

// One sample; each thread has outputs of its own.
void by_strips(const Layer &layer, Team team, const float *x, List in, List out, const Blocks *sparse, int64_t sample,
               float *work) {
    const Strip s(layer.shape);
    float *const padded = work, *const seen = padded + s.channels * s.padded, *const sums = seen + s.seen;
    const Part inputs = team.share(in.count), outputs = team.share(out.count);
    auto each = [&](auto run) {
        if (!sparse) run(in, out, outputs);
        for (int i = team.me; sparse && i < sparse->count; i += team.threads) {
            const List writes = sparse->writes(i);
            run(sparse->reads(i), writes, Part{0, writes.count});
        }
    };
    for (int first = 0; first < s.tiles; first += s.vectors * LANES) {
        const int end = std::min(s.tiles, first + s.vectors * LANES), vectors = (end - first + LANES - 1) / LANES;
        const int top = first / s.across, rows = (end - 1) / s.across + 1 - top;
        Vector vector[NEAR];
        for (int v = 0; v < vectors; v++) vector[v].find(s, first + v * LANES, end);
        for (int a = inputs.begin; a < inputs.end; a++)
            pad_apart(s, x + (int64_t)in.channel[a] * s.height * s.width, top, rows, padded + a * s.padded);
        for (int r = 0; r < 4; r++) {
            team.wait();  // for those who still read the row before
            for (int v = 0; v < vectors; v++)
                see_vector(s, vector[v], padded, inputs, top, r, seen + v * s.channels * ROW);
            team.wait();
            for (int v = 0; v < vectors; v += 2) {
                auto run = [&](auto count) {
                    each([&](List reads, List writes, Part part) {
                        blocks<SUMS / 4 / count>(part, [&](auto number, int o) {
                            multiply_row<count, number>(layer, s, reads, writes.channel + o,
                                                        seen + v * s.channels * ROW, r, sums + v * SUMS_OF);
                        });
                    });
                };
                v + 1 < vectors ? run(Int<2>{}) : run(Int<1>{});
            }
        }
        each([&](List, List writes, Part part) {
            for (int o = part.begin; o < part.end; o++) {
                const int kernel = writes.channel[o];
                for (int v = 0; v < vectors; v++)
                    show_vector(layer, vector[v], sums + ((int64_t)kernel * s.vectors + v) * SUMS_OF, sample, kernel);
            }
        });
    }
}

}  // namespace
