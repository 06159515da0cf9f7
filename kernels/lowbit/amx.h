/* AMX: matrix registers of 16 rows of 64 bytes. tmm0 to tmm3 hold sums, tmm4 and tmm5 tokens, tmm6 and tmm7 weights. */
#ifndef LOWBIT_AMX_H
#define LOWBIT_AMX_H

#include "lowbit.h"

#if defined(__AMX_TILE__)
enum { TILE = 16, AMX_ROWS = 32 }; /* rows of a tile, and columns of one of sums; tokens of AMX_SUM_32 */

/* What the sanitizer cannot see inside the instructions. */
#if defined(__SANITIZE_ADDRESS__)
#define TILE_TOUCHED(at, stride) for (int touched = 0; touched < 2 * TILE; touched++) \
    (void)((const volatile char *)(at))[touched / 2 * (int64_t)(stride) + touched % 2 * 63];
#else
#define TILE_TOUCHED(at, stride)
#endif

/* gcc's intrinsics do not say that they read and write memory. */
#define TILE_ZERO(c) __asm__ volatile("tilezero %%tmm" #c :::)
#define TILE_LOAD(t, from, stride) do { \
        TILE_TOUCHED(from, stride) \
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"((int64_t)(stride)) : "memory"); \
    } while (0)
#define TILE_STORE(t, to, stride) do { \
        __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory"); \
        TILE_TOUCHED(to, stride) \
    } while (0)
#define TILE_DOT_INT8(c, x, w) __asm__ volatile("tdpbssd %%tmm" #w ", %%tmm" #x ", %%tmm" #c :::)
#define TILE_DOT_BF16(c, x, w) __asm__ volatile("tdpbf16ps %%tmm" #w ", %%tmm" #x ", %%tmm" #c :::)

/* On the calling thread: eight tiles of 16 rows of 64 bytes each, until amx_end. */
INLINE void amx_begin(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } tiles __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.row_bytes[i] = 64, tiles.rows[i] = TILE;
    __asm__ volatile("ldtilecfg %0" ::"m"(tiles));
}

INLINE void amx_end(void) { __asm__ volatile("tilerelease"); }

/* Does AMX run a product? Groups must be whole tiles, `depth` features, and tokens half a tile at least. */
INLINE int takes_amx(int64_t m, int64_t group, int64_t groups, int64_t depth) {
    return m >= TILE / 2 && (groups == 1 || group % depth == 0);
}

/* Sums of `steps` tiles of features, of 32 tokens (or 16) x 32 columns of 4 bytes: x has rows `stride` bytes apart, and w two tiles side by
   side for each step. x is read up to whole tiles of tokens. */
#define AMX_SUM_32(DOT, x, stride, w, rows, steps, sums) do { \
        const int both = (rows) > TILE; \
        char *const to = (char *)(sums); \
        TILE_ZERO(0); \
        TILE_ZERO(1); \
        TILE_ZERO(2); \
        TILE_ZERO(3); \
        for (int64_t step = 0; step < (steps); step++) { \
            const char *at = (const char *)(x) + step * 64, *weights = (const char *)(w) + step * 64 * COLUMNS; \
            TILE_LOAD(6, weights, 4 * COLUMNS); \
            TILE_LOAD(7, weights + 64, 4 * COLUMNS); \
            TILE_LOAD(4, at, stride); \
            DOT(0, 4, 6); \
            DOT(1, 4, 7); \
            if (both) { \
                TILE_LOAD(5, at + TILE * (stride), stride); \
                DOT(2, 5, 6); \
                DOT(3, 5, 7); \
            } \
        } \
        TILE_STORE(0, to, 4 * COLUMNS); \
        TILE_STORE(1, to + 64, 4 * COLUMNS); \
        if (both) { \
            TILE_STORE(2, to + 4 * TILE * COLUMNS, 4 * COLUMNS); \
            TILE_STORE(3, to + 4 * TILE * COLUMNS + 64, 4 * COLUMNS); \
        } \
    } while (0)
#else /* nothing takes it */
enum { TILE = 1, AMX_ROWS = 1 };
INLINE void amx_begin(void) {}
INLINE void amx_end(void) {}
INLINE int takes_amx(int64_t m, int64_t group, int64_t groups, int64_t depth) { return 0; }
#endif

#endif
