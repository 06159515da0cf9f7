/* The innermost loops of linear_wnan on AMX: 16 tokens x 64 features against 64 features x 16 columns is one instruction. Tokens and codes
   are both signed there, and lie as block.h has them: 16 quads of codes, COLUMNS x 64 bytes, are two tiles side by side. */
#ifndef LOWBIT_LINEAR_WNAN_BLOCK_AMX_H
#define LOWBIT_LINEAR_WNAN_BLOCK_AMX_H

#include "../amx.h"
#include "block.h"

enum { DEPTH = 64 }; /* features of a tile */
#if defined(__AMX_INT8__)

enum { AMX_ROWS_GROUPED = 64 }; /* tokens at a time */
enum { FEATURES = 512 };        /* whose codes stay in the first cache while all tokens of a block pass */

/* What the zero points that codes could not take add to a row's sums of one group: see reads_sums. */
INLINE __m512i with_zero(const Block *b, __m512i sum, int64_t row, int64_t g, int64_t column) {
    if (!b->zero) return sum;
    const __m512i zero = _mm512_load_si512(b->zero + g * COLUMNS + column);
    return _mm512_add_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(b->token_sums[row * b->groups + g])));
}

/* One scale per column: 32 tokens (or 16) x 32 columns, whose sums stay in tiles over all features. */
INLINE void amx_one_group(const Block *b, const int64_t rows) {
    int32_t sums[AMX_ROWS * COLUMNS] __attribute__((aligned(64)));
    AMX_SUM_32(TILE_DOT_INT8, b->q, b->stride, b->codes, rows, ceil_div(b->k_in, DEPTH), sums);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t column = 0; column < COLUMNS; column += TILE) {
            const __m512i sum = with_zero(b, _mm512_load_si512(sums + r * COLUMNS + column), r, 0, column);
            _mm512_store_ps(b->sums + r * COLUMNS + column, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps(b->scale + column)));
        }
}

/* Sums of group g of 16 tokens from `row` on x 16 columns, to [TILE][TILE]. */
INLINE void amx_sum_group(const Block *b, int64_t row, int64_t column, int64_t g, int32_t *sums) {
    const int64_t end = smaller((g + 1) * b->group, b->k_in);
    TILE_ZERO(0);
    for (int64_t k = g * b->group; k < end; k += DEPTH) {
        TILE_LOAD(4, b->q + row * b->stride + k, b->stride);
        TILE_LOAD(6, b->codes + k * COLUMNS + 4 * column, 4 * COLUMNS);
        TILE_DOT_INT8(0, 4, 6);
    }
    TILE_STORE(0, sums, 4 * TILE);
}

/* What they add to the totals of the first `rows` tokens; the others' are not used. */
INLINE void amx_add_group(const Block *b, int64_t row, int64_t rows, int64_t column, int64_t g, const int32_t *sums, __m512 total[],
                          const int plain) {
    const __m512 scale = _mm512_load_ps(b->scale + g * COLUMNS + column);
#pragma GCC unroll 16
    for (int r = 0; r < TILE; r++) {
        const int64_t token = r < rows ? row + r : row;
        __m512i sum = _mm512_load_si512(sums + r * TILE);
        if (!plain) sum = with_zero(b, sum, token, g, column);
        __m512 y = _mm512_cvtepi32_ps(sum);
        if (!plain && b->act_scale) y = _mm512_mul_ps(y, _mm512_set1_ps(b->act_scale[token * b->groups + g]));
        total[r] = _mm512_fmadd_ps(y, scale, total[r]);
    }
}

/* Groups first ... last - 1 of 16 tokens x 16 columns. Their totals stay in vector registers; sums of a group pass through memory and are
   added while the next group is multiplied. */
INLINE void amx_groups(const Block *b, int64_t row, int64_t rows, int64_t column, int64_t first, int64_t last, const int plain) {
    int32_t sums[2][TILE * TILE] __attribute__((aligned(64)));
    float *to = b->sums + row * COLUMNS + column;
    __m512 total[TILE];
#pragma GCC unroll 16
    for (int r = 0; r < TILE; r++) total[r] = first ? _mm512_load_ps(to + r * COLUMNS) : _mm512_setzero_ps();
    amx_sum_group(b, row, column, first, sums[first & 1]);
    for (int64_t g = first + 1; g < last; g++) {
        amx_sum_group(b, row, column, g, sums[g & 1]);
        amx_add_group(b, row, rows, column, g - 1, sums[~g & 1], total, plain);
    }
    amx_add_group(b, row, rows, column, last - 1, sums[~last & 1], total, plain);
#pragma GCC unroll 16
    for (int r = 0; r < TILE; r++) _mm512_store_ps(to + r * COLUMNS, total[r]);
}

INLINE void amx_many_groups(const Block *b, const int64_t rows, const int plain) {
    const int64_t step = b->group < FEATURES ? FEATURES / b->group : 1;
    for (int64_t g = 0; g < b->groups; g += step)
        for (int64_t row = 0; row < rows; row += TILE)
            for (int64_t column = 0; column < COLUMNS; column += TILE)
                amx_groups(b, row, rows - row, column, g, smaller(b->groups, g + step), plain);
}

/* Up to AMX_ROWS or AMX_ROWS_GROUPED tokens; b->q may be read, and b->sums written, up to a whole number of tiles. */
static void amx_block(const Block *b, int64_t rows) {
    if (b->groups == 1) amx_one_group(b, rows);
    else if (b->act_scale || b->zero) amx_many_groups(b, rows, 0);
    else amx_many_groups(b, rows, 1);
}

#else /* never called */
enum { AMX_ROWS_GROUPED = 1 };
static void amx_block(const Block *b, int64_t rows) {}
#endif

#endif
