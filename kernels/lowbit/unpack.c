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

/* A block of 16 quads of 16 columns, which lies within a group: made signed, and 128 times its sum taken from `start`. */
#if defined(__AVX512VNNI__)
INLINE void sign_16x16(__m512i r[16], int count, __m512i zero, int32_t *start) {
    const __m512i by = _mm512_set1_epi8((char)128);
    __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        r[i] = _mm512_sub_epi8(r[i], zero);
        if (i < count) sums[i % 4] = _mm512_dpbusd_epi32(sums[i % 4], by, r[i]);
    }
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
    _mm512_store_si512(start, _mm512_sub_epi32(_mm512_load_si512(start), sum));
}
#else
INLINE void sign_16x16(__m512i r[16], int count, __m512i zero, int32_t *start) {}
#endif

/* Where the tile goes. `start` NULL: codes as they are; else signed, in blocks that each lie within a group. */
typedef struct {
    const Weight *weight;
    const int32_t *zero;
    uint8_t *to;
    int32_t *start;
} Tile;

INLINE void put_16x16(const Tile *tile, __m512i r[16], int64_t quad, int half) {
    const int count = (int)smaller(16, ceil_div(tile->weight->k_in, 4) - quad);
    if (tile->start) {
        const int64_t at = quad * 4 / tile->weight->group * COLUMNS + half;
        const __m512i centre = _mm512_set1_epi8((char)(1 << (tile->weight->bits - 1))), bytes = _mm512_set1_epi32(0x01010101);
        sign_16x16(r, count, tile->zero ? _mm512_mullo_epi32(_mm512_load_si512(tile->zero + at), bytes) : centre, tile->start + at);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (i < count) _mm512_store_si512(tile->to + (quad + i) * 4 * COLUMNS + 4 * half, r[i]);
}

/* Codes of 4 bits are transposed while two quads still fill a lane of 32 bits: half the work. 64 of each row at a time. */
INLINE void unpack_4(const Tile *tile, int64_t first_n) {
    const Weight *weight = tile->weight;
    const int64_t row_bytes = ceil_div(weight->k_in, 2), quads = ceil_div(weight->k_in, 4);
    const __m512i even = _mm512_set1_epi64(0x2c2824200c080400), odd = _mm512_set1_epi64(0x3c3834301c181410), mask = _mm512_set1_epi8(15);
    const uint8_t *first = weight->packed + first_n * row_bytes;
    const int64_t columns = smaller(COLUMNS, weight->n_out - first_n);
    for (int64_t quad = 0; quad < quads; quad += 16) {
        const int64_t at = quad * 2, left = smaller(row_bytes - at, 32);
        const __mmask32 inside = left >= 32 ? ~0u : (1u << left) - 1;
        __m512i pairs[16], r[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const __m256i low = _mm256_maskz_loadu_epi8(i < columns ? inside : 0, first + i * row_bytes + at);
            const __m256i high = _mm256_maskz_loadu_epi8(i + 16 < columns ? inside : 0, first + (i + 16) * row_bytes + at);
            pairs[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        }
        transpose_16x16(pairs);
#pragma GCC unroll 2
        for (int half = 0; half < COLUMNS; half += 16) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const __m512i both = pairs[half / 2 + i];
                r[2 * i] = _mm512_and_si512(_mm512_multishift_epi64_epi8(even, both), mask);
                r[2 * i + 1] = _mm512_and_si512(_mm512_multishift_epi64_epi8(odd, both), mask);
            }
            put_16x16(tile, r, quad, half);
        }
    }
}

INLINE void unpack(const Tile *tile, int64_t first_n) {
    const Weight *weight = tile->weight;
    const int64_t bits = weight->bits, row_bytes = ceil_div(weight->k_in * bits, 8), quads = ceil_div(weight->k_in, 4);
    if (bits == 4) {
        unpack_4(tile, first_n);
        return;
    }
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
            put_16x16(tile, rows, quad, half);
        }
    }
}

void lowbit_unpack_tile(const Weight *weight, int64_t first_n, uint8_t *restrict to) {
    const Tile tile = {.weight = weight, .to = to};
    unpack(&tile, first_n);
}
#elif defined(__AVX2__)
/* The bits of 4 quads in each half, from `shuffle` on in each lane of 32 bits, become a byte a code. */
INLINE __m256i spread_codes(__m256i stream, __m256i shuffle, __m256i shifts, const int bits) {
    if (bits == 8) return stream;
    const __m256i quad = _mm256_srlv_epi32(_mm256_shuffle_epi8(stream, shuffle), shifts);
    __m256i codes = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        codes = _mm256_or_si256(codes, _mm256_and_si256(_mm256_slli_epi32(quad, (8 - bits) * i),
                                                        _mm256_set1_epi32(((1 << bits) - 1) << 8 * i)));
    return codes;
}

INLINE __m128i load_within(const uint8_t *row, int64_t at, int64_t row_bytes) {
    if (at + 16 <= row_bytes) return _mm_loadu_si128((const __m128i *)(row + at));
    uint8_t rest[16] = {0};
    memcpy(rest, row + at, (size_t)(row_bytes - at));
    return _mm_loadu_si128((const __m128i *)rest);
}

