// Any convolution, pixel by pixel.
//
// The active inputs are padded once, and split by stride, so that what a tap reads for the next pixel is the next
// float. Vectors then run along the pixels of an output, in place, a block of outputs at a time staying in registers.
// Where rows are so short that vectors would mostly run over padding, they run along columns (im2col) instead.
#pragma once

#include "layer.h"

namespace {

constexpr int WIDE = SUMS == 24 ? 4 : 2, TILE = WIDE * LANES;  // pixels
constexpr int TAPS = 121;                                      // kernels of 11×11 at most
constexpr double WASTE = 1.2;                                  // vectors in place for one in columns

void pad(const Shape &s, const float *x, List in, Part part, float *to) {
    to += part.begin * s.plane();
    std::memset(to, 0, sizeof(float) * (part.end - part.begin) * s.plane());
    for (int a = part.begin; a < part.end; a++)
        for (int r = 0; r < s.phases(); r++)
            for (int c = 0; c < s.phases(); c++, to += (int64_t)s.lines() * s.line()) {
                // The first row and column of the phase that are not padding.
                const int y = (s.pad - r + s.stride - 1) / s.stride, x0 = (s.pad - c + s.stride - 1) / s.stride;
                const int top = y * s.stride + r - s.pad, left = x0 * s.stride + c - s.pad;
                const float *from = x + ((int64_t)in.channel[a] * s.height + top) * s.width + left;
                const int count = (s.width - left + s.stride - 1) / s.stride;
                float *row = to + y * s.line() + x0;
                for (int i = top; i < s.height; i += s.stride, from += s.stride * s.width, row += s.line())
                    if (s.stride == 1) std::memcpy(row, from, sizeof(float) * s.width);
                    else if (s.stride == 2)  // a compiler sees which vectors take every other float
                        for (int j = 0; j < count; j++) row[j] = from[j * 2];
                    else
                        for (int j = 0; j < count; j++) row[j] = from[j * s.stride];
            }
}

// The pixels from:to of what each tap reads, [inputs][taps][wide]. WIDTH: of an output row, where known.
template <int WIDTH>
void columns(const Shape &s, const int32_t *tap, const float *padded, Part part, int from, int to, int wide,
             float *column) {
    const int width = WIDTH ? WIDTH : s.out_width;
    padded += part.begin * s.plane();
    column += (int64_t)part.begin * s.taps() * wide;
    for (int a = part.begin; a < part.end; a++, padded += s.plane())
        for (int t = 0; t < s.taps(); t++, column += wide)
            for (int p = from, y = from / width, x = from % width; p < to; y++, x = 0) {
                const float *row = padded + tap[t] + y * s.line() + x;
                const int run = std::min(width - x, to - p);
                if (WIDTH && run == WIDTH) std::memcpy(column + (p - from), row, sizeof(float) * WIDTH);
                else std::copy(row, row + run, column + (p - from));
                p += run;
            }
}

// Lanes of a tile that are pixels, side by side.
struct Run {
    int32_t lane, pixel, count;
};

// Vector v of tap t of the a-th active input is at data + a·plane + tap[t] + vector[v].
struct Source {
    const float *data;
    int64_t plane;
    int32_t tap[TAPS], vector[WIDE], runs;
    Run run[TILE];

