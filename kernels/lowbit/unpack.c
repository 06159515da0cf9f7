/* Packed codes to the layout of the dot products, one tile of COLUMNS out features at a time.

   A row is a little-endian bit stream (formats.py): 8 codes of b bits fill b bytes. No copy of the unpacked weight outlives its tile. */
#include "lowbit.h"

#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
/* 64 codes of one row: spread the b bytes of each 8 codes over a quadword, then shift every code to its byte. */
INLINE __m512i expand(__m512i stream, __m512i spread, __m512i shifts, __m512i mask) {
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, stream)), mask);
}

INLINE void transpose_16x16(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

void lowbit_unpack_tile(const Weight *weight, int64_t first_n, uint8_t *restrict to) {
    const int64_t bits = weight->bits, row_bytes = ceil_div(weight->k_in * bits, 8), quads = ceil_div(weight->k_in, 4);
    uint8_t spread_bytes[64];
    uint64_t shift_word = 0;
    for (int i = 0; i < 64; i++) spread_bytes[i] = (uint8_t)(i / 8 * bits + i % 8);
    for (int i = 0; i < 8; i++) shift_word |= (uint64_t)(i * bits) << (8 * i);
    const __m512i spread = _mm512_loadu_si512(spread_bytes), shifts = _mm512_set1_epi64((long long)shift_word);
    const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
    for (int64_t quad = 0; quad < quads; quad += 16) {
        const int64_t at = quad / 16 * 8 * bits, left = smaller(row_bytes - at, 8 * bits);
        const __mmask64 inside = left >= 64 ? ~0ull : (1ull << left) - 1;
        for (int half = 0; half < COLUMNS; half += 16) {
            __m512i rows[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const int64_t n = first_n + half + i;
                rows[i] = n < weight->n_out ? _mm512_maskz_loadu_epi8(inside, weight->packed + n * row_bytes + at)
                                            : _mm512_setzero_si512();
                if (bits != 8) rows[i] = expand(rows[i], spread, shifts, mask);
            }
            transpose_16x16(rows);
            const int count = (int)smaller(16, quads - quad);
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++)
                if (i < count) _mm512_store_si512(to + (quad + i) * 4 * COLUMNS + 4 * half, rows[i]);
        }
    }
}
#else
void lowbit_unpack_tile(const Weight *weight, int64_t first_n, uint8_t *restrict to) {
    const int64_t bits = weight->bits, row_bytes = ceil_div(weight->k_in * bits, 8), quads = ceil_div(weight->k_in, 4);
    const uint64_t mask = (1u << bits) - 1;
    memset(to, 0, (size_t)quads * 4 * COLUMNS);
    for (int column = 0; column < COLUMNS && first_n + column < weight->n_out; column++) {
        const uint8_t *row = weight->packed + (first_n + column) * row_bytes;
        for (int64_t k = 0; k < weight->k_in; k += 8) {
            uint64_t word = 0; /* the b bytes of 8 codes */
            memcpy(&word, row + k / 8 * bits, (size_t)smaller(bits, row_bytes - k / 8 * bits));
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
            word = __builtin_bswap64(word);
#endif
            const int64_t count = smaller(8, weight->k_in - k);
            for (int64_t i = 0; i < count; i++)
                to[(k + i) / 4 * 4 * COLUMNS + column * 4 + (k + i) % 4] = (uint8_t)(word >> (bits * i) & mask);
        }
    }
}
#endif

void lowbit_tile_scales(const Weight *weight, int64_t first_n, float *restrict scale, int32_t *restrict zero) {
    const int64_t groups = ceil_div(weight->k_in, weight->group), columns = smaller(COLUMNS, weight->n_out - first_n);
    memset(scale, 0, (size_t)groups * COLUMNS * sizeof *scale);
    if (weight->zero) memset(zero, 0, (size_t)groups * COLUMNS * sizeof *zero);
    for (int64_t column = 0; column < columns; column++) {
        const int64_t row = (first_n + column) * groups;
        for (int64_t g = 0; g < groups; g++) scale[g * COLUMNS + column] = from_half(weight->scale[row + g]);
        if (weight->zero)
            for (int64_t g = 0; g < groups; g++) zero[g * COLUMNS + column] = weight->zero[row + g];
    }
}
