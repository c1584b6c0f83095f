// Layers of which only some input and output channels exist; see active.py.
//
// Tensors are fp32, NCHW, contiguous and of full size; lists name the active channels, so nothing is gathered.
// The active inputs are padded once. Vectors then run along the pixels of an output row, read in place where rows
// are long enough, else from columns (im2col); a block of outputs at a time stays in registers. Where an output has
// so few pixels that they do not fill a vector, vectors run along the kernel instead.

#include <algorithm>
#include <cstdint>
#include <cstring>
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
constexpr int FEW = 4;                                         // pixels of an output for which columns do not pay
constexpr int TAPS = 121;                                      // kernels of 11×11 at most

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

struct Shape {
    int32_t channels, height, width, kernels, kernel_height, kernel_width, stride, pad, out_height, out_width;
    int32_t taps() const { return kernel_height * kernel_width; }
    int32_t pixels() const { return out_height * out_width; }
    int32_t line() const { return width + 2 * pad; }
    int64_t plane() const { return (int64_t)(height + 2 * pad) * line(); }
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

struct Part {  // of the active outputs, for one thread
    int begin, end;
};

Part share(int count) {
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    return {(int)((int64_t)count * me / threads), (int)((int64_t)count * (me + 1) / threads)};
}

void pad(const Shape &s, const float *x, List in, Part part, float *to) {
    to += part.begin * s.plane();
    const int above = s.pad * s.line() + s.pad;
    for (int a = part.begin; a < part.end; a++) {
        const float *from = x + (int64_t)in.channel[a] * s.height * s.width;
        std::memset(to, 0, sizeof(float) * above);
        to += above;
        for (int y = 0; y < s.height; y++, from += s.width, to += s.line()) {
            std::memcpy(to, from, sizeof(float) * s.width);
            std::memset(to + s.width, 0, sizeof(float) * 2 * s.pad);
        }
        std::memset(to, 0, sizeof(float) * (s.pad * s.line() - s.pad));
        to += s.pad * s.line() - s.pad;
    }
}

// The pixels from:to of what each tap reads, [inputs][taps][wide]. WIDTH: of an output row, where known.
template <int WIDTH>
void columns(const Shape &s, const float *padded, Part part, int from, int to, int wide, float *column) {
    const int width = WIDTH ? WIDTH : s.out_width;
    padded += part.begin * s.plane();
    column += (int64_t)part.begin * s.taps() * wide;
    for (int a = part.begin; a < part.end; a++, padded += s.plane())
        for (int r = 0; r < s.kernel_height; r++)
            for (int c = 0; c < s.kernel_width; c++, column += wide)
                for (int p = from, y = from / width, x = from % width; p < to; y++, x = 0) {
                    const float *row = padded + (int64_t)(y * s.stride + r) * s.line() + x * s.stride + c;
                    const int run = std::min(width - x, to - p);
                    float *out = column + (p - from);
                    if (WIDTH && run == WIDTH && s.stride == 1)
                        std::memcpy(out, row, sizeof(float) * WIDTH);
                    else if (s.stride == 1)
                        for (int j = 0; j < run; j++) out[j] = row[j];
                    else
                        for (int j = 0; j < run; j++) out[j] = row[j * s.stride];
                    p += run;
                }
}

// Vector v of tap t of the a-th active input is at data + a·plane + tap[t] + vector[v].
struct Source {
    const float *data;
    int64_t plane;
    int32_t tap[TAPS], vector[WIDE];
};

inline void store(const Layer &layer, int64_t place, float value) {
    if (layer.residual) value += layer.residual[place];
    layer.y[place] = layer.relu && value < 0 ? 0 : value;
}

// NO outputs at NV vectors of pixels, the first of which is `place` in the sample's outputs.
template <int NV, int NO>
void block(const Layer &layer, List in, const int32_t *out, const Source &source, int64_t sample, int from, int to) {
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
            for (int v = 0; v < NV; v++) x[v] = *(const vec *)(plane + source.tap[t] + source.vector[v]);
            for (int o = 0; o < NO; o++)
                for (int v = 0; v < NV; v++) sum[o][v] += weight[o][at + t] * x[v];
        }
    }
    for (int o = 0; o < NO; o++) {
        const int64_t place = (sample * s.kernels + out[o]) * s.pixels() + from;
        float done[NV * LANES];
        for (int v = 0; v < NV; v++) sum[o][v] *= layer.gate[sample * s.kernels + out[o]];
        std::memcpy(done, sum[o], sizeof(done));
        for (int p = 0; p < to - from; p++) store(layer, place + p, done[p]);
    }
}

