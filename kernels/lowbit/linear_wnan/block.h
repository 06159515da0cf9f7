/* The innermost loops of linear_wnan: a few tokens against one tile of codes, for each instruction set. */
#ifndef LOWBIT_LINEAR_WNAN_BLOCK_H
#define LOWBIT_LINEAR_WNAN_BLOCK_H

#include "../lowbit.h"

typedef struct {
    const int8_t *q; /* the block's tokens, rows `stride` bytes apart, padded with zeros to whole quads (AMX reads on, against codes of 0) */
    int64_t stride;
    const uint8_t *codes;      /* lowbit_unpack_tile; signed by lowbit_unpack_signed where SIGNED_CODES */
    const int32_t *start;      /* [group][COLUMNS], of signed codes: where sums start, but with AMX, whose tokens are signed too */
    const float *scale;        /* [group][COLUMNS] */
    const int32_t *zero;       /* [group][COLUMNS] or NULL: half of the codes' range for all, or nothing where codes are signed */
    const int32_t *token_sums; /* [row][group]: sum of q over the group; NULL where nothing needs them */
    const float *act_scale;    /* [row][group], or NULL: one scale per token, applied at the end */
    float *sums;               /* [row][COLUMNS] out */
    int64_t groups, group, k_in, bits;
    int amx; /* block_amx.h runs it */
} Block;

#if defined(__AVX512VNNI__)
enum { ROWS = 12, ROWS_GROUPED = 7 }; /* 24 of 32 registers hold sums of integers alone, or 28 integers and floats */
enum { AHEAD = 2048 };             /* bytes of codes fetched ahead */

/* In place: given the intrinsic, gcc copies every sum to another register and back, and spills. */
INLINE void add_dot(__m512i *sum, __m512i q, __m512i codes) { __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(q), "v"(codes)); }

/* Exact sums of one group; they start at what 128 and the zero point have added. */
INLINE void sum_group(const Block *b, const int rows, int64_t g, __m512i acc[][2]) {
    const int64_t quads = ceil_div(b->group, 4), first = g * quads, last = smaller(first + quads, ceil_div(b->k_in, 4));
    const uint8_t *codes = b->codes + first * 4 * COLUMNS;
    const int8_t *q[ROWS / 3]; /* of every third row */
#pragma GCC unroll 4
    for (int r = 0; r < ROWS / 3; r++) q[r] = b->q + 3 * r * b->stride + first * 4;
    const __m512i s0 = _mm512_load_si512(b->start + g * COLUMNS), s1 = _mm512_load_si512(b->start + g * COLUMNS + 16);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) acc[r][0] = s0, acc[r][1] = s1;
    if (b->zero) {
        const __m512i z0 = _mm512_load_si512(b->zero + g * COLUMNS), z1 = _mm512_load_si512(b->zero + g * COLUMNS + 16);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const __m512i s = _mm512_set1_epi32(b->token_sums[r * b->groups + g]);
            acc[r][0] = _mm512_add_epi32(acc[r][0], _mm512_mullo_epi32(z0, s));
            acc[r][1] = _mm512_add_epi32(acc[r][1], _mm512_mullo_epi32(z1, s));
        }
    }
    for (int64_t quad = first; quad < last; quad++, codes += 4 * COLUMNS) {
        const __m512i w0 = _mm512_load_si512(codes), w1 = _mm512_load_si512(codes + 64);
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0); /* the tile is larger than the first cache */
        _mm_prefetch((const char *)codes + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, q[r / 3] + r % 3 * b->stride, 4);
            const __m512i a = _mm512_set1_epi32(four);
            add_dot(&acc[r][0], a, w0);
            add_dot(&acc[r][1], a, w1);
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS / 3; r++) q[r] += 4;
    }
}

INLINE void one_group(const Block *b, const int rows) {
    __m512i acc[ROWS][2];
    sum_group(b, rows, 0, acc);
    const __m512 s0 = _mm512_load_ps(b->scale), s1 = _mm512_load_ps(b->scale + 16);
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        _mm512_store_ps(b->sums + r * COLUMNS, _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][0]), s0));
        _mm512_store_ps(b->sums + r * COLUMNS + 16, _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][1]), s1));
    }
}

