/* linear_wna16 on a CPU: packed n-bit weight x float activations.

   Integers code - zero are exact in both formats that the products take (bfloat16 holds every integer up to 256), so the
   weight's values are never rounded: sums are float32, and each group's scale is applied to its sum. */
#include "../lowbit.h"

enum { ROWS = 6 };

typedef struct {
    const void *x; /* first row of the block, float32, or bfloat16 padded to pairs */
    int64_t stride;
    const void *values; /* [k][COLUMNS] float32, or [k / 2][COLUMNS][2] bfloat16 */
    const float *scale; /* [group][COLUMNS] */
    float *sums;        /* [row][COLUMNS] out */
    int64_t groups, group, k_in;
} Block;

INLINE void add_group(const Block *b, int r, int64_t g, const float *restrict acc) {
    float *restrict to = b->sums + r * COLUMNS;
    const float *restrict scale = b->scale + g * COLUMNS;
    for (int n = 0; n < COLUMNS; n++) to[n] = g ? __builtin_fmaf(acc[n], scale[n], to[n]) : acc[n] * scale[n];
}

INLINE void block_f32(const Block *b, const int rows) {
    for (int64_t g = 0; g < b->groups; g++) {
        const int64_t first = g * b->group, last = smaller(first + b->group, b->k_in);
#if defined(__AVX512F__)
        __m512 acc[ROWS][2];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
        for (int64_t k = first; k < last; k++) {
            const float *w = (const float *)b->values + k * COLUMNS;
            const __m512 w0 = _mm512_load_ps(w), w1 = _mm512_load_ps(w + 16);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                const __m512 x = _mm512_set1_ps(((const float *)b->x)[r * b->stride + k]);
                acc[r][0] = _mm512_fmadd_ps(x, w0, acc[r][0]);
                acc[r][1] = _mm512_fmadd_ps(x, w1, acc[r][1]);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            float out[COLUMNS] __attribute__((aligned(64)));
            _mm512_store_ps(out, acc[r][0]), _mm512_store_ps(out + 16, acc[r][1]);
            add_group(b, r, g, out);
        }
#else
        for (int r = 0; r < rows; r++) {
            float acc[COLUMNS] = {0};
            for (int64_t k = first; k < last; k++) {
                const float x = ((const float *)b->x)[r * b->stride + k];
                const float *restrict w = (const float *)b->values + k * COLUMNS;
                for (int n = 0; n < COLUMNS; n++) acc[n] += x * w[n];
            }
            add_group(b, r, g, acc);
        }
#endif
    }
}

#if defined(__AVX512BF16__)
/* In place: given the intrinsic, gcc copies every sum to another register and back, and spills. */
INLINE void add_dot(__m512 *sum, __m512bh w, __m512bh x) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(*sum) : "v"(w), "v"(x)); }

INLINE void block_bf16(const Block *b, const int rows) {
    const int64_t pairs_in_all = ceil_div(b->k_in, 2), pairs = ceil_div(b->group, 2);
    for (int64_t g = 0; g < b->groups; g++) {
        const int64_t first = g * pairs, last = smaller(first + pairs, pairs_in_all);
        __m512 acc[ROWS][2];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
        for (int64_t pair = first; pair < last; pair++) {
            const uint16_t *w = (const uint16_t *)b->values + pair * 2 * COLUMNS;
            const __m512bh w0 = (__m512bh)_mm512_load_si512(w), w1 = (__m512bh)_mm512_load_si512(w + 32);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int32_t two;
                memcpy(&two, (const uint16_t *)b->x + r * b->stride + pair * 2, 4);
                const __m512bh x = (__m512bh)_mm512_set1_epi32(two);
                add_dot(&acc[r][0], w0, x);
                add_dot(&acc[r][1], w1, x);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            float out[COLUMNS] __attribute__((aligned(64)));
            _mm512_store_ps(out, acc[r][0]), _mm512_store_ps(out + 16, acc[r][1]);
            add_group(b, r, g, out);
        }
    }
}
#endif

static void run_block(const Block *b, int rows, int bf16) {
#if defined(__AVX512BF16__)
#define CASE(n) case n: if (bf16) block_bf16(b, n); else block_f32(b, n); break;
#else
#define CASE(n) case n: block_f32(b, n); break;
#endif
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}

