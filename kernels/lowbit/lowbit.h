/* What the C kernels share: float formats, per-thread scratch, and the arguments of each entry point.

   Dimension letters: M tokens, K in features, N out features, G groups along K, P packed bytes along K, R rank.
   Compiled for one instruction set at a time (build.py); a kernel asks the compiler's own macros which one it is. */
#ifndef LOWBIT_H
#define LOWBIT_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

enum { F32 = 0, BF16 = 1, F16 = 2 }; /* float formats, as cpu.py numbers them */
enum { COLUMNS = 32 };               /* out features of one tile */

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float from_half(uint16_t half) {
#if defined(__F16C__)
    return _cvtsh_ss(half);
#else
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    /* scaled by 2^112 the exponents agree, subnormals included */
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
#endif
}

INLINE uint16_t to_half(float value) {
#if defined(__F16C__)
    return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7e00;
    if (magnitude >= 0x477ff000) return sign | 0x7c00; /* rounds to 65536 or more */
    if (magnitude < 0x38800000)                        /* subnormal: adding 0.5 rounds at 2^-24 */
        return sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000);
    return sign | (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
#endif
}

INLINE uint16_t to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40; /* NaN stays NaN */
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* `count` numbers from position `first` of a row, as float32. */
INLINE void load_floats(const void *from, int format, int64_t first, int64_t count, float *restrict to) {
    if (format == F32) {
        memcpy(to, (const float *)from + first, (size_t)count * 4);
    } else if (format == BF16) {
        const uint16_t *restrict source = (const uint16_t *)from + first;
        for (int64_t i = 0; i < count; i++) to[i] = bits_to_float((uint32_t)source[i] << 16);
    } else {
        const uint16_t *restrict source = (const uint16_t *)from + first;
        for (int64_t i = 0; i < count; i++) to[i] = from_half(source[i]);
    }
}

INLINE void store_floats(const float *restrict from, int64_t count, void *to, int format, int64_t first) {
    if (format == F32) {
        memcpy((float *)to + first, from, (size_t)count * 4);
    } else if (format == BF16) {
        uint16_t *restrict target = (uint16_t *)to + first;
        int64_t i = 0;
#if defined(__AVX512BF16__)
        for (; i + 16 <= count; i += 16)
            _mm256_storeu_si256((__m256i *)(target + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
        for (; i < count; i++) target[i] = to_bf16(from[i]);
    } else {
        uint16_t *restrict target = (uint16_t *)to + first;
        for (int64_t i = 0; i < count; i++) target[i] = to_half(from[i]);
    }
}

/* e^x for x <= 0 within 2 units in the last place: 2^n times a polynomial on |r| <= ln(2) / 2 (Cody and Waite's reduction). */
INLINE float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = __builtin_rintf(x * 1.44269504088896341f);
    const float r = __builtin_fmaf(n, -1.42860677e-6f, __builtin_fmaf(n, -0.693145752f, x));
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p * r, r, r + 1.0f);
    return p * bits_to_float((uint32_t)((int32_t)n + 127) << 23);
}

/* Memory of the calling thread that only grows until the thread ends, aligned to a cache line; NULL when there is none left. No two
   threads share one: calls from several threads run side by side. */
typedef struct Scratch {
    void *at;
    size_t bytes;
    struct Scratch *next; /* of the thread's */
    int known;            /* is it among them? */
} Scratch;

/* scratch.c: free it when the calling thread ends. */
void lowbit_give_back_at_end(Scratch *scratch);

static inline void *reserve(Scratch *scratch, size_t bytes) {
    if (scratch->bytes < bytes) {
        if (!scratch->known) lowbit_give_back_at_end(scratch);
        free(scratch->at);
        size_t rounded = (bytes + 4095) / 4096 * 4096;
        scratch->at = aligned_alloc(64, rounded);
        scratch->bytes = scratch->at ? rounded : 0;
    }
    return scratch->at;
}

/* hadamard/cpu.c: row `row` of x (M, K) in `format` as float32, times the factor (K) or NULL, rotated where block > 1. */
void lowbit_load_row(const void *x, int64_t format, int64_t row, const float *restrict factor, int64_t block, int64_t k_in,
                     float *restrict wide);

/* The grid that activations are rounded to, as act_quant/naive.py has it; `clip` is its Grid.share. */
typedef struct {
    int64_t bits, mid_rise;
    float clip;
} ActGrid;

