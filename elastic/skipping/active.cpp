// Layers of which only some input and output channels exist; see active.py.
//
// Tensors are fp32, NCHW, contiguous and of full size; lists name the active channels, so nothing is gathered.
// The active inputs are padded once, and split by stride, so that what a tap reads for the next pixel is the next
// float. Vectors then run along the pixels of an output, in place, a block of outputs at a time staying in registers.
// Where rows are so short that vectors would mostly run over padding, they run along columns (im2col) instead. Kernels of
// 3×3 are carried out on tiles, in fewer products, where there are channels enough: vectors run along a tile's places.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, SUMS = 24;  // floats in a vector; vectors of sums that fit in registers
#elif defined(__AVX__)
constexpr int LANES = 8, SUMS = 12;
#else
constexpr int LANES = 4, SUMS = 12;
#endif
constexpr int WIDE = SUMS == 24 ? 4 : 2, TILE = WIDE * LANES;  // pixels
constexpr int PLACES = 16, AT = SUMS == 24 ? 4 : 2;            // of a tile; tiles that share the load of a weight
constexpr int STRIP = 64, RANGE = 32, AT_ONCE = 8;             // tiles, kernels and samples that stay in the cache
constexpr int TAPS = 121;                                      // kernels of 11×11 at most
constexpr double WASTE = 1.2;                                  // vectors in place for one in columns

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

struct Shape {
    int32_t channels, height, width, kernels, kernel_height, kernel_width, stride, pad, out_height, out_width;
    int32_t tiled;  // weights are those of tiles
    int32_t taps() const { return kernel_height * kernel_width; }
    int32_t pixels() const { return out_height * out_width; }
    // Of padded rows and columns, what taps with the same remainder by stride read lies together, in a phase.
    int32_t line() const { return (width + 2 * pad + stride - 1) / stride; }
    int32_t lines() const { return (height + 2 * pad + stride - 1) / stride; }
    int32_t phases() const { return std::min(stride, std::max(kernel_height, kernel_width)); }
    int64_t plane() const { return (int64_t)phases() * phases() * lines() * line(); }
    int32_t across() const { return (out_width + 1) / 2; }  // tiles
    int32_t down() const { return (out_height + 1) / 2; }
    int32_t strip() const { return std::min(down(), std::max(1, STRIP / across())); }  // rows of tiles at once
    int32_t wide() const { return 2 * across() + 2; }                                  // what they read, with padding
    int32_t scratch() const { return (2 * strip() + 2) * wide(); }
    int32_t at_once() const {  // samples
        const int tiles = strip() * across();
        return tiled && strip() == down() ? std::max(1, std::min(AT_ONCE, STRIP / 2 / tiles)) : 1;
    }
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
};

