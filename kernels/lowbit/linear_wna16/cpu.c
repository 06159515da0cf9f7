/* linear_wna16 on a CPU: packed n-bit weight x float activations.

   Integers code - zero are exact in both formats that the products take (bfloat16 holds every integer up to 256), so the
   weight's values are never rounded: sums are float32, and each group's scale is applied to its sum. */
#include "../amx.h"

enum { ROWS = 6, DEPTH = 32 }; /* tokens at a time; features of a tile of AMX */

typedef struct {
    const void *x; /* first row of the block, float32, or bfloat16 padded to pairs, or to whole tiles of AMX */
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

/* b->x may be read up to a whole number of tiles. */
static void amx_block(const Block *b, int64_t rows) {
#if defined(__AMX_BF16__)
    float sums[AMX_ROWS * COLUMNS] __attribute__((aligned(64)));
    for (int64_t g = 0; g < b->groups; g++) {
        const int64_t first = g * b->group, count = smaller(b->group, b->k_in - first);
        const uint16_t *x = (const uint16_t *)b->x + first, *w = (const uint16_t *)b->values + first * COLUMNS;
        AMX_SUM_32(TILE_DOT_BF16, x, 2 * b->stride, w, rows, ceil_div(count, DEPTH), sums);
        for (int64_t r = 0; r < rows; r++) add_group(b, (int)r, g, sums + r * COLUMNS);
    }
#endif
}

static void run_block(const Block *b, int rows, int bf16) {
#if defined(__AVX512BF16__)
#define CASE(n) case n: if (bf16) block_bf16(b, n); else block_f32(b, n); break;
#else
#define CASE(n) case n: block_f32(b, n); break;
#endif
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}

/* Codes of a tile to exact integers code - zero, [k][column] float32 or pairs of bfloat16: four features at a time, whole quads. */
INLINE void make_quads(const Weight *weight, const uint8_t *restrict codes, const int32_t *zero, const int bf16, void *to) {
    int32_t centre[COLUMNS];
    for (int n = 0; n < COLUMNS; n++) centre[n] = 1 << (weight->bits - 1);
    for (int64_t k = 0; k < weight->k_in; k += 4) {
        const int32_t *restrict z = zero ? zero + k / weight->group * COLUMNS : centre;
        uint32_t quad[COLUMNS];
        float row[4][COLUMNS];
        memcpy(quad, codes + k * COLUMNS, sizeof quad);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        for (int n = 0; n < COLUMNS; n++) quad[n] = __builtin_bswap32(quad[n]);
#endif
        for (int i = 0; i < 4; i++)
            for (int n = 0; n < COLUMNS; n++) row[i][n] = (float)((int32_t)(quad[n] >> 8 * i & 255) - z[n]);
        if (!bf16) {
            memcpy((float *)to + k * COLUMNS, row, sizeof row);
            continue;
        }
        for (int half = 0; half < 2; half++) {
            uint32_t *restrict pairs = (uint32_t *)to + (k / 2 + half) * COLUMNS;
            for (int n = 0; n < COLUMNS; n++)
                pairs[n] = float_to_bits(row[2 * half][n]) >> 16 | (float_to_bits(row[2 * half + 1][n]) & 0xffff0000);
        }
    }
}

/* The same up to feature `end`; zeros from the last on. */
static void make_values(const Weight *weight, const uint8_t *restrict codes, const int32_t *zero, int bf16, int64_t end, void *to) {
    if (!bf16) {
        make_quads(weight, codes, zero, 0, to);
        return;
    }
    make_quads(weight, codes, zero, 1, to);
    const int64_t odd = weight->k_in % 2, first = weight->k_in + odd; /* of the zeros that are whole pairs */
    uint16_t *values = to;
    for (int n = 0; odd && n < COLUMNS; n++) values[(first - 2) * COLUMNS + 2 * n + 1] = 0;
    memset(values + first * COLUMNS, 0, (size_t)((end - first) * COLUMNS * 2));
}

static __thread Scratch of_call, of_thread;

/* Of one call. */
typedef struct {
    const Weight *weight;
    const Epilogue *end;
    Block common;
    int64_t m, padded_k;
    int bf16, amx;
} Call;

/* What a tile of columns needs of a thread: codes, values, scales, zero points, sums. */
typedef struct {
    uint8_t *codes;
    void *values;
    float *scale, *sums;
    int32_t *zero;
} Room;

static Room room_of(const Call *call) {
    const size_t codes = (size_t)call->padded_k * COLUMNS, values = codes * (call->bf16 ? 2 : 4);
    const size_t scale = (size_t)call->common.groups * COLUMNS * 4;
    uint8_t *at = reserve(&of_thread, codes + values + 2 * scale + (size_t)(call->amx ? AMX_ROWS : ROWS) * COLUMNS * 4);
    if (!at) return (Room){NULL};
    uint8_t *scales = at + codes + values;
    return (Room){at, at + codes, (float *)scales, (float *)(scales + 2 * scale), (int32_t *)(scales + scale)};
}

static void run_tile(const Call *call, int64_t first_n, const Room *room) {
    const Weight *weight = call->weight;
    const int64_t step = call->amx ? AMX_ROWS : ROWS;
    lowbit_unpack_tile(weight, first_n, room->codes);
    lowbit_tile_scales(weight, first_n, room->scale, room->zero);
    make_values(weight, room->codes, weight->zero ? room->zero : NULL, call->bf16, call->padded_k, room->values);
    Block block = call->common;
    block.values = room->values, block.scale = room->scale, block.sums = room->sums;
    for (int64_t row = 0; row < call->m; row += step) {
        const int64_t rows = smaller(step, call->m - row);
        block.x = (const uint8_t *)call->common.x + row * block.stride * (call->bf16 ? 2 : 4);
        if (call->amx) amx_block(&block, rows);
        else run_block(&block, (int)rows, call->bf16);
        lowbit_finish(weight, call->end, block.sums, NULL, row, rows, first_n);
    }
}

/* Row of x (M, K) in `format`, as bfloat16 with zeros up to `columns`, or as float32. */
static void copy_row(const void *x, int64_t format, int64_t row, int64_t k_in, int64_t columns, int bf16, uint8_t *to) {
    if (bf16) {
        memcpy(to + row * columns * 2, (const uint16_t *)x + row * k_in, (size_t)k_in * 2);
        memset(to + (row * columns + k_in) * 2, 0, (size_t)(columns - k_in) * 2);
    } else {
        load_floats(x, (int)format, row * k_in, k_in, (float *)to + row * columns);
    }
}

/* x (M, K) in `format`. bfloat16 runs as it is where the CPU multiplies it and groups are whole pairs; all else is float32.
   Returns 0, or 1 when memory ran out. */
EXPORT int lowbit_linear_wna16(const Weight *weight, const Epilogue *end, const void *x, int64_t format, int64_t m, int64_t threads) {
    const int64_t k_in = weight->k_in, groups = ceil_div(k_in, weight->group);
#if defined(__AVX512BF16__)
    const int bf16 = format == BF16;
#else
    const int bf16 = 0;
#endif
    const int amx = bf16 && takes_amx(m, weight->group, groups, DEPTH);
    const int64_t whole = amx ? DEPTH : bf16 ? 2 : 1; /* features at a time */
    const int64_t rows = amx ? ceil_div(m, TILE) * TILE : m, columns = ceil_div(k_in, whole) * whole;
    const int copied = bf16 ? columns != k_in || rows != m : format != F32;
    uint8_t *copy = copied ? reserve(&of_call, (size_t)(rows * columns * (bf16 ? 2 : 4) + 64)) : (uint8_t *)x;
    if (!copy) return 1;
    const Call call = {weight, end, {.x = copy, .stride = columns, .groups = groups, .group = weight->group, .k_in = k_in}, m,
                       amx ? columns : ceil_div(k_in, 4) * 4, bf16, amx};
    const int64_t tiles = ceil_div(weight->n_out, COLUMNS);
    int failed = 0;
#pragma omp parallel num_threads((int)threads)
    {
        if (copied) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < m; row++) copy_row(x, format, row, k_in, columns, bf16, copy);
        }
        const Room room = room_of(&call);
        if (!room.codes)
#pragma omp atomic write
            failed = 1;
        if (amx) amx_begin();
#pragma omp for schedule(dynamic, 1)
        for (int64_t tile = 0; tile < tiles; tile++)
            if (room.codes) run_tile(&call, tile * COLUMNS, &room);
        if (amx) amx_end();
    }
    return failed;
}