/* Rows that are rounded together: of as many numbers as stay in the first cache. */
INLINE int64_t lowbit_rows_at_once(int64_t k_in) { return k_in < 2048 ? smaller(8, 2048 / k_in) : 1; }

/* act_quant/cpu.c: codes, `stride` bytes from row to row, with the bits of `flip` flipped, and scales (one per `group`) of rows of
   float32, whose rounding leaves `wide` as it was. */
void lowbit_round_rows(const float *restrict wide, const ActGrid *grid, int64_t group, int64_t rows, int64_t k_in, int8_t *restrict q,
                       int64_t stride, float *restrict scale, int8_t flip);

/* A packed weight: codes (N, P), scales (N, G) half, zeros (N, G) or NULL, `group` columns to a scale. */
typedef struct {
    const uint8_t *packed;
    const uint16_t *scale;
    const uint8_t *zero;
    int64_t n_out, k_in, group;
    int64_t bits;
} Weight;

/* What happens to a finished row: bias (N) or NULL, low rank low (M, R) up (N, R) float32 or NULL, GELU, output (M, N).
   residual (M, N) or NULL in the output's format: y = residual + gate y, the gate (B, N) `gate_stride` apart, `tokens` rows to a sample. */
typedef struct {
    const void *bias;
    const float *low, *up;
    void *y;
    int64_t bias_format, rank, gelu, y_format;
    const void *residual, *gate;
    int64_t gate_stride, tokens;
} Epilogue;

/* Layers that read one input, all of one K and one group size, prepared for many calls. */
typedef struct {
    const Weight *const *weights;
    const Epilogue *ends; /* what belongs to the layer alone: bias and GELU */
    const float *factor;  /* (K) or NULL */
    int64_t count, block, act_groups;
} Layers;

enum { MOST_WEIGHTS = 8 }; /* of one call */
/* A call of them: output i is ys[i], in `format`, rounded to grids[i]. x (M, K) may come as two parts side by side, the first k_first columns
   wide, a multiple of `block`; else more_x is NULL. gated is NULL, or holds the residual of a single layer's output. One pointer to all of
   it, because ctypes takes a tenth of a microsecond for each argument. */
typedef struct {
    const Layers *layers;
    const Epilogue *gated;
    const ActGrid *grids;
    const void *x, *more_x;
    int64_t k_first, format, m, threads;
    void *ys[MOST_WEIGHTS]; /* as many as layers are read */
} LayersCall;

/* One stream of tokens of attention: q, k, v, y (B, tokens, H C) in the call's format, norm weights (C) float32. */
typedef struct {
    const void *q, *k, *v;
    const float *q_norm, *k_norm;
    void *y;
    int64_t tokens;
} Stream;

/* unpack.c: codes of columns first_n .. first_n + COLUMNS as bytes [k / 4][column][k % 4], zero where there is none. */
void lowbit_unpack_tile(const Weight *weight, int64_t first_n, uint8_t *restrict to);
/* AVX-512 multiplies unsigned by signed bytes. Products there hold tokens as unsigned q + 128 and make codes signed, c - zero: what the
   sums hold too much is then 128 times the sum of a group's codes, which belongs to the tile, and tokens need no sums of their own. AMX
   takes the same codes, and tokens as they are. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
enum { SIGNED_CODES = 1 };
#else
enum { SIGNED_CODES = 0 };
#endif
/* unpack.c: the same as signed bytes, less zero [group][column], or less half of the codes' range where that is NULL;
   start [group][column]: -128 times their sum over the group. Only where SIGNED_CODES. */
void lowbit_unpack_signed(const Weight *weight, int64_t first_n, const int32_t *zero, uint8_t *restrict to, int32_t *restrict start);
/* scales (and zero points) of the tile's columns: [group][column], zero where there is none. */
void lowbit_tile_scales(const Weight *weight, int64_t first_n, float *restrict scale, int32_t *restrict zero);
/* epilogue.c: `rows` rows of COLUMNS sums become outputs; row_scale (rows) or NULL multiplies the sums first. */
void lowbit_finish(const Weight *weight, const Epilogue *end, const float *restrict sums, const float *row_scale,
                   int64_t first_m, int64_t rows, int64_t first_n);

#endif