template <int NV, int NO>
void blocks(const Layer &layer, List in, List out, Part part, const Source &source, int64_t sample, int from, int to) {
    for (; part.begin + NO <= part.end; part.begin += NO)
        block<NV, NO>(layer, in, out.channel + part.begin, source, sample, from, to);
    if constexpr (NO > 1) {
        constexpr int LESS = NO > 8 ? 8 : NO > 4 ? 4 : NO - 1;
        blocks<NV, LESS>(layer, in, out, part, source, sample, from, to);
    }
}

void tile(const Layer &layer, List in, List out, Part part, const Source &source, int64_t sample, int from, int to) {
    auto run = [&](auto kernel) { kernel(layer, in, out, part, source, sample, from, to); };
    const int vectors = (to - from + LANES - 1) / LANES;
    if (vectors == 1) run(blocks<1, SUMS == 24 ? 16 : 8>);
    else if (vectors == 2) run(blocks<2, SUMS / 2>);
    else if (vectors == 3) run(blocks<3, SUMS / 3>);
    else run(blocks<4, SUMS / 4>);
}

void by_pixels(const Layer &layer, const float *x, List in, List out, int64_t sample, float *work) {
    const Shape &s = layer.shape;
    const Part mine = share(in.count), outputs = share(out.count);
    float *padded = work, *column = work + in.count * s.plane();
    const bool direct = s.stride == 1 && s.out_width % LANES == 0;
    pad(s, x, in, mine, padded);
#pragma omp barrier
    Source source;
    for (int from = 0; from < s.pixels(); from += TILE) {
        const int to = std::min(s.pixels(), from + TILE), wide = (to - from + LANES - 1) / LANES * LANES;
        source.data = direct ? padded : column;
        source.plane = direct ? s.plane() : (int64_t)s.taps() * wide;
        for (int t = 0; t < s.taps(); t++)
            source.tap[t] = direct ? t / s.kernel_width * s.line() + t % s.kernel_width : t * wide;
        for (int v = 0, p = from; v < WIDE; v++, p += LANES)
            source.vector[v] = direct ? p / s.out_width * s.line() + p % s.out_width : v * LANES;
        if (!direct) {
            auto lay = s.out_width == 8 ? columns<8> : s.out_width == 4 ? columns<4> : columns<0>;
            lay(s, padded, mine, from, to, wide, column);
#pragma omp barrier
        }
        tile(layer, in, out, outputs, source, sample, from, to);
        if (!direct) {
#pragma omp barrier
        }
    }
}

// NO outputs of PIXELS pixels; what each pixel sees of an input lies in one vector, [inputs][PIXELS][LANES].
template <int PIXELS, int NO>
void along_kernel(const Layer &layer, List in, List out, Part part, const float *seen, int64_t sample) {
    const Shape &s = layer.shape;
    for (; part.begin + NO <= part.end; part.begin += NO) {
        const float *weight[NO];
        vec sum[NO][PIXELS] = {};
        for (int o = 0; o < NO; o++)
            weight[o] = layer.weight + (int64_t)out.channel[part.begin + o] * s.channels * s.taps();
        const float *at = seen;
        for (int a = 0; a < in.count; a++, at += PIXELS * LANES)
            for (int o = 0; o < NO; o++) {
                const vec kernel = *(const vec *)(weight[o] + (int64_t)in.channel[a] * s.taps());
                for (int p = 0; p < PIXELS; p++) sum[o][p] += kernel * *(const vec *)(at + p * LANES);
            }
        for (int o = 0; o < NO; o++)
            for (int p = 0; p < PIXELS; p++) {
                const int channel = out.channel[part.begin + o];
                float total = layer.bias[channel];
                for (int j = 0; j < LANES; j++) total += sum[o][p][j];
                const int64_t output = sample * s.kernels + channel;
                store(layer, output * PIXELS + p, total * layer.gate[output]);
            }
    }
    if constexpr (NO > 1) along_kernel<PIXELS, 1>(layer, in, out, part, seen, sample);
}

void by_kernel(const Layer &layer, const float *x, List in, List out, int64_t sample, float *work) {
    const Shape &s = layer.shape;
    const Part mine = share(in.count);
    for (int a = mine.begin; a < mine.end; a++)
        for (int p = 0; p < FEW; p++) {
            float *seen = work + ((int64_t)a * FEW + p) * LANES;
            std::memset(seen, 0, sizeof(float) * LANES);
            for (int t = 0; t < s.taps(); t++) {
                const int y = p / s.out_width * s.stride + t / s.kernel_width - s.pad;
                const int c = p % s.out_width * s.stride + t % s.kernel_width - s.pad;
                if (y >= 0 && y < s.height && c >= 0 && c < s.width)
                    seen[t] = x[((int64_t)in.channel[a] * s.height + y) * s.width + c];
            }
        }
#pragma omp barrier
    along_kernel<FEW, 4>(layer, in, out, share(out.count), work, sample);
}

