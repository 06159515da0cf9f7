/* Every entry point on odd sizes, with buffers of exactly the size that is promised: run under AddressSanitizer and
   UndefinedBehaviorSanitizer by test_sanitized.py. Exits 0 if nothing was read or written beside its buffer. */
#define _GNU_SOURCE
#include "lowbit.h"

#include <stdio.h>
#if defined(__AMX_INT8__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

int lowbit_hadamard(const void *, int64_t, const float *, int64_t, int64_t, int64_t, void *, int64_t);
int lowbit_act_quant(const void *, int64_t, const float *, int64_t, const ActGrid *, int64_t, int64_t, int64_t, int8_t *, float *, int64_t);
int lowbit_linear_wnan(const Weight *, const Epilogue *, const int8_t *, const float *, int64_t, int64_t, int64_t);
int lowbit_quant_linears(const LayersCall *);
int lowbit_linear_wna16(const Weight *, const Epilogue *, const void *, int64_t, int64_t, int64_t);
int lowbit_modulate(const void *, int64_t, const void *, const void *, int64_t, double, int64_t, int64_t, int64_t, void *, int64_t);
int lowbit_attention(const Stream *, int64_t, int64_t, const float *, const float *, double, int64_t, int64_t, int64_t, int64_t);

static uint32_t state = 1;

