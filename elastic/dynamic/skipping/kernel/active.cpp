// Layers of which only some input and output channels exist; see ../layers.py and ../convolution.py.
//
// Tensors are fp32, NCHW, contiguous and of full size; lists name the active channels, so nothing is gathered.

#include <utility>
#include <vector>

#include "means.h"
#include "pixels.h"
#include "strips.h"
#include "tiles.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace {

// y is left as it is where an output is not active; zeros there where asked for.
void clear(float *y, int64_t pixels, int channels, List out) {
    for (int c = 0, k = 0; c < channels; c++)
        if (k < out.count && out.channel[k] == c) k++;
        else std::memset(y + c * pixels, 0, sizeof(float) * pixels);
}

// Floats of work that a thread needs.
int64_t need(const Shape &s) {
    return s.algorithm == PIXELS ? work_by_pixels(s) : s.algorithm == TILES ? work_by_tiles(Tiles(s)) : Strip(s).work();
}

// Of all that lists name, or of `sparse`, where the lists name all.
void convolve(const Layer &layer, const float *x, float *y, int32_t batch, Lists reads, Lists writes,
              const Blocks *sparse, bool zeros, float *work, int32_t threads) {
    const Tiles s(layer.shape);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        // Each thread has samples of its own, or all share each sample where there are too few.
        const int me = omp_get_thread_num(), all = omp_get_num_threads();
        const bool own = batch >= all;
        const Team team = own ? Team{0, 1} : Team{me, all};
        const int64_t first = own ? me : 0, step = own ? all : 1, most = s.algorithm == TILES ? s.at_once() : 1;
        float *scratch = work + me * need(s), *mine = own ? scratch : work;
        for (int64_t b = first; b < batch; b += most * step) {
            const Samples samples{b, step, (int)std::min(most, (batch - b + step - 1) / step)};
            const float *maps = x + b * s.channels * s.height * s.width;
            if (s.algorithm == TILES) by_tiles(layer, team, x, reads, writes, sparse, samples, scratch, mine + s.scratch());
            else (s.algorithm == PIXELS ? by_pixels : by_strips)(layer, team, maps, reads.of(b), writes.of(b), sparse, b, mine);
            team.wait();
            for (int i = 0; zeros && team.me == 0 && i < samples.count; i++)
                clear(y + samples.at(i) * s.kernels * s.pixels(), s.pixels(), s.kernels, writes.of(samples.at(i)));
        }
    }
}

// Lists are ascending, (batch, channels) with a row's first `count` entries valid.
void convolution(const Shape *shape, const float *weight, const float *bias, const float *x, const float *residual,
                 float *y, int32_t batch, const int32_t *in, const int32_t *in_count, const int32_t *out,
                 const int32_t *out_count, const float *gate, int32_t relu, int32_t zeros, float *work,
                 int32_t threads) {
    const Layer layer{*shape, weight, bias, residual, gate, y, relu != 0};
    const Lists reads{in, in_count, shape->channels}, writes{out, out_count, shape->kernels};
    convolve(layer, x, y, batch, reads, writes, nullptr, zeros != 0, work, threads);
}

// Block by block: of the i-th, the inputs in_begin[i] … in_begin[i + 1] of `in`, and so its outputs. `all` names all
// channels of all samples, `all_count` how many there are.
void convolve_blocks(const Shape *shape, const float *weight, const float *bias, const float *x, const float *residual,
                     float *y, int32_t batch, const int32_t *all, const int32_t *all_count, const Blocks *sparse,
                     const float *gate, int32_t relu, float *work, int32_t threads) {
    const Layer layer{*shape, weight, bias, residual, gate, y, relu != 0};
    const Lists lists{all, all_count, shape->channels};
    convolve(layer, x, y, batch, lists, lists, sparse, false, work, threads);
}

struct Pool {
    int32_t channels, height, width, size, stride, pad, out_height, out_width;
};

// What is not a number is the largest, as torch has it.
inline float larger(float a, float b) { return b > a || b != b ? b : a; }

// Max pooling of one map; `line` is a row with padding on both sides, as far as the last window reaches. SIZE and
// STRIDE: where known, so that pixels fill vectors.
template <int SIZE, int STRIDE>
void max_pool_map(const Pool &s, const float *plane, float *out, float *line) {
    const int size = SIZE ? SIZE : s.size, stride = SIZE ? STRIDE : s.stride;
    float *most = line + s.pad;
    for (int i = 0; i < s.out_height; i++, out += s.out_width) {
        const int top = std::max(0, i * stride - s.pad), end = std::min(s.height, i * stride - s.pad + size);
        std::memcpy(most, plane + (int64_t)top * s.width, sizeof(float) * s.width);
        for (int y = top + 1; y < end; y++) {
            const float *row = plane + (int64_t)y * s.width;
            for (int x = 0; x < s.width; x++) most[x] = larger(most[x], row[x]);
        }
        for (int j = 0; j < s.out_width; j++) {
            float value = line[j * stride];
            for (int c = 1; c < size; c++) value = larger(value, line[j * stride + c]);
            out[j] = value;
        }
    }
}

// Of the active channels.
void max_pool(const Pool *shape, const float *x, float *y, int32_t batch, const int32_t *in, const int32_t *in_count,
              int32_t zeros, int32_t threads) {
    const Pool s = *shape;
    const int64_t from = (int64_t)s.height * s.width, to = (int64_t)s.out_height * s.out_width;
    const int reach = std::max(s.width + 2 * s.pad, (s.out_width - 1) * s.stride + s.size);
    const auto pool = s.size == 2 && s.stride == 2   ? max_pool_map<2, 2>
                      : s.size == 3 && s.stride == 2 ? max_pool_map<3, 2>
                                                     : max_pool_map<0, 0>;
#pragma omp parallel for num_threads(threads) if (threads > 1 && batch > 1)
    for (int64_t b = 0; b < batch; b++) {
        std::vector<float> line(reach, -INFINITY);
        const List reads{in + b * s.channels, in_count[b]};
        for (int a = 0; a < reads.count; a++) {
            const int64_t map = b * s.channels + reads.channel[a];
            pool(s, x + map * from, y + map * to, line.data());
        }
        if (zeros) clear(y + b * s.channels * to, to, s.channels, reads);
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
    int64_t function;  // 0 convolution, 1 engage, 2 max_pool, 3 classify, 4 convolve_blocks
    int64_t arguments[16];
};

void active_run(const Step *steps, int32_t count) {
    for (const Step *step = steps; step < steps + count; step++) {
        const int64_t *a = step->arguments;
        if (step->function == 0) call(convolution, a);
        else if (step->function == 1) call(engage, a);
        else if (step->function == 2) call(max_pool, a);
        else if (step->function == 3) call(classify, a);
        else call(convolve_blocks, a);
    }
}
}
