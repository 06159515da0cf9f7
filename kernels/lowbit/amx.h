/* AMX: matrix registers of 16 rows of 64 bytes. tmm0 to tmm3 hold sums, tmm4 and tmm5 tokens, tmm6 and tmm7 weights. */
#ifndef LOWBIT_AMX_H
#define LOWBIT_AMX_H

#include "lowbit.h"

enum { TILE = 16 }; /* rows of a tile, and columns of one of sums */

/* gcc's intrinsics do not say that they read and write memory. */
#define TILE_ZERO(c) __asm__ volatile("tilezero %%tmm" #c :::)
#define TILE_LOAD(t, from, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(t, to, stride) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")
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

#endif