INLINE void many_groups(const Block *b, const int rows) {
    __m512 total[ROWS_GROUPED][2];
#pragma GCC unroll 7
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < b->groups; g++) {
        __m512i acc[ROWS_GROUPED][2];
        sum_group(b, rows, g, acc);
        const __m512 s0 = _mm512_load_ps(b->scale + g * COLUMNS), s1 = _mm512_load_ps(b->scale + g * COLUMNS + 16);
#pragma GCC unroll 7
        for (int r = 0; r < rows; r++) {
            __m512 y0 = _mm512_cvtepi32_ps(acc[r][0]), y1 = _mm512_cvtepi32_ps(acc[r][1]);
            if (b->act_scale) {
                const __m512 a = _mm512_set1_ps(b->act_scale[r * b->groups + g]);
                y0 = _mm512_mul_ps(y0, a), y1 = _mm512_mul_ps(y1, a);
            }
            total[r][0] = _mm512_fmadd_ps(y0, s0, total[r][0]);
            total[r][1] = _mm512_fmadd_ps(y1, s1, total[r][1]);
        }
    }
#pragma GCC unroll 7
    for (int r = 0; r < rows; r++) {
        _mm512_store_ps(b->sums + r * COLUMNS, total[r][0]);
        _mm512_store_ps(b->sums + r * COLUMNS + 16, total[r][1]);
    }
}

#elif defined(__AVX2__)
enum { ROWS = 4, ROWS_GROUPED = 4 }; /* 8 of 16 registers hold sums, for half a tile at a time */

/* acc + the dot products of 4 unsigned codes with 4 signed activations. */
#if defined(__AVXVNNI__)
enum { HELD = 0 };
INLINE __m256i dot(__m256i acc, __m256i codes, __m256i q, const int wide) { return _mm256_dpbusd_avx_epi32(acc, codes, q); }
#elif defined(LOWBIT_TEST_AVXVNNI) /* the same instruction in its AVX-512 encoding: tests the code path on CPUs without the other */
enum { HELD = 0 };
__attribute__((target("avx512vl,avx512vnni"))) static inline __m256i dot(__m256i acc, __m256i codes, __m256i q, int wide) {
    return _mm256_dpbusd_epi32(acc, codes, q);
}
#else
enum { HELD = 8 }; /* sums of two products, of codes up to 4 bits, that add up within 16 bits: 8 x 2 x 15 x 128 */
/* Pairs are summed in 16 bits, which holds 2 x 63 x 128 but not the codes of 8 bits (`wide`): those are widened first. */
INLINE __m256i dot(__m256i acc, __m256i codes, __m256i q, const int wide) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (!wide) return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), ones));
    const __m256i low_bytes = _mm256_set1_epi16(0xff);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, low_bytes), _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(q, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
#endif

INLINE __m256i load_32(const uint8_t *codes) { return _mm256_load_si256((const __m256i *)codes); }

INLINE __m256i broadcast_4(const int8_t *q) {
    int32_t four;
    memcpy(&four, q, 4);
    return _mm256_set1_epi32(four);
}

/* acc[r][h] += the products of some quads of 16 columns; `codes` is the first's, `q` the first row's. */
INLINE void add_quads(const Block *b, const int rows, const uint8_t *codes, const int8_t *q, int64_t quads, const int wide,
                      __m256i acc[][2]) {
    for (int64_t quad = 0; quad < quads; quad++, codes += 4 * COLUMNS, q += 4) {
        const __m256i w0 = load_32(codes), w1 = load_32(codes + 32);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256i a = broadcast_4(q + r * b->stride);
            acc[r][0] = dot(acc[r][0], w0, a, wide);
            acc[r][1] = dot(acc[r][1], w1, a, wide);
        }
    }
}

/* In place, for the reason that add_dot has. */
INLINE void add_pairs(__m256i *sum, __m256i pairs) { __asm__("vpaddw %1, %0, %0" : "+x"(*sum) : "x"(pairs)); }

/* The same, of codes up to 4 bits: widened once for HELD quads, which spares nearly half of the multiplications. */
INLINE void add_quads_held(const Block *b, const int rows, const uint8_t *codes, const int8_t *q, int64_t quads, __m256i acc[][2]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t quad = 0; quad < quads;) {
        __m256i pairs[ROWS][2];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
        for (const int64_t end = smaller(quad + HELD, quads); quad < end; quad++, codes += 4 * COLUMNS, q += 4) {
            const __m256i w0 = load_32(codes), w1 = load_32(codes + 32);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const __m256i a = broadcast_4(q + r * b->stride);
                add_pairs(&pairs[r][0], _mm256_maddubs_epi16(w0, a));
                add_pairs(&pairs[r][1], _mm256_maddubs_epi16(w1, a));
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) acc[r][h] = _mm256_add_epi32(acc[r][h], _mm256_madd_epi16(pairs[r][h], ones));
    }
}

