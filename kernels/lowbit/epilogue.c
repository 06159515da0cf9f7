/* The last pass over a tile of sums while it is in the cache: scale of the token, low-rank branch, bias, GELU, gated residual, format. */
#include "lowbit.h"

/* x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form of GELU, e^-|2u| so that nothing overflows. */
INLINE float gelu_tanh(float x) {
    const float twice_u = 1.5957691216057308f * x * __builtin_fmaf(0.044715f * x, x, 1.0f);
    const float small = exp_negative(-__builtin_fabsf(twice_u));
    return x * (twice_u >= 0 ? 1.0f : small) / (1.0f + small);
}

INLINE void finish(const Weight *weight, const Epilogue *end, float *restrict sums, const float *row_scale, int64_t first_m,
                   int64_t rows, int64_t first_n, const int64_t columns) {
    float bias[COLUMNS] = {0};
    if (end->bias) load_floats(end->bias, (int)end->bias_format, first_n, columns, bias);
    for (int64_t row = 0; row < rows; row++) {
        float *restrict out = sums + row * COLUMNS;
        const float scale = row_scale ? row_scale[row] : 1.0f;
        for (int i = 0; i < COLUMNS; i++) out[i] = __builtin_fmaf(out[i], scale, bias[i]);
        if (end->rank) {
            const float *low = end->low + (first_m + row) * end->rank;
            for (int64_t i = 0; i < columns; i++) {
                const float *restrict up = end->up + (first_n + i) * end->rank;
                float dot = 0;
                for (int64_t r = 0; r < end->rank; r++) dot += low[r] * up[r];
                out[i] += dot;
            }
        }
        if (end->gelu)
            for (int i = 0; i < COLUMNS; i++) out[i] = gelu_tanh(out[i]);
        if (end->residual) {
            float kept[COLUMNS] = {0}, gate[COLUMNS] = {0};
            load_floats(end->residual, (int)end->y_format, (first_m + row) * weight->n_out + first_n, columns, kept);
            load_floats(end->gate, (int)end->y_format, (first_m + row) / end->tokens * end->gate_stride + first_n, columns, gate);
            for (int i = 0; i < COLUMNS; i++) out[i] = __builtin_fmaf(gate[i], out[i], kept[i]);
        }
        store_floats(out, columns, end->y, (int)end->y_format, (first_m + row) * weight->n_out + first_n);
    }
}

void lowbit_finish(const Weight *weight, const Epilogue *end, float *restrict sums, const float *row_scale, int64_t first_m,
                   int64_t rows, int64_t first_n) {
    const int64_t columns = smaller(COLUMNS, weight->n_out - first_n);
    if (columns == COLUMNS) /* a constant here: whole vectors */
        finish(weight, end, sums, row_scale, first_m, rows, first_n, COLUMNS);
    else
        finish(weight, end, sums, row_scale, first_m, rows, first_n, columns);
}
