/* The last pass over a tile of sums while it is in the cache: scale of the token, low-rank branch, bias, GELU, gated residual, format. */
#include "lowbit.h"

/* x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form of GELU, e^-|2u| so that nothing overflows. */
INLINE float gelu_tanh(float x) {
    const float twice_u = 1.5957691216057308f * x * __builtin_fmaf(0.044715f * x, x, 1.0f);
    const float small = exp_negative(-__builtin_fabsf(twice_u));
    return x * (twice_u >= 0 ? 1.0f : small) / (1.0f + small);
}

/* Everything that can be chosen is an argument, so that it is a constant inside each caller. */
INLINE void finish(const Weight *weight, const Epilogue *end, const float *restrict sums, const float *row_scale, int64_t first_m,
                   int64_t rows, int64_t first_n, const int64_t columns, const int64_t rank, const int gelu, const int gated, const int format) {
    const int64_t n_out = weight->n_out;
    void *y = end->y;
    float bias[COLUMNS] = {0};
    if (end->bias) load_floats(end->bias, (int)end->bias_format, first_n, columns, bias);
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = (first_m + row) * n_out + first_n;
        const float scale = row_scale ? row_scale[row] : 1.0f;
        float out[COLUMNS];
        for (int i = 0; i < COLUMNS; i++) out[i] = __builtin_fmaf(sums[row * COLUMNS + i], scale, bias[i]);
        if (rank) {
            const float *low = end->low + (first_m + row) * rank;
            for (int64_t i = 0; i < columns; i++) {
                const float *restrict up = end->up + (first_n + i) * rank;
                float dot = 0;
                for (int64_t r = 0; r < rank; r++) dot += low[r] * up[r];
                out[i] += dot;
            }
        }
        if (gelu)
            for (int i = 0; i < COLUMNS; i++) out[i] = gelu_tanh(out[i]);
        if (gated) {
            float kept[COLUMNS] = {0}, gate[COLUMNS] = {0};
            load_floats(end->residual, format, at, columns, kept);
            load_floats(end->gate, format, (first_m + row) / end->tokens * end->gate_stride + first_n, columns, gate);
            for (int i = 0; i < COLUMNS; i++) out[i] = __builtin_fmaf(gate[i], out[i], kept[i]);
        }
        store_floats(out, columns, y, format, at);
    }
}

INLINE void finish_as(const Weight *weight, const Epilogue *end, const float *restrict sums, const float *row_scale, int64_t first_m,
                      int64_t rows, int64_t first_n, const int format) {
    const int64_t columns = smaller(COLUMNS, weight->n_out - first_n);
    const int gelu = end->gelu != 0, gated = end->residual != NULL;
#define FINISH(columns, rank, gelu, gated) finish(weight, end, sums, row_scale, first_m, rows, first_n, columns, rank, gelu, gated, format)
    if (columns < COLUMNS || end->rank || (gelu && gated)) FINISH(columns, end->rank, gelu, gated);
    else if (gelu) FINISH(COLUMNS, 0, 1, 0);
    else if (gated) FINISH(COLUMNS, 0, 0, 1);
    else FINISH(COLUMNS, 0, 0, 0);
#undef FINISH
}

void lowbit_finish(const Weight *weight, const Epilogue *end, const float *restrict sums, const float *row_scale, int64_t first_m,
                   int64_t rows, int64_t first_n) {
    if (end->y_format == F32) finish_as(weight, end, sums, row_scale, first_m, rows, first_n, F32);
    else if (end->y_format == BF16) finish_as(weight, end, sums, row_scale, first_m, rows, first_n, BF16);
    else finish_as(weight, end, sums, row_scale, first_m, rows, first_n, F16);
}