// Of all samples; a row's first entries are valid.
struct Lists {
    const int32_t *channel, *count;
    int channels;
    List of(int64_t sample) const { return {channel + sample * channels, count[sample]}; }
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
    const float *residual = layer.residual ? layer.residual + map : nullptr;
    float *y = layer.y + map;
    const int pixels = layer.shape.pixels();
    for (int r = 0; r < source.runs; r++) {
        const Run &run = source.run[r];
        if (run.pixel + LANES <= pixels) {
            vec sum = *(const vec *)(sums + run.lane);
            if (residual) sum += *(const vec *)(residual + run.pixel);
            if (layer.relu) sum = sum < 0 ? vec{} : sum;  // NaN stays
            *(vec *)(y + run.pixel) = sum;
        } else
            for (int j = 0; j < run.count; j++) {
                const float sum = sums[run.lane + j] + (residual ? residual[run.pixel + j] : 0);
                y[run.pixel + j] = layer.relu && sum < 0 ? 0 : sum;
            }
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
        const float *plane = source.data + a * source.plane;
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

void by_pixels(const Layer &layer, Team team, const float *x, List in, List out, int64_t sample, float *work) {
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
        tile(layer, in, out, outputs, source, sample, count);
        if (columned) team.wait();
    }
}

// Bᵀ d B of some rows of tiles of one map, [tiles][PLACES]. `padded` is zero wherever there is padding.
void see(const Shape &s, const float *map, int top, int rows, float *padded, float *to) {
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

inline void put(const Layer &layer, int64_t place, four value) {
    if (layer.residual) value += *(const four *)(layer.residual + place);
    if (layer.relu) value = value < 0 ? four{} : value;  // NaN stays
    *(four *)(layer.y + place) = value;
}

inline void put(const Layer &layer, int64_t place, float value) {
    if (layer.residual) value += layer.residual[place];
    layer.y[place] = layer.relu && value < 0 ? 0 : value;
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
    const Shape &s = layer.shape;
    const float *weight[NO];
    vec sum[NO][NT][NV] = {};
    for (int o = 0; o < NO; o++) {
        weight[o] = layer.weight + (int64_t)out[o] * s.channels * PLACES;
        for (int t = 0; t < NT; t++) sum[o][t][5 / LANES][5 % LANES] = layer.bias[out[o]];  // adds it to each pixel
    }
    for (int a = 0; a < in.count; a++, seen += (int64_t)tiles * PLACES)
        for (int v = 0; v < NV; v++) {
            const int64_t at = in.channel[a] * PLACES + v * LANES;
            vec x[NT];
            for (int t = 0; t < NT; t++) hold(x[t] = *(const vec *)(seen + t * PLACES + v * LANES));
            for (int o = 0; o < NO; o++) {
                vec w = *(const vec *)(weight[o] + at);
                hold(w);
                for (int t = 0; t < NT; t++) sum[o][t][v] += w * x[t];
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

// Winograd's F(2×2, 3×3), Lavin & Gray, arXiv 1509.09308: 16 products for 2×2 pixels instead of 36. Of some samples, a few
// kernels at a time, whose weights stay in the cache from sample to sample.
void by_tiles(const Layer &layer, Team team, const float *x, Lists in, Lists out, Samples samples, float *scratch,
              float *work) {
    const Shape &s = layer.shape;
    for (int top = 0; top < s.down(); top += s.strip()) {
        const int rows = std::min(s.strip(), s.down() - top), tiles = rows * s.across();
        const int64_t size = (int64_t)s.channels * tiles * PLACES;
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
        for (int from = team.me * range; from < s.kernels; from += team.threads * range)
            for (int i = 0; i < samples.count; i++) {
                const int64_t b = samples.at(i);
                const List reads = in.of(b), writes = out.of(b);
                const int32_t *all = writes.channel, *end = all + writes.count;
                const Part mine{(int)(std::lower_bound(all, end, from) - all),
                                (int)(std::lower_bound(all, end, from + range) - all)};
                auto run = [&](auto count, auto most, int t) {
                    blocks<most>(mine, [&](auto number, int o) {
                        const float *seen = work + i * size + t * PLACES;
                        products<count, number>(layer, reads, all + o, seen, tiles, top * s.across() + t, b);
                    });
                };
                int t = 0;
                for (; t + AT <= tiles; t += AT) run(Int<AT>{}, Int<SUMS * LANES / PLACES / AT>{}, t);
                for (; t < tiles; t++) run(Int<1>{}, Int<8>{}, t);
            }
        team.wait();
    }
}

// y is left as it is where an output is not active; zeros there where asked for.
void clear(float *y, int64_t pixels, int channels, List out) {
    for (int c = 0, k = 0; c < channels; c++)
        if (k < out.count && out.channel[k] == c) k++;
        else std::memset(y + c * pixels, 0, sizeof(float) * pixels);
}

// Floats of work that a thread needs.
int64_t need(const Shape &s) {
    if (s.tiled) return s.scratch() + (int64_t)s.at_once() * s.channels * s.strip() * s.across() * PLACES;
    return s.channels * (s.plane() + (int64_t)s.taps() * TILE) + TILE;
}

// Lists are ascending, (batch, channels) with a row's first `count` entries valid.
void convolution(const Shape *shape, const float *weight, const float *bias, const float *x, const float *residual,
                 float *y, int32_t batch, const int32_t *in, const int32_t *in_count, const int32_t *out,
                 const int32_t *out_count, const float *gate, int32_t relu, int32_t zeros, float *work,
                 int32_t threads) {
    const Shape &s = *shape;
    const Layer layer{s, weight, bias, residual, gate, y, relu != 0};
    const Lists reads{in, in_count, s.channels}, writes{out, out_count, s.kernels};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        // Each thread has samples of its own, or all share each sample where there are too few.
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
        const bool own = batch >= all;
        const Team team = own ? Team{0, 1} : Team{me, all};
        const int64_t first = own ? me : 0, step = own ? all : 1, most = s.at_once();
        float *scratch = work + me * need(s), *mine = own ? scratch : work;
        for (int64_t b = first; b < batch; b += most * step) {
            const Samples samples{b, step, (int)std::min(most, (batch - b + step - 1) / step)};
            if (s.tiled) by_tiles(layer, team, x, reads, writes, samples, scratch, mine + s.scratch());
            else by_pixels(layer, team, x + b * s.channels * s.height * s.width, reads.of(b), writes.of(b), b, mine);
            team.wait();
            for (int i = 0; zeros && team.me == 0 && i < samples.count; i++)
                clear(y + samples.at(i) * s.kernels * s.pixels(), s.pixels(), s.kernels, writes.of(samples.at(i)));
        }
    }
}

// The kernels that a module engages: those with a positive score, or the one with the highest. Gates are the scores,
// 1 at most and 1 for the highest, or just 1; those of other kernels are 0.
void engage(const float *x, int32_t batch, int32_t channels, int64_t pixels, const int32_t *in,
            const int32_t *in_count, const float *weight, const float *bias, int32_t kernels, int32_t ramped,
            int32_t *out, int32_t *out_count, float *gate, float *means, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1)
    for (int64_t b = 0; b < batch; b++) {
        const List reads{in + b * channels, in_count[b]};
        float *mean = means + b * channels;
        std::memset(mean, 0, sizeof(float) * channels);
        for (int a = 0; a < reads.count; a++) {
            const float *plane = x + (b * channels + reads.channel[a]) * pixels;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t p = 0; p < pixels; p++) sum += plane[p];
            mean[reads.channel[a]] = sum / pixels;
        }
        int best = 0, count = 0;
        float highest = 0;
        for (int k = 0; k < kernels; k++) {
            float score = bias[k];
            const float *row = weight + (int64_t)k * channels;
#pragma omp simd reduction(+ : score)
            for (int c = 0; c < channels; c++) score += row[c] * mean[c];
            if (k == 0 || score > highest) highest = score, best = k;
            if (score > 0) out[b * kernels + count++] = k;
            gate[b * kernels + k] = score > 0 ? (ramped ? std::min(score, 1.0f) : 1.0f) : 0.0f;
        }
        if (count == 0) out[b * kernels + count++] = best;
        gate[b * kernels + best] = 1;
        out_count[b] = count;
    }
}

// Max pooling, without padding, of one map. SIZE and STRIDE: where known, so that pixels fill vectors.
template <int SIZE, int STRIDE>
void max_pool_map(const float *plane, float *out, int32_t width, int32_t size, int32_t stride, int32_t out_height,
                  int32_t out_width) {
    if (SIZE) size = SIZE, stride = STRIDE;
    for (int i = 0; i < out_height; i++, out += out_width) {
        const float *rows = plane + (int64_t)i * stride * width;
        for (int j = 0; j < out_width; j++) {
            float most = rows[j * stride];
            for (int r = 0; r < size; r++)
                for (int c = 0; c < size; c++) most = std::max(most, rows[r * width + j * stride + c]);
            out[j] = most;
        }
    }
}

// Of the active channels.
void max_pool(const float *x, float *y, int32_t batch, int32_t channels, int32_t height, int32_t width, int32_t size,
              int32_t stride, int32_t out_height, int32_t out_width, const int32_t *in, const int32_t *in_count,
              int32_t zeros, int32_t threads) {
    const int64_t from = (int64_t)height * width, to = (int64_t)out_height * out_width;
    const auto pool = size == 2 && stride == 2 ? max_pool_map<2, 2> : max_pool_map<0, 0>;
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1)
    for (int64_t b = 0; b < batch; b++) {
        const List reads{in + b * channels, in_count[b]};
        for (int a = 0; a < reads.count; a++) {
            const int64_t map = b * channels + reads.channel[a];
            pool(x + map * from, y + map * to, width, size, stride, out_height, out_width);
        }
        if (zeros) clear(y + b * channels * to, to, channels, reads);
    }
}

// Numbers and addresses, as what the function takes.
template <typename... T, std::size_t... I>
void call(void (*function)(T...), const int64_t *arguments, std::index_sequence<I...>) {
    function((T)arguments[I]...);
}

template <typename... T>
void call(void (*function)(T...), const int64_t *arguments) {
    call(function, arguments, std::index_sequence_for<T...>{});
}

}  // namespace

extern "C" {

// Floats of work that a convolution needs for each thread.
int64_t active_work(const Shape *s) { return need(*s); }

struct Step {
    int64_t function;  // 0 convolution, 1 engage, 2 max_pool
    int64_t arguments[16];
};

void active_run(const Step *steps, int32_t count) {
    for (const Step *step = steps; step < steps + count; step++) {
        const int64_t *a = step->arguments;
        if (step->function == 0) call(convolution, a);
        else if (step->function == 1) call(engage, a);
        else call(max_pool, a);
    }
}
}