/* Codes of a tile to exact integers code - zero, [k][column] float32 or pairs of bfloat16. */
static void make_values(const Weight *weight, const uint8_t *restrict codes, const int32_t *zero, int bf16, void *to) {
    const int32_t centre = 1 << (weight->bits - 1);
    for (int64_t k = 0; k < weight->k_in; k++) {
        const uint8_t *restrict quad = codes + k / 4 * 4 * COLUMNS + k % 4;
        const int32_t *z = zero ? zero + k / weight->group * COLUMNS : NULL;
        float row[COLUMNS];
        for (int n = 0; n < COLUMNS; n++) row[n] = (float)((int32_t)quad[4 * n] - (z ? z[n] : centre));
        if (!bf16) {
            memcpy((float *)to + k * COLUMNS, row, sizeof row);
        } else {
            uint16_t *restrict pair = (uint16_t *)to + k / 2 * 2 * COLUMNS + k % 2;
            for (int n = 0; n < COLUMNS; n++) pair[2 * n] = (uint16_t)(float_to_bits(row[n]) >> 16);
        }
    }
    if (bf16 && weight->k_in % 2)
        for (int n = 0; n < COLUMNS; n++) ((uint16_t *)to)[weight->k_in / 2 * 2 * COLUMNS + 2 * n + 1] = 0;
}

static __thread Scratch of_call, of_thread;

static void run_tile(const Weight *weight, const Epilogue *end, Block block, int64_t m, int64_t first_n, int bf16, uint8_t *codes,
                     void *values, float *scale, int32_t *zero, float *sums) {
    lowbit_unpack_tile(weight, first_n, codes);
    lowbit_tile_scales(weight, first_n, scale, zero);
    make_values(weight, codes, weight->zero ? zero : NULL, bf16, values);
    const uint8_t *x = block.x;
    block.values = values, block.scale = scale, block.sums = sums;
    for (int64_t row = 0; row < m; row += ROWS) {
        const int64_t rows = smaller(ROWS, m - row);
        block.x = x + row * block.stride * (bf16 ? 2 : 4);
        run_block(&block, (int)rows, bf16);
        lowbit_finish(weight, end, sums, NULL, row, rows, first_n);
    }
}

/* x (M, K) in `format`. bfloat16 runs as it is where the CPU multiplies it and groups are whole pairs; all else is float32.
   Returns 0, or 1 when memory ran out. */
EXPORT int lowbit_linear_wna16(const Weight *weight, const Epilogue *end, const void *x, int64_t format, int64_t m, int64_t threads) {
    const int64_t k_in = weight->k_in, groups = ceil_div(k_in, weight->group), padded_k = ceil_div(k_in, 4) * 4;
#if defined(__AVX512BF16__)
    const int bf16 = format == BF16;
#else
    const int bf16 = 0;
#endif
    const int64_t width = bf16 ? 2 : 4, columns = bf16 ? ceil_div(k_in, 2) * 2 : k_in;
    const int copied = bf16 ? columns != k_in : format != F32;
    uint8_t *copy = copied ? reserve(&of_call, (size_t)(m * columns * width + 64)) : (uint8_t *)x;
    if (!copy) return 1;
    const Block common = {.x = copy, .stride = columns, .groups = groups, .group = weight->group, .k_in = k_in};
    const int64_t tiles = ceil_div(weight->n_out, COLUMNS);
    int failed = 0;
#pragma omp parallel num_threads((int)threads)
    {
        if (copied) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m; row++) {
                if (bf16) {
                    memcpy(copy + row * columns * 2, (const uint16_t *)x + row * k_in, (size_t)k_in * 2);
                    memset(copy + (row * columns + k_in) * 2, 0, 2);
                } else {
                    load_floats(x, (int)format, row * k_in, k_in, (float *)copy + row * columns);
                }
            }
        }
        const size_t codes_bytes = (size_t)padded_k * COLUMNS, values_bytes = (size_t)padded_k * COLUMNS * width;
        const size_t scale_bytes = (size_t)groups * COLUMNS * 4;
        uint8_t *codes = reserve(&of_thread, codes_bytes + values_bytes + 2 * scale_bytes + (size_t)ROWS * COLUMNS * 4);
        void *values = codes + codes_bytes;
        float *scale = (float *)(codes + codes_bytes + values_bytes);
        int32_t *zero = (int32_t *)(codes + codes_bytes + values_bytes + scale_bytes);
        float *sums = (float *)(codes + codes_bytes + values_bytes + 2 * scale_bytes);
        if (!codes)
#pragma omp atomic write
            failed = 1;
#pragma omp for schedule(dynamic, 1)
        for (int64_t tile = 0; tile < tiles; tile++)
            if (codes) run_tile(weight, end, common, m, tile * COLUMNS, bf16, codes, values, scale, zero, sums);
    }
    return failed;
}