/* 4 quads of 8 columns at a time: column i and i + 4 side by side, so that transposing within lanes is enough. */
INLINE void unpack_as(const Weight *weight, int64_t first_n, uint8_t *restrict to, const int bits) {
    const int64_t row_bytes = ceil_div(weight->k_in * bits, 8), quads = ceil_div(weight->k_in, 4);
    const int byte = 0x01010101, bytes = 0x03020100, odd = bits * 4 % 8; /* odd quads may begin within a byte */
    const __m256i shuffle = _mm256_broadcastsi128_si256(
        _mm_setr_epi32(bytes, bytes + bits / 2 * byte, bytes + bits * byte, bytes + bits * 3 / 2 * byte));
    const __m256i shifts = _mm256_setr_epi32(0, odd, 0, odd, 0, odd, 0, odd);
    for (int column = 0; column < COLUMNS; column += 8)
        for (int64_t quad = 0; quad < quads; quad += 4) {
            __m256i r[4], t[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m128i half[2];
                for (int h = 0; h < 2; h++) {
                    const int64_t n = first_n + column + i + 4 * h;
                    const uint8_t *row = weight->packed + n * row_bytes;
                    half[h] = n < weight->n_out ? load_within(row, quad / 2 * bits, row_bytes) : _mm_setzero_si128();
                }
                r[i] = spread_codes(_mm256_set_m128i(half[1], half[0]), shuffle, shifts, bits);
            }
            t[0] = _mm256_unpacklo_epi32(r[0], r[1]), t[1] = _mm256_unpackhi_epi32(r[0], r[1]);
            t[2] = _mm256_unpacklo_epi32(r[2], r[3]), t[3] = _mm256_unpackhi_epi32(r[2], r[3]);
            r[0] = _mm256_unpacklo_epi64(t[0], t[2]), r[1] = _mm256_unpackhi_epi64(t[0], t[2]);
            r[2] = _mm256_unpacklo_epi64(t[1], t[3]), r[3] = _mm256_unpackhi_epi64(t[1], t[3]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                if (quad + i < quads) _mm256_store_si256((__m256i *)(to + (quad + i) * 4 * COLUMNS + 4 * column), r[i]);
        }
}

void lowbit_unpack_tile(const Weight *weight, int64_t first_n, uint8_t *restrict to) {
    switch (weight->bits) {
        case 2: unpack_as(weight, first_n, to, 2); break;
        case 3: unpack_as(weight, first_n, to, 3); break;
        case 4: unpack_as(weight, first_n, to, 4); break;
        case 6: unpack_as(weight, first_n, to, 6); break;
        default: unpack_as(weight, first_n, to, 8);
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

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
static void sign_tile(const Weight *weight, const int32_t *zero, uint8_t *restrict to, int32_t *restrict start) {
    const int64_t quads = ceil_div(weight->k_in, 4);
    for (int64_t quad = 0; quad < quads; quad++) {
        const int64_t group = quad * 4 / weight->group * COLUMNS;
        for (int i = 0; i < 4 * COLUMNS; i++) {
            uint8_t *code = to + quad * 4 * COLUMNS + i;
            *code = (uint8_t)(*code - (zero ? zero[group + i / 4] : 1 << (weight->bits - 1)));
            start[group + i / 4] -= 128 * (int8_t)*code;
        }
    }
}

void lowbit_unpack_signed(const Weight *weight, int64_t first_n, const int32_t *zero, uint8_t *restrict to, int32_t *restrict start) {
    memset(start, 0, (size_t)ceil_div(weight->k_in, weight->group) * COLUMNS * sizeof *start);
#if defined(__AVX512VBMI__)
    if (weight->group % 64 == 0 || weight->group >= weight->k_in) {
        const Tile tile = {weight, zero, to, start};
        unpack(&tile, first_n);
        return;
    }
#endif
    lowbit_unpack_tile(weight, first_n, to);
    sign_tile(weight, zero, to, start);
}
#else
void lowbit_unpack_signed(const Weight *weight, int64_t first_n, const int32_t *zero, uint8_t *restrict to, int32_t *restrict start) {}
#endif

void lowbit_tile_scales(const Weight *weight, int64_t first_n, float *restrict scale, int32_t *restrict zero) {
    const int64_t groups = ceil_div(weight->k_in, weight->group), columns = smaller(COLUMNS, weight->n_out - first_n);
    memset(scale, 0, (size_t)groups * COLUMNS * sizeof *scale);
    if (weight->zero) memset(zero, 0, (size_t)groups * COLUMNS * sizeof *zero);
    for (int64_t column = 0; column < columns; column++) {
        const int64_t row = (first_n + column) * groups;
        int64_t g = 0;
#if defined(__F16C__)
        for (float four[4]; g + 4 <= groups; g += 4) {
            _mm_storeu_ps(four, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)(weight->scale + row + g))));
            for (int i = 0; i < 4; i++) scale[(g + i) * COLUMNS + column] = four[i];
        }
#endif
        for (; g < groups; g++) scale[g * COLUMNS + column] = from_half(weight->scale[row + g]);
        if (weight->zero)
            for (g = 0; g < groups; g++) zero[g * COLUMNS + column] = weight->zero[row + g];
    }
}