static uint32_t draw(uint32_t below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

static int width_of(int format) { return format == F32 ? 4 : 2; }

static void *bytes_of(size_t count) {
    uint8_t *made = malloc(count ? count : 1);
    for (size_t i = 0; i < count; i++) made[i] = (uint8_t)draw(256);
    return made;
}

/* Numbers of a format, none of them infinite. */
static void *floats_of(size_t count, int format) {
    float *wide = malloc(count * 4 + 1);
    for (size_t i = 0; i < count; i++) wide[i] = (float)draw(2001) / 500 - 2;
    void *made = malloc(count * width_of(format) + 1);
    made = realloc(made, count ? count * width_of(format) : 1);
    store_floats(wide, (int64_t)count, made, format, 0);
    free(wide);
    return made;
}

static void linear(void) {
    static const int64_t widths[] = {2, 3, 4, 6, 8}, groups[] = {0, 32, 64};
    const int64_t bits = widths[draw(5)], m = draw(20) ? draw(30) : 256 + draw(40), k = 1 + draw(200), chosen = groups[draw(3)];
    const int64_t n = 1 + draw(70) + (draw(20) || m > 30 ? 0 : 1024); /* so that threads share out each of what they can */
    const int64_t group = chosen ? chosen : k, count = ceil_div(k, group), rank = draw(4);
    const int format = (int)draw(3), y_format = (int)draw(3), has_zero = (int)draw(2), has_bias = (int)draw(2);
    uint8_t *packed = bytes_of((size_t)(n * ceil_div(k * bits, 8))), *zero = has_zero ? bytes_of((size_t)(n * count)) : NULL;
    void *scale = floats_of((size_t)(n * count), F16), *bias = has_bias ? floats_of((size_t)n, format) : NULL;
    float *low = floats_of((size_t)(m * rank), F32), *up = floats_of((size_t)(n * rank), F32);
    void *y = malloc((size_t)(m * n * width_of(y_format)) + (m * n == 0));
    const Weight weight = {packed, scale, zero, n, k, group, bits};
    const Epilogue end = {bias, rank ? low : NULL, rank ? up : NULL, y, format, rank, draw(2), y_format};
    const int64_t act_groups = k % group == 0 && draw(2) ? count : 1;
    int8_t *q = bytes_of((size_t)(m * k));
    float *act_scale = floats_of((size_t)(m * act_groups), F32);
    void *x = floats_of((size_t)(m * k), y_format);
    if (m) {
        void *second = malloc((size_t)(m * n * width_of(y_format)));
        const Weight *const both[] = {&weight, &weight};
        const Epilogue ends[] = {{bias, NULL, NULL, NULL, format, 0, 0, 0}, {bias, NULL, NULL, NULL, format, 0, 1, 0}};
        const ActGrid grids[] = {{4, draw(2), 1}, {draw(2) ? 4 : 8, 0, 0.9f}};
        Layers layers = {both, ends, NULL, 2, 1, act_groups};
        if (lowbit_quant_linears(&(LayersCall){&layers, NULL, grids, x, NULL, 0, y_format, m, 1 + draw(2), {y, second}})) exit(2);
        layers.count = 1;
        void *gate = floats_of((size_t)n, y_format), *left = floats_of((size_t)m, y_format);
        void *right = floats_of((size_t)(m * (k - 1)), y_format);
        const Epilogue gated = {.residual = second, .gate = gate, .gate_stride = n, .tokens = m};
        const LayersCall parts = {&layers, &gated, grids, k > 1 ? left : x, k > 1 ? right : NULL, 1, y_format, m, 1 + draw(2), {y}};
        if (lowbit_quant_linears(&parts)) exit(2);
        free(second), free(gate), free(left), free(right);
        for (int64_t i = 0; i < m * k; i++) q[i] = q[i] == -128 ? 0 : q[i];
        if (lowbit_linear_wnan(&weight, &end, q, act_scale, act_groups, m, 1 + draw(2))) exit(2);
        if (lowbit_linear_wna16(&weight, &end, x, y_format, m, 1 + draw(2))) exit(2);
    }
    free(packed), free(zero), free(scale), free(bias), free(low), free(up), free(y), free(q), free(act_scale), free(x);
}

static void activations(void) {
    static const int64_t blocks[] = {1, 2, 8, 16, 64, 256}, widths[] = {3, 4, 6, 8};
    const int64_t block = blocks[draw(6)], m = 1 + draw(5), k = block * (1 + draw(5)), group = draw(2) ? k : block;
    const int format = (int)draw(3);
    void *x = floats_of((size_t)(m * k), format), *y = malloc((size_t)(m * k * width_of(format)));
    float *factor = floats_of((size_t)k, F32), *scale = malloc((size_t)(m * (k / group) * 4));
    int8_t *q = malloc((size_t)(m * k));
    if (lowbit_hadamard(x, format, draw(2) ? factor : NULL, block, m, k, y, 1 + draw(2))) exit(2);
    const int64_t bits = widths[draw(4)];
    const ActGrid grid = {bits, bits < 8 && draw(2), draw(2) ? 1 : 0.9f};
    if (lowbit_act_quant(x, format, draw(2) ? factor : NULL, block, &grid, group, m, k, q, scale, 1 + draw(2))) exit(2);
    free(x), free(y), free(factor), free(scale), free(q);
}

static void between(void) {
    const int64_t samples = 1 + draw(3), tokens = 1 + draw(20), heads = 1 + draw(3), channels = 2 * (1 + draw(40)), others = draw(6);
    const int64_t d = heads * channels;
    const int format = (int)draw(3);
    void *x = floats_of((size_t)(samples * tokens * d), format), *y = malloc((size_t)(samples * tokens * d * width_of(format)));
    void *more = floats_of((size_t)(samples * others * d), format), *z = malloc((size_t)(samples * others * d * width_of(format) + 1));
    void *shift = floats_of((size_t)(samples * d), format), *scale = floats_of((size_t)(samples * d), format);
    float *weight = floats_of((size_t)channels, F32), *cos = floats_of((size_t)((tokens + others) * channels), F32);
    if (lowbit_modulate(x, format, shift, scale, d, 1e-6, samples, tokens, d, y, 1 + draw(2))) exit(2);
    const Stream streams[] = {{x, x, x, weight, weight, y, tokens}, {more, more, more, weight, weight, z, others}};
    if (lowbit_attention(streams, 1 + (others > 0), format, cos, cos, 1e-6, samples, heads, channels, 1 + draw(2))) exit(2);
    free(x), free(y), free(more), free(z), free(shift), free(scale), free(weight), free(cos);
}

int main(void) {
#if defined(__AMX_INT8__)
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 1; /* as build.py asks for the tiles */
#endif
    for (int round = 0; round < 400; round++) linear(), activations(), between();
    puts("clean");
    return 0;
}
