/* Masks on their own, for optimizers that have no one-pass step, and dropouts. */
#include "exported.h"
#include "philox.h"

/* Write 1 or 0 for n entries from start on, a multiple of 32. */
EXPORT CLONES void ct_keep_mask(uint8_t *out, int64_t start, int64_t n, const ct_draw *draw) {
    const ct_keys keys = ct_key_schedule(draw);
    uint8_t keep[CT_BATCH];
    for (int64_t i = 0; i < n; i += CT_BATCH) {
        const int64_t count = n - i < CT_BATCH ? n - i : CT_BATCH;
        ct_keep(draw, &keys, (uint64_t)(start + i), keep);
        for (int64_t j = 0; j < count; j++) out[i + j] = keep[j] & 1;
    }
}

/* out = in * scale where an entry is kept, else in * 0, for n entries from start on, a multiple of 32. */
EXPORT CLONES void ct_dropout(float *out, const float *in, int64_t start, int64_t n, const ct_draw *draw, float scale) {
    const ct_keys keys = ct_key_schedule(draw);
    uint8_t keep[CT_BATCH];
    for (int64_t i = 0; i < n; i += CT_BATCH) {
        const int64_t count = n - i < CT_BATCH ? n - i : CT_BATCH;
        ct_keep(draw, &keys, (uint64_t)(start + i), keep);
        for (int64_t j = 0; j < count; j++) out[i + j] = in[i + j] * (keep[j] ? scale : 0.0f); /* NaN stays NaN */
    }
}