INLINE void half_block(const Block *b, const int rows, const int column, const int bits) {
    const int64_t quads_in_all = ceil_div(b->k_in, 4), quads = ceil_div(b->group, 4);
    for (int64_t g = 0; g < b->groups; g++) {
        __m256i acc[ROWS][2];
        for (int r = 0; r < rows; r++) {
            const int32_t sum = b->token_sums[r * b->groups + g];
            for (int h = 0; h < 2; h++) {
                const __m256i z = b->zero ? _mm256_loadu_si256((const __m256i *)(b->zero + g * COLUMNS + column + 8 * h))
                                          : _mm256_set1_epi32(1 << (b->bits - 1));
                acc[r][h] = _mm256_mullo_epi32(z, _mm256_set1_epi32(-sum));
            }
        }
        const int64_t first = g * quads, count = smaller(first + quads, quads_in_all) - first;
        const uint8_t *codes = b->codes + first * 4 * COLUMNS + 4 * column;
        if (HELD && bits <= 4) add_quads_held(b, rows, codes, b->q + 4 * first, count, acc);
        else add_quads(b, rows, codes, b->q + 4 * first, count, bits > 6, acc);
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < 2; h++) {
                float *to = b->sums + r * COLUMNS + column + 8 * h;
                __m256 y = _mm256_cvtepi32_ps(acc[r][h]);
                if (b->act_scale) y = _mm256_mul_ps(y, _mm256_set1_ps(b->act_scale[r * b->groups + g]));
                const __m256 s = _mm256_loadu_ps(b->scale + g * COLUMNS + column + 8 * h);
                _mm256_storeu_ps(to, g ? _mm256_fmadd_ps(y, s, _mm256_loadu_ps(to)) : _mm256_mul_ps(y, s));
            }
    }
}

INLINE void many_groups(const Block *b, const int rows) {
    for (int column = 0; column < COLUMNS; column += 16) {
        if (b->bits <= 4) half_block(b, rows, column, 4);
        else if (b->bits <= 6) half_block(b, rows, column, 6);
        else half_block(b, rows, column, 8);
    }
}

#define one_group many_groups
#else
enum { ROWS = 4, ROWS_GROUPED = 4 };

INLINE void many_groups(const Block *b, const int rows) {
    const int64_t quads_in_all = ceil_div(b->k_in, 4), quads = ceil_div(b->group, 4);
    for (int64_t g = 0; g < b->groups; g++) {
        const int64_t first = g * quads, last = smaller(first + quads, quads_in_all);
        for (int r = 0; r < rows; r++) {
            int32_t acc[COLUMNS];
            const int32_t sum = b->token_sums[r * b->groups + g];
            for (int n = 0; n < COLUMNS; n++) acc[n] = -sum * (b->zero ? b->zero[g * COLUMNS + n] : 1 << (b->bits - 1));
            for (int64_t quad = first; quad < last; quad++) {
                const uint8_t *codes = b->codes + quad * 4 * COLUMNS;
                const int8_t *q = b->q + r * b->stride + 4 * quad;
                for (int n = 0; n < COLUMNS; n++)
                    acc[n] += codes[4 * n] * q[0] + codes[4 * n + 1] * q[1] + codes[4 * n + 2] * q[2] + codes[4 * n + 3] * q[3];
            }
            float *to = b->sums + r * COLUMNS;
            const float a = b->act_scale ? b->act_scale[r * b->groups + g] : 1.0f;
            for (int n = 0; n < COLUMNS; n++) {
                const float y = (float)acc[n] * a * b->scale[g * COLUMNS + n];
                to[n] = g ? to[n] + y : y;
            }
        }
    }
}
#define one_group many_groups
#endif

static inline void run_block(const Block *b, int rows) {
    switch (rows) { /* the count is a constant inside each case, so the sums live in registers */
#define CASE(n) \
    case n: \
        if (b->groups == 1 && n <= ROWS) one_group(b, n <= ROWS ? n : 1); \
        else if (n <= ROWS_GROUPED) many_groups(b, n <= ROWS_GROUPED ? n : 1); \
        break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
    }
}

#endif