// y is left as it is where an output is not active; zeros there where asked for.
void clear(float *y, int64_t pixels, int channels, List out) {
    for (int c = 0, k = 0; c < channels; c++)
        if (k < out.count && out.channel[k] == c) k++;
        else std::memset(y + c * pixels, 0, sizeof(float) * pixels);
}

// Lists are ascending, (batch, channels) with a row's first `count` entries valid.
void convolution(const Shape *shape, const float *weight, const float *bias, const float *x, const float *residual,
                 float *y, int32_t batch, const int32_t *in, const int32_t *in_count, const int32_t *out,
                 const int32_t *out_count, const float *gate, int32_t relu, int32_t zeros, float *work,
                 int32_t threads) {
    const Shape &s = *shape;
    const Layer layer{s, weight, bias, residual, gate, y, relu != 0};
    const bool few = s.pixels() == FEW && s.taps() > 1 && s.taps() <= LANES;
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < batch; b++) {
        const float *sample = x + b * s.channels * s.height * s.width;
        const List reads{in + b * s.channels, in_count[b]}, writes{out + b * s.kernels, out_count[b]};
        (few ? by_kernel : by_pixels)(layer, sample, reads, writes, b, work);
#pragma omp barrier
        if (zeros && omp_get_thread_num() == 0) clear(y + b * s.kernels * s.pixels(), s.pixels(), s.kernels, writes);
    }
}

// The kernels that a module engages: those with a positive score, or the one with the highest. Gates are the scores,
// 1 at most and 1 for the highest, or just 1; those of other kernels are 0.
void engage(const float *x, int32_t batch, int32_t channels, int64_t pixels, const int32_t *in,
            const int32_t *in_count, const float *weight, const float *bias, int32_t kernels, int32_t ramped,
            int32_t *out, int32_t *out_count, float *gate, float *work) {
    for (int64_t b = 0; b < batch; b++) {
        const List reads{in + b * channels, in_count[b]};
        for (int a = 0; a < reads.count; a++) {
            const float *plane = x + (b * channels + reads.channel[a]) * pixels;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t p = 0; p < pixels; p++) sum += plane[p];
            work[a] = sum / pixels;
        }
        int best = 0, count = 0;
        float highest = 0;
        for (int k = 0; k < kernels; k++) {
            float score = bias[k];
            const float *row = weight + (int64_t)k * channels;
            for (int a = 0; a < reads.count; a++) score += row[reads.channel[a]] * work[a];
            if (k == 0 || score > highest) highest = score, best = k;
            if (score > 0) out[b * kernels + count++] = k;
            gate[b * kernels + k] = score > 0 ? (ramped ? std::min(score, 1.0f) : 1.0f) : 0.0f;
        }
        if (count == 0) out[b * kernels + count++] = best;
        gate[b * kernels + best] = 1;
        out_count[b] = count;
    }
}

// Max pooling, without padding, of the active channels.
void max_pool(const float *x, float *y, int32_t batch, int32_t channels, int32_t height, int32_t width, int32_t size,
              int32_t stride, int32_t out_height, int32_t out_width, const int32_t *in, const int32_t *in_count,
              int32_t zeros) {
    const int64_t from = (int64_t)height * width, to = (int64_t)out_height * out_width;
    for (int64_t b = 0; b < batch; b++) {
        const List reads{in + b * channels, in_count[b]};
        for (int a = 0; a < reads.count; a++) {
            const float *plane = x + (b * channels + reads.channel[a]) * from;
            float *out = y + (b * channels + reads.channel[a]) * to;
            for (int i = 0; i < out_height; i++)
                for (int j = 0; j < out_width; j++) {
                    const float *window = plane + (int64_t)i * stride * width + j * stride;
                    float most = window[0];
                    for (int r = 0; r < size; r++)
                        for (int c = 0; c < size; c++) most = std::max(most, window[r * width + c]);
                    out[i * out_width + j] = most;
                }
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

// Floats that a convolution needs for its work.
int64_t active_work(const Shape *s) {
    return s->channels * (s->plane() + (int64_t)std::max(s->taps() * TILE, FEW * LANES)) + TILE;
}

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