    // Vector v is read in place, from row y, column x.
    void in_place(const Shape &s, int v, int y, int x) {
        vector[v] = y * s.line() + x;
        for (int lane = 0; lane < LANES && y < s.out_height; lane += s.line() - x, x = 0, y++)
            if (x < s.out_width)
                run[runs++] = {v * LANES + lane, y * s.out_width + x, std::min(s.out_width - x, LANES - lane)};
    }
};

// Vectors are written over the end of a run where more pixels follow: those are written later.
inline void store(const Layer &layer, int64_t map, const Source &source, const float *sums) {
    const int pixels = layer.shape.pixels();
    for (int r = 0; r < source.runs; r++) {
        const Run &run = source.run[r];
        if (run.pixel + LANES <= pixels) put(layer, map + run.pixel, *(const vec *)(sums + run.lane));
        else
            for (int j = 0; j < run.count; j++) put(layer, map + run.pixel + j, sums[run.lane + j]);
    }
}

// NO outputs at NV vectors.
template <int NV, int NO>
void block(const Layer &layer, List in, const int32_t *out, const Source &source, int64_t sample) {
    const Shape &s = layer.shape;
    const int taps = s.taps();
    const float *weight[NO];
    vec sum[NO][NV];
    for (int o = 0; o < NO; o++) {
        weight[o] = layer.weight + (int64_t)out[o] * s.channels * taps;
        for (int v = 0; v < NV; v++) sum[o][v] = vec{} + layer.bias[out[o]];
    }
    for (int a = 0; a < in.count; a++) {
        const int64_t at = (int64_t)in.channel[a] * taps;
        const float *plane = source.data + in.at(a) * source.plane;
        for (int t = 0; t < taps; t++) {
            vec x[NV];
            for (int v = 0; v < NV; v++) hold(x[v] = *(const vec *)(plane + source.tap[t] + source.vector[v]));
            for (int o = 0; o < NO; o++)
                for (int v = 0; v < NV; v++) sum[o][v] += weight[o][at + t] * x[v];
        }
    }
    for (int o = 0; o < NO; o++) {
        const int64_t output = sample * s.kernels + out[o];
        float sums[(NV + 1) * LANES];
        for (int v = 0; v < NV; v++) *(vec *)(sums + v * LANES) = sum[o][v] * layer.gate[output];
        store(layer, output * s.pixels(), source, sums);
    }
}

void tile(const Layer &layer, List in, List out, Part part, const Source &source, int64_t sample, int vectors) {
    auto run = [&](auto count, auto most) {
        blocks<most>(part, [&](auto size, int from) {
            block<count, size>(layer, in, out.channel + from, source, sample);
        });
    };
    if (vectors == 1) run(Int<1>{}, Int<SUMS == 24 ? 16 : 8>{});
    else if (vectors == 2) run(Int<2>{}, Int<SUMS / 2>{});
    else if constexpr (WIDE == 4) vectors == 3 ? run(Int<3>{}, Int<SUMS / 3>{}) : run(Int<4>{}, Int<SUMS / 4>{});
}

int vectors(int places) { return (places + LANES - 1) / LANES; }

void by_pixels(const Layer &layer, Team team, const float *x, List in, List out, const Blocks *sparse, int64_t sample,
               float *work) {
    const Shape &s = layer.shape;
    const Part mine = team.share(in.count), outputs = team.share(out.count);
    float *padded = work, *column = work + in.count * s.plane();
    pad(s, x, in, mine, padded);
    team.wait();
    // In place, vectors begin anew in each row or run on over the padding, whichever takes fewer.
    const int row = vectors(s.out_width), over = vectors(s.line() * (s.out_height - 1) + s.out_width);
    const bool anew = row * s.out_height <= over;
    const int in_place = anew ? row * s.out_height : over, dense = vectors(s.pixels());
    const bool columned = in_place > WASTE * dense;
    const int all = columned ? dense : in_place;
    Source source;
    int32_t tap[TAPS];
    for (int t = 0; t < s.taps(); t++) source.tap[t] = tap[t] = s.tap(t);
    for (int from = 0; from < all; from += WIDE) {
        const int count = std::min(all - from, WIDE), wide = count * LANES;
        source.data = columned ? column : padded;
        source.plane = columned ? (int64_t)s.taps() * wide : s.plane();
        source.runs = 0;
        for (int v = 0; v < count; v++) {
            const int at = (from + v) * LANES;
            if (columned) {
                source.vector[v] = v * LANES;
                source.run[source.runs++] = {v * LANES, at, std::min(s.pixels() - at, LANES)};
            } else if (anew) source.in_place(s, v, (from + v) / row, (from + v) % row * LANES);
            else source.in_place(s, v, at / s.line(), at % s.line());
        }
        if (columned) {
            auto lay = s.out_width == 8 ? columns<8> : s.out_width == 4 ? columns<4> : columns<0>;
            lay(s, tap, padded, mine, from * LANES, std::min((from + count) * LANES, s.pixels()), wide, column);
            for (int t = 0; t < s.taps(); t++) source.tap[t] = t * wide;
            team.wait();
        }
        if (!sparse) tile(layer, in, out, outputs, source, sample, count);
        for (int i = team.me; sparse && i < sparse->count; i += team.threads) {
            const List writes = sparse->writes(i);
            tile(layer, sparse->reads(i), writes, {0, writes.count}, source, sample, count);
        }
        if (columned) team.wait();
    }
}

// Floats of work that a thread needs.
int64_t work_by_pixels(const Shape &s) { return s.channels * (s.plane() + (int64_t)s.taps() * TILE) + TILE; }

}  // namespace
